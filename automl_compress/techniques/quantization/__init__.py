"""Fewer bits: what a layer is stored in, what computes it, and how its numbers are chosen."""
