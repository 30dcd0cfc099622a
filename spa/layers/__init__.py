"""Layers as units: sub-layers of residual sums, which of them go, and what a network is without one."""
