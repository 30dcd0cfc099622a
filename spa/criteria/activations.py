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
    """Var(x_j) Σ_i W_ij² (FLAP, An et al. 2024, arXiv 2312.11983, WIFV): what is left after the mean went into the bias.

    FLAP's widths: `--scope cost --normalize standardize` (z-scores of each group under one threshold, a head counted as its 4·d·D
    parameters and a neuron as 3·D), with `--repair bias`. The authors' code squares the scores of heads' columns before the z-score; here
    all are alike.
    """
    return layer.per_channel(layer.vectors.variance * (layer.weight**2).sum(axis=1))


@criterion("amp", per="layer", needs="projections")
def amp(layer: LayerView) -> Scores:
    """Heads: mean over rows of ‖x_c W_c‖₁, what the head adds to the output. Channels of one column: mean of |x| (AMP, IJCNN 2025).

    I_n = (1/BT) Σ_{b,t} Σ_o |Σ_d x_{t,n,d} W_O[n,d,o]|, I_j = mean |x_j|. Heads that share a key-value group are one channel here: the norm
    is of what they add together, where the authors' code adds up their norms. AMP's widths: `--units head,neuron --allocation uniform
    --target params=0.8`, the same share of all, and what heads leave of it by rounding is made up by neurons.
    """
    return layer.projections


@criterion("2ssp", per="layer", needs="vectors")
def two_ssp(layer: LayerView) -> Scores:
    """Mean over samples of ‖h_j‖₂ over a sample's tokens (2SSP, arXiv 2501.17771, stage 1; widths are uniform there)."""
    return layer.per_channel(layer.vectors.norm)


@criterion("usage", per="layer", needs="usage", aggregate="mean")
def usage(layer: LayerView) -> Scores:
    """Share of tokens t whose largest ‖h_{t,c} W_O[c]‖₂ is the channel's own: how often top-1 routing would take it (after SHRP, 2025).

    SHRP trains a router; this is the part of it that a finished network has. Meant for heads: of many neurons nearly all have zero.
    """
    return layer.usage
