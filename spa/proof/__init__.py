"""Removing equals masking: the masked model, inputs for both, and the comparison."""
