"""The network: what the user brings, how it is traced, and how it is cut."""
