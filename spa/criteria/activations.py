"""Criteria of what channels carry: statistics of the data of the layers that read them, on calibration data."""

from __future__ import annotations

import numpy as np

from spa.criteria.registry import LayerView, Scores, criterion


@criterion("activation", per="layer", needs="vectors", aggregate="mean")
def activation(layer: LayerView) -> Scores:
    """Mean of |x| where the channel is read (Molchanov et al. 2017, arXiv 1611.06440, as mean activation)."""
    return _mean(layer, layer.vectors.magnitude)


@criterion("variance", per="layer", needs="vectors", aggregate="mean")
def variance(layer: LayerView) -> Scores:
    """Var x where the channel is read, after the activation function (VBP, ICCV 2025): what is constant goes into the bias."""
    return _mean(layer, layer.vectors.variance)


@criterion("apoz", per="layer", needs="vectors", aggregate="mean")
def apoz(layer: LayerView) -> Scores:
    """1 - the average percentage of zeros where the channel is read (Hu et al. 2016, arXiv 1607.03250)."""
    return _mean(layer, 1 - layer.vectors.zeros)


def _mean(layer: LayerView, columns: Scores) -> Scores:
    """Mean over the columns of each channel."""
    return layer.per_channel(columns) / np.maximum(layer.per_channel(np.ones_like(columns)), 1)


@criterion("wanda", per="layer", needs="vectors")
def wanda(layer: LayerView) -> Scores:
    """Mean over outputs of |W_ij| ‖x_j‖₂ (Sun et al. 2024, arXiv 2306.11695, eq. 1), summed over the channel's columns (Wanda-sp).

    ‖x_j‖₂ is over the square root of the number of rows, so that layers with more rows weigh no more.
    """
    return layer.per_channel(np.abs(layer.weight).mean(axis=1) * np.sqrt(layer.vectors.square))


@criterion("flap", per="layer", needs="vectors")
def flap(layer: LayerView) -> Scores:
    """Var(x_j) Σ_i W_ij² (FLAP, An et al. 2024, arXiv 2312.11983, WIFV): what is left after the mean went into the bias."""
    return layer.per_channel(layer.vectors.variance * (layer.weight**2).sum(axis=1))


@criterion("amp", per="layer", needs="projections")
def amp(layer: LayerView) -> Scores:
    """Heads: mean over rows of ‖x_c W_c‖₁, what the head adds to the output. Channels of one column: mean of |x| (AMP, IJCNN 2025)."""
    return layer.projections
