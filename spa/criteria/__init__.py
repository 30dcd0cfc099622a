"""Criteria: plain functions that score channels, high = keep. Importing this package fills the registry.

registry.py    what a criterion may look at, and the registry that `spa.criterion` and `--criterion` speak to
weights.py     of weights alone: l1, l2, LAMP, FPGM, BN scale, random
activations.py of what channels carry on calibration data: mean, Wanda, variance, FLAP, AMP, 2SSP, APoZ, usage
folding.py     of weights alone: the order in which similar channels merge
curvature.py   the error that is left after repair: OBS, OBSPA
gradients.py   of gradients, from torch: Taylor, SNIP, GraSP, CroP, SynFlow, Fisher, entropy, LoRAPrune
"""

from spa.criteria import activations, curvature, folding, gradients, weights
from spa.criteria.registry import AGGREGATES, Criterion, GroupView, LayerView, Slice, criterion, get, names

__all__ = [
    "AGGREGATES", "Criterion", "GroupView", "LayerView", "Slice", "activations", "criterion", "curvature", "folding", "get", "gradients",
    "names", "weights",
]  # fmt: skip
