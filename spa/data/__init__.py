"""Calibration data: read, made to fit a model's inputs, or made up."""
