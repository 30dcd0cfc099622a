"""Training of model files."""
