"""Knowledge distillation: what a student is to learn from its teacher."""
