"""Repair of whole networks on data not fitted, and what it leaves alone."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
from repair_cases import (
    NETWORKS,
    TOKEN,
    batches,
    error,
    every_row,  # noqa: F401
    fixed,
    gone_where,
    heads_and_channels,
    network,
    of_the_layer,
    outputs_of,
    small_of,
    weights_of,
)
from test_trace import ints, net

import spa
from spa.errors import BadOption
from spa.graph.groups import Kept
from spa.graph.linear import find_layers
from spa.repairs.repair import RepairOptions, repair
from spa.storage.store import to_bytes, to_proto

# ------------------------------------------------------------------------------------------------ whole networks


trials = [
    (n, i)
    for n in NETWORKS for i in ("dense", "pruned")
]  # fmt: skip


@pytest.mark.parametrize("name, inputs", trials)
def test_networks_on_data_that_were_not_fitted(name: str, inputs: str) -> None:
    model, shape = network(name)
    data, held_out = batches(shape), batches(shape, seed=7, count=3)
    none, bias, affine, obspa = (
        error(fixed(model, heads_and_channels, data, method=m, inputs=inputs, damping=1e-3), model, held_out)
        for m in ("none", "bias", "affine", "obspa")
    )
    assert none > bias > obspa
    assert affine > obspa
    if inputs == "pruned":  # else each layer is fitted for inputs that it will not get, and little differences may turn round
        assert bias > affine


def test_fitting_to_what_layers_get_beats_fitting_each_alone() -> None:
    for name in ("residual", "mlp", "transformer", "separable", "flatten", "decoder"):
        model, shape = network(name)
        data, held_out = batches(shape), batches(shape, seed=7, count=3)
        alone, together = (error(fixed(model, heads_and_channels, data, inputs=i), model, held_out) for i in ("dense", "pruned"))
        assert together < alone, name


def test_heads_go_as_blocks() -> None:
    model, shape = network("transformer")
    found = fixed(model, heads_and_channels, batches(shape))
    layer = next(x for x in find_layers(found.groups) if x.place.name == "wo")
    lost = layer.removed(Kept(found.groups, found.gone))[0].reshape(6, 4)
    assert lost.any(axis=1).sum() == lost.all(axis=1).sum() == 2
    assert {r.name.split("/")[0]: r.removed for r in found.layers} == {"p": 8, "u": 7}


# ------------------------------------------------------------------------------------------------ what is left alone


def nothing(groups: spa.Groups) -> np.ndarray:
    return np.zeros(groups.total, bool)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_removing_nothing_changes_nothing(name: str, inputs: str) -> None:
    model, shape = network(name)
    found = fixed(model, nothing, batches(shape, 2), inputs=inputs)
    assert (found.layers, found.changed, found.norms) == ((), frozenset(), 0)
    assert to_bytes(found.model) == to_bytes(spa.analyze(model).normal.model)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "grouped"])
def test_what_may_change_and_what_may_not(name: str, inputs: str) -> None:
    """Weights that lose columns, their constants, norms behind; names, types, shapes and the given model never."""
    model, shape = network(name)
    analysis = spa.analyze(model)
    given = to_bytes(analysis.normal.model)
    gone = heads_and_channels(analysis.groups)
    kept_gone = gone.copy()
    data = batches(shape)
    copies = [{k: v.copy() for k, v in b.items()} for b in data]
    found = repair(analysis.normal.model, analysis.groups, gone, data, RepairOptions(inputs=inputs))
    assert to_bytes(analysis.normal.model) == given
    assert (gone == kept_gone).all()
    assert all((a["x"] == b["x"]).all() for a, b in zip(data, copies, strict=True))
    old, new = weights_of(analysis.normal.model), weights_of(found.model)
    may = {
        "residual": {"w2", "w3", "w4", "b4", "om", "ov", "pm", "pv"} | {"nm", "nv"},
        "mlp": {"w2", "b2", "w3"},
        "transformer": {"wo", "bo", "w2"},
        "separable": {"w3", "w5", "nm", "nv"},
        "flatten": {"w2", "b2", "w3"},
        "decoder": {"w2", "b2", "w3", "w4", "nm", "nv"},
    }[name]
    changed = {n for n in old if old[n].tobytes() != new[n].tobytes()}
    assert changed <= may
    assert {n for n in may if n.startswith(("w", "b"))} <= changed
    assert changed <= found.changed
    added = {n: v.shape for n, v in new.items() if n not in old}
    assert added == {"mlp": {"y/bias": (5,)}, "transformer": {"u/bias": (12,)}, "separable": {"c/bias": (10,), "y/bias": (4,)},
                     "flatten": {"y/bias": (5,)}, "decoder": {"y/bias": (3,)}}.get(name, {})
    assert all(old[n].shape == new[n].shape and old[n].dtype == new[n].dtype for n in old)
    again = repair(analysis.normal.model, analysis.groups, gone, data, RepairOptions(inputs=inputs))
    assert to_bytes(again.model) == to_bytes(found.model)
    onnx.checker.check_model(to_proto(found.model), full_check=True)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_half_precision_is_fitted_in_full_and_rounded_once(kind: str, inputs: str) -> None:
    number = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[kind]
    half = onnx.helper.tensor_dtype_to_np_dtype(number)
    rng = np.random.default_rng(0)
    weights = {n: (rng.standard_normal(s) / 3).astype(half) for n, s in {"w1": (6, 12), "w": (12, 4), "b": (4,)}.items()}
    body = f"{TOKEN} m = MatMul(r, w) y = Add(m, b)"
    narrow = net(f"{kind}[200,6] x -> {kind}[200,4] y", body, **weights)
    wide = net("float[200,6] x -> float[200,4] y", body, **{n: v.astype(np.float32) for n, v in weights.items()})
    data = [{"x": b["x"].astype(half)} for b in batches((200, 6))]
    wider = [{"x": b["x"].astype(np.float32)} for b in data]
    found = weights_of(fixed(narrow, of_the_layer, data, inputs=inputs).model)
    expected = weights_of(fixed(wide, of_the_layer, wider, inputs=inputs).model)
    for name in ("w", "b", "w1"):
        assert found[name].dtype == half
        np.testing.assert_array_equal(found[name].view(np.uint16), expected[name].astype(half).view(np.uint16))
    assert (found["w"] != weights["w"]).any()


def test_a_weight_that_is_read_twice_gets_the_joint_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["spa.graph.normalize"], "SHARED", 0)
    body = "h = MatMul(x, w1) r = Relu(h) k = MatMul(x, w2) q = Sigmoid(k) a = MatMul(r, w) b = MatMul(q, w) y = Concat <axis=1> (a, b)"
    model = net("float[200,6] x -> float[200,8] y", body, w1=(6, 12), w2=(6, 12), w=(12, 4))
    data = batches((200, 6))
    values = net("float[200,6] x -> float[200,12] r, float[200,12] q", body.split(" a =")[0], w1=(6, 12), w2=(6, 12))
    for inputs in ("dense", "pruned"):
        found = fixed(model, of_the_layer, data, damping=0, inputs=inputs)
        layers = [x for x in find_layers(found.groups) if x.place.name == "w"]
        assert len(layers) == 2
        assert sum(t.name == "w" for t in to_proto(found.model).graph.initializer) == 1
        lost = layers[0].removed(Kept(found.groups, found.gone))[0]
        seen = [np.concatenate([o[n] for o in outputs_of(values, data)]).astype(np.float64) for n in "rq"]
        w = weights_of(model)["w"].astype(np.float64)
        centred = np.concatenate([v - v.mean(axis=0) for v in seen])
        best = np.linalg.lstsq(centred[:, ~lost], centred @ w, rcond=None)[0]
        np.testing.assert_allclose(weights_of(found.model)["w"][~lost], best, atol=1e-5)
        left_over = ((centred @ w - centred[:, ~lost] @ best) ** 2).mean()
        assert error(found, model, data) == pytest.approx(left_over, rel=1e-5)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_a_bias_that_others_read_stays(monkeypatch: pytest.MonkeyPatch, inputs: str) -> None:
    monkeypatch.setattr(sys.modules["spa.graph.normalize"], "SHARED", 0)
    body = "h = MatMul(x, w1) r = Relu(h) m = MatMul(r, w) a = Add(m, b) n = MatMul(x, w3) e = Mul(n, b) y = Concat <axis=1> (a, e)"
    model = net("float[200,6] x -> float[200,8] y", body, w1=(6, 12), w=(12, 4), w3=(6, 4), b=(4,))
    data = batches((200, 6))
    found = fixed(model, of_the_layer, data, damping=0, inputs=inputs)
    old, new = weights_of(model), weights_of(found.model)
    assert (new["b"] == old["b"]).all()
    assert set(new) - set(old) == {"m/bias"}
    small = outputs_of(small_of(found), data)
    for dense, pruned in zip(outputs_of(model, data), small, strict=True):
        np.testing.assert_array_equal(dense["y"][:, 4:], pruned["y"][:, 4:])
    assert error(found, model, data) < error(fixed(model, of_the_layer, data, damping=0, method="none"), model, data) / 3


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_a_channel_that_is_there_twice_goes_at_no_cost(inputs: str) -> None:
    rng = np.random.default_rng(0)
    w1, b1 = rng.standard_normal((8, 3, 1, 1)).astype(np.float32), np.zeros(8, np.float32)
    w1[6] = w1[1]
    body = "a = Conv(x, w1, b1) r = Relu(a) y = Conv <pads=[1,1,1,1]> (r, w2)"
    model = net("float[n,3,7,7] x -> float[n,4,7,7] y", body, w1=w1, b1=b1, w2=(4, 8, 3, 3))

    def sixth(groups: spa.Groups) -> np.ndarray:
        gone = np.zeros(groups.total, bool)
        gone[groups.by_name["w1:0"].start + 6] = True
        return gone

    data, held_out = batches((16, 3, 7, 7)), batches((16, 3, 7, 7), seed=7)
    found = fixed(model, sixth, data, damping=0, inputs=inputs)
    dense = np.concatenate([o["y"] for o in outputs_of(model, held_out)])
    assert error(found, model, held_out) < 1e-9 * dense.var()
    assert error(fixed(model, sixth, data, method="bias"), model, held_out) > 1e-3 * dense.var()
    old, new = weights_of(model)["w2"], weights_of(found.model)["w2"]
    np.testing.assert_allclose(new[:, 1], old[:, 1] + old[:, 6], atol=2e-3)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_what_cannot_be_repaired_is_said(inputs: str) -> None:
    body = "h = MatMul(x, w1) r = Relu(h) v = Mul(w, f) a = MatMul(r, v) b = MatMul(r, w3) y = Add(a, b)"
    model = net("float[200,6] x -> float[200,4] y", body, w1=(6, 12), w=(12, 4), f=(1, 4), w3=(12, 4))
    found = fixed(model, lambda g: gone_where(g), batches((200, 6)), inputs=inputs)
    assert [x.name.split("/")[0] for x in found.layers] == ["b"]
    assert (weights_of(found.model)["w"] == weights_of(model)["w"]).all()
    assert dict(found.skipped) == {"a": "its weights are computed from others in a way that can't be inverted"}


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_parts_of_one_stored_weight(inputs: str) -> None:
    """Query, key and value in one tensor that is split before the products: each is a layer of its own."""
    body = TOKEN + " w2, w3 = Split <axis=1> (w, s) a = MatMul(r, w2) b = MatMul(r, w3) y = Concat <axis=1> (a, b)"
    model = net("float[200,6] x -> float[200,9] y", body, w1=(6, 12), w=(12, 9), s=ints(4, 5))
    data = batches((200, 6))
    found = fixed(model, of_the_layer, data, damping=0, inputs=inputs)
    whole = net("float[200,6] x -> float[200,9] y", TOKEN + " y = MatMul(r, w)", w1=(6, 12), w=weights_of(model)["w"])
    same = fixed(whole, of_the_layer, data, damping=0, inputs=inputs)
    assert error(found, model, data) == pytest.approx(error(same, whole, data), rel=1e-5)


def test_new_biases_where_groups_are_factors() -> None:
    body = "a = Conv(x, w1) r = Relu(a) d = Conv <group=4, pads=[1,1,1,1]> (r, w2) q = Relu(d) y = Conv(q, w3)"
    model = net("float[n,3,7,7] x -> float[n,4,7,7] y", body, w1=(16, 3, 1, 1), w2=(16, 4, 3, 3), w3=(4, 16, 1, 1))
    found = fixed(model, lambda g: gone_where(g, part=0.25), batches((16, 3, 7, 7)), inputs="dense")
    assert len(found.layers) == 2


def test_options_are_checked() -> None:
    for wrong, words in (({"method": "best"}, "--repair is 'best'; the choice is: none, bias, affine, obspa"),
                         ({"inputs": "wet"}, "--repair-inputs is 'wet'"), ({"target": "moon"}, "--repair-target is 'moon'"),
                         ({"damping": -1.0}, "--damping is -1.0, but must be 0 or more"), ({"damping": float("nan")}, "--damping is nan")):
        with pytest.raises(BadOption, match=words):
            RepairOptions(**wrong)
    model, _ = network("mlp")
    with pytest.raises(BadOption, match="fewer than two rows"):
        fixed(model, heads_and_channels, [{"x": np.ones((1, 8), np.float32)}], inputs="dense")
