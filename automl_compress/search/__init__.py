"""Choosing: the search space, what each option costs, the exact decoder, the samplers and the study."""
