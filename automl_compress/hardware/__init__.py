"""The device: what it is, how it is measured, what its profile knows, and what a model costs on it."""
