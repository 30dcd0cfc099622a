"""Scripts that a person runs."""
