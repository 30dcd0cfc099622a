"""Repair of each kind of layer against numpy's least squares, and of those that are solved in blocks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from repair_cases import (
    KINDS,
    TOKEN,
    batches,
    case,
    error,
    every_row,  # noqa: F401
    fixed,
    heads_and_channels,
    network,
    of_the_layer,
    outputs_of,
    small_of,
    weights_of,
)
from test_trace import net

import spa
from spa.graph.groups import Kept
from spa.graph.linear import find_layers
from spa.graph.offsets import Offset, Offsets
from spa.statistics.observe import parts_of

# ------------------------------------------------------------------------------------------------ each kind of layer


kinds = list(KINDS)


def least_squares(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over rows and outputs of what is left of y (rows, outputs) by x (rows, columns) and a constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    ones = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    solution = np.linalg.lstsq(ones, y, rcond=None)[0]
    return float(((y - ones @ solution) ** 2).mean())


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("name", kinds)
def test_least_squares(name: str, inputs: str) -> None:
    """No weights and no constant leave a smaller error in the node's output than the repaired ones do."""
    shape, _, _, _, by_hand, canonical = KINDS[name]
    model, before = case(name)
    data = batches(shape)
    found = fixed(model, of_the_layer, data, inputs=inputs, damping=0)
    layer = next(x for x in find_layers(found.groups) if x.place.name == "w")
    lost = layer.removed(Kept(found.groups, found.gone))
    assert lost.any()
    assert (~lost).any(axis=1).all()
    r = np.concatenate([by_hand(o["r"].astype(np.float64)) for o in outputs_of(before, data)], axis=1)
    y = np.concatenate([canonical(o["y"].astype(np.float64)) for o in outputs_of(model, data)], axis=1)
    now = np.concatenate([canonical(o["y"].astype(np.float64)) for o in outputs_of(small_of(found), data)], axis=1)
    for part in range(len(y)):
        best = least_squares(r[part][:, ~lost[part]], y[part])
        assert ((now[part] - y[part]) ** 2).mean() == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert best > 1e-4 * y[part].var()
    (report,) = found.layers
    assert report.removed == lost.sum()
    total = sum(((now[p] - y[p]) ** 2).mean() for p in range(len(y))) / sum(y[p].var(axis=0).mean() for p in range(len(y)))
    assert report.after == pytest.approx(total, rel=1e-3)
    assert not found.skipped


@pytest.mark.parametrize("name", kinds)
def test_errors_fall_on_data_that_were_not_fitted(name: str) -> None:
    model, _ = case(name)
    shape = KINDS[name][0]
    data, held_out = batches(shape), batches(shape, seed=7)
    none, bias, affine, obspa = (
        error(fixed(model, of_the_layer, data, method=m, damping=1e-4), model, held_out) for m in ("none", "bias", "affine", "obspa")
    )
    assert none > bias > affine > obspa


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("name", ["conv", "conv, grouped", "matmul, bias behind"])
def test_scales_are_least_squares_too(name: str, inputs: str) -> None:
    """One factor a channel and part, and a constant an output: no others leave less."""
    model, before = case(name)
    shape, _, _, _, by_hand, canonical = KINDS[name]
    data = batches(shape)
    found = fixed(model, of_the_layer, data, method="affine", inputs=inputs, damping=0)
    layer = next(x for x in find_layers(found.groups) if x.place.name == "w")
    lost = layer.removed(Kept(found.groups, found.gone))
    r = np.concatenate([by_hand(o["r"].astype(np.float64)) for o in outputs_of(before, data)], axis=1)
    w = layer.weight.canonical(weights_of(model)["w"]).astype(np.float64)
    left_over = []
    for part in range(layer.parts):
        x = r[part] - r[part].mean(axis=0)
        channels = layer.channels[part]
        terms = [x[:, channels == c] @ w[part][:, channels == c].T for c in np.unique(channels[~lost[part]])]
        matrix, y = np.stack([t.ravel() for t in terms], axis=1), (x @ w[part].T).ravel()
        left_over.append(((y - matrix @ np.linalg.lstsq(matrix, y, rcond=None)[0]) ** 2).mean())
    pairs = zip(outputs_of(model, data), outputs_of(small_of(found), data), strict=True)
    off = np.concatenate([canonical(a["y"].astype(np.float64) - b["y"]) for a, b in pairs], axis=1)
    np.testing.assert_allclose((off**2).mean(axis=(1, 2)), left_over, rtol=1e-5)


def test_least_squares_of_what_is_not_an_output() -> None:
    """The gates of recurrent layers and the packed query, key and value, from the weights: nothing outside shows them."""
    cases = {
        "LSTM": (TOKEN + " o, y = LSTM <hidden_size=3> (r, w, u, b)", {"w": (1, 12, 10), "u": (1, 12, 3), "b": (1, 24)}),
        "LSTM, no bias": (TOKEN + " o, y = LSTM <hidden_size=3> (r, w, u)", {"w": (1, 12, 10), "u": (1, 12, 3)}),
        "LSTM, both ways": (TOKEN + ' o, y = LSTM <hidden_size=3, direction="bidirectional"> (r, w, u, b)',
                            {"w": (2, 12, 10), "u": (2, 12, 3), "b": (2, 24)}),
        "GRU": (TOKEN + " o, y = GRU <hidden_size=3> (r, w, u, b)", {"w": (1, 9, 10), "u": (1, 9, 3), "b": (1, 18)}),
        "RNN": (TOKEN + " o, y = RNN <hidden_size=3> (r, w, u, b)", {"w": (1, 3, 10), "u": (1, 3, 3), "b": (1, 6)}),
        "Attention": (TOKEN + " y = com.microsoft.Attention <num_heads=2> (r, w, b)", {"w": (10, 18), "b": (18,)}),
        "Attention, no bias": (TOKEN + " y = com.microsoft.Attention <num_heads=2> (r, w)", {"w": (10, 18)}),
    }
    data = batches((30, 8, 6))
    before = net("float[30,8,6] x -> float[30,8,10] r", TOKEN, w1=(6, 10))
    r = np.concatenate([o["r"].reshape(-1, 10) for o in outputs_of(before, data)]).astype(np.float64)
    for name, (body, weights) in cases.items():
        model = net("float[30,8,6] x -> float[a,b,c] y", body, w1=(6, 10), **weights)
        for inputs in ("dense", "pruned"):
            found = fixed(model, of_the_layer, data, damping=0, inputs=inputs)
            old, shift = linear_part(spa.analyze(model).groups)
            new, moved = linear_part(found.groups, found.model)
            layer = next(x for x in find_layers(found.groups) if x.place.name == "w")
            lost = layer.removed(Kept(found.groups, found.gone))[0]
            y = r @ old.T + shift
            left_over = float(((r[:, ~lost] @ new[:, ~lost].T + moved - y) ** 2).mean())
            assert left_over == pytest.approx(least_squares(r[:, ~lost], y), rel=1e-6), (name, inputs)
            kept = {n: v for n, v in weights_of(found.model).items() if n in ("u", "w1")}
            assert all((v == weights_of(model)[n]).all() for n, v in kept.items())
            small_of(found)
            assert error(found, model, data) < error(fixed(model, of_the_layer, data, method="none"), model, data)


def linear_part(groups: spa.Groups, model: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """(outputs, columns) and (outputs,): weight and constant of the layer of w."""
    held = {n: np.asarray(t.values, np.float64) for n, t in groups.traced.constants.items()}
    held |= {} if model is None else {n: v.astype(np.float64) for n, v in weights_of(model).items()}
    layer = next(x for x in find_layers(groups) if x.place.name == "w")
    offset = Offsets(groups).of(layer)
    weight = layer.weight.canonical(layer.place.read(held["w"], layer.weight_shape))[0]
    if not isinstance(offset, Offset):
        return weight, np.zeros(layer.outputs)
    return weight, offset.layout.canonical(offset.place.read(held[offset.place.name], offset.shape))[0].ravel()


# ------------------------------------------------------------------------------------------------ large layers


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_layers_that_are_solved_in_blocks(monkeypatch: pytest.MonkeyPatch, inputs: str) -> None:
    model, shape = network("flatten")
    groups = spa.analyze(model).groups
    wide = next(x for x in find_layers(groups) if x.place.name == "w2")
    for largest in (71, 30, 24, 9, 5):
        blocks = parts_of(wide, largest)
        assert max(len(b.columns) for b in blocks) <= largest
        np.testing.assert_array_equal(np.sort(np.concatenate([b.columns for b in blocks])), np.arange(72))
    for block in parts_of(wide, 24):  # all channels at a few places
        assert len(set(wide.channels[0][block.columns])) == 8
    data, held_out = batches(shape), batches(shape, seed=7)
    whole = error(fixed(model, heads_and_channels, data, inputs=inputs), model, held_out)
    for module in ("spa.statistics.observe", "spa.repairs.mending"):
        monkeypatch.setattr(f"{module}.parts_of", functools.partial(parts_of, largest=24))
    bias, blocks = (error(fixed(model, heads_and_channels, data, method=m, inputs=inputs), model, held_out) for m in ("bias", "obspa"))
    assert whole < blocks < bias
