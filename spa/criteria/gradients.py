"""Criteria of gradients, from executing the graph in torch (the extra `torch`)."""

from __future__ import annotations

import numpy as np

from spa.criteria.registry import GroupView, Scores, criterion


@criterion("taylor", needs="gradients")
def taylor(view: GroupView) -> Scores:
    """Σ |w ∂L/∂w| (Molchanov et al. 2019, arXiv 1906.10771, eq. 8, in magnitudes as Torch-Pruning takes it)."""
    return view.combine(view.saliency("taylor"))


@criterion("taylor-sum", needs="gradients")
def taylor_sum(view: GroupView) -> Scores:
    """|Σ w ∂L/∂w|: the first-order change of the loss when the channel goes (the same paper, eq. 6 for a group)."""
    return view.combine(np.abs(s) for s in view.saliency("taylor", signed=True))


@criterion("snip", needs="gradients")
def snip(view: GroupView) -> Scores:
    """Σ |w ∂L/∂w| as a share of the sum over the group (Lee et al. 2019, arXiv 1810.02340, eq. 5)."""
    found = view.combine(view.saliency("snip"))
    return found / (found.sum() or 1.0)


@criterion("grasp", needs="gradients")
def grasp(view: GroupView) -> Scores:
    """Σ w (Hg), high = keep: what goes must hurt the gradient flow least (Wang et al. 2020, arXiv 2002.07376, eq. 8)."""
    return view.combine(view.saliency("grasp", signed=True))


@criterion("crop", needs="gradients")
def crop(view: GroupView) -> Scores:
    """Σ |w (Hg)| (CroP, Rachwan et al. 2022, arXiv 2206.10451)."""
    return view.combine(view.saliency("crop"))


@criterion("synflow", needs="gradients")
def synflow(view: GroupView) -> Scores:
    """Σ |w| ∂R/∂|w| with R the sum of the outputs of the network of |w| on an input of ones (Tanaka et al. 2020, arXiv 2006.05467)."""
    return view.combine(view.saliency("synflow"))


@criterion("fisher", needs="gradients")
def fisher(view: GroupView) -> Scores:
    """Σ w² E[g²]: OBD with the diagonal of the empirical Fisher matrix (LeCun et al. 1990; Theis et al. 2018)."""
    return view.combine(view.saliency("fisher"))


@criterion("entropy-taylor", needs="gradients")
def entropy_taylor(view: GroupView) -> Scores:
    """Mean over samples of |Σ a ∂L/∂a| where the channel is read, L the entropy of the predictions (Adaptive MLP Pruning, 2026).

    No labels are needed.
    """
    return view.combine(view.activation_saliency())


@criterion("loraprune", needs="gradients")
def loraprune(view: GroupView) -> Scores:
    """Σ |w ∘ ĝ| of every matrix over its Euclidean norm, ĝ what LoRA's adapters see of the gradient (arXiv 2305.18403, eq. 7, one shot).

    ĝ = g_B A + B g_A − g_B g_A at B = 0, which is g AᵀA. The moving average over training steps has nothing to run over here.
    """
    found = view.saliency("loraprune")
    return view.combine(s / (np.linalg.norm(s) or 1.0) for s in found)
