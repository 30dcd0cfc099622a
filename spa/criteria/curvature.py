"""Criteria of second order: the error that removing a channel leaves in the layers that read it, repair included."""

from __future__ import annotations

import numpy as np

from spa.criteria import select
from spa.criteria.registry import GroupView, LayerView, Scores, criterion

STEPS = 64  # removals between two scorings of what is left


@criterion("obs", per="layer", needs="covariances")
def obs(layer: LayerView) -> Scores:
    """Σ_j w_j² / [C⁻¹]_jj over the channel's columns, each alone (OBS, Hassibi & Stork 1993; layer-wise as in SparseGPT)."""
    return sum((select.errors([s], layer.size, damping=layer.damping, block="diagonal") for s in layer.systems), np.zeros(layer.size))


@criterion("obspa", per="layer", needs="covariances")
def obspa(layer: LayerView) -> Scores:
    """tr(W_B [(C⁻¹)_BB]⁻¹ W_Bᵀ): the exact error of removing the channel's block of columns and refitting the rest.

    (ZipLM, arXiv 2302.04089; the group sum over layers is SPA's, arXiv 2403.18955.)
    """
    return sum((select.errors([s], layer.size, damping=layer.damping) for s in layer.systems), np.zeros(layer.size))


@criterion("obspa-greedy", needs="covariances", aggregate=None)
def obspa_greedy(view: GroupView) -> Scores:
    """The order in which channels go if always the cheapest goes next, the others having taken over what went before.

    Scored as `obspa`, down-dated after every 1/64 of the channels (ZipLM; OSSCAR, arXiv 2403.12983).
    """
    systems = [s for layer in view.layers() for s in layer.systems]
    if not systems:
        return np.sqrt(view.powers(2))
    return select.greedy(systems, view.size, damping=view.damping, steps=STEPS)


@criterion("obspa-prototype", per="layer", needs="covariances", aggregate="median")
def obspa_prototype(layer: LayerView) -> Scores:
    """The score of the authors' earlier prototype: SparseGPT's w² / U_jj², median over layers (spa.md §2.1); depends on the order."""
    return sum((select.errors([s], layer.size, damping=layer.damping, block="sweep") for s in layer.systems), np.zeros(layer.size))
