"""Ways to win accuracy back, each by name: what is cut when, and what is trained in between."""
