"""Criteria: plain functions that score channels, high = keep. Importing this package fills the registry.

registry.py    what a criterion may look at, and the registry that `spa.criterion` and `--criterion` speak to
weights.py     of weights alone: l1, l2, LAMP, FPGM, BN scale, random
activations.py of what channels carry on calibration data: mean, Wanda, variance, FLAP, AMP, 2SSP, APoZ, usage
folding.py     of weights alone: the order in which similar channels merge
curvature.py   the error that is left after repair: OBS, OBSPA
experts.py     of what experts of a mixture add, token by token: REAP; and which of them must stay
gradients.py   of gradients, from torch: Taylor, SNIP, GraSP, CroP, SynFlow, Fisher, entropy, LoRAPrune
"""

from spa.criteria import activations, curvature, experts, folding, gradients, weights
from spa.criteria.registry import AGGREGATES, Criterion, GroupView, LayerView, Slice, criterion, get, names

__all__ = [
    "AGGREGATES", "Criterion", "GroupView", "LayerView", "Slice", "activations", "criterion", "curvature", "experts", "folding", "get",
    "gradients", "names", "weights",
]  # fmt: skip
