"""What can be done to a model. Each technique turns a model into a new one; none imports another."""
