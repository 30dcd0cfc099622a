"""Half precision: pruned as float32 is, proven in float32, and written in its own type."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_trace import ints, net

import spa
from spa.proof.widen import widen
from spa.storage.store import to_proto

BODY = """a = MatMul(x, w1) b = Add(a, b1) r = Relu(b) s = Reshape(r, sizes) t = Transpose<perm=[0,2,1]>(s) u = Transpose<perm=[0,2,1]>(t)
  f = Reshape(u, flat) y = MatMul(f, w2)"""
KINDS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float": TensorProto.FLOAT}


def model(kind: str) -> onnx.ModelProto:
    """The same network in each type; the weights are exact in all of them."""
    dtype = helper.tensor_dtype_to_np_dtype(KINDS[kind])
    rng = np.random.default_rng(0)
    weights = {n: (rng.integers(-8, 9, s) / 8).astype(dtype) for n, s in {"w1": (4, 12), "b1": (12,), "w2": (12, 5)}.items()}
    return net(f"{kind}[2,4] x -> {kind}[2,5] y", BODY, sizes=ints(0, 3, 4), flat=ints(0, 12), **weights)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_same_channels_go(kind: str, ratio: float) -> None:
    wide, half = (spa.prune(model(k), ratio, multiple_of=1) for k in ("float", kind))
    assert half.plan.removed == wide.plan.removed
    assert half.check is not None
    assert half.check.worst < 1e-5
    arrays = [{t.name: numpy_helper.to_array(t) for t in r.to_proto().graph.initializer} for r in (wide, half)]
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        assert np.array_equal(array.astype(np.float64), arrays[1][name].astype(np.float64))
    assert {t.data_type for t in half.to_proto().graph.initializer} == {KINDS[kind], TensorProto.INT64}
    assert half.to_proto().graph.output[0].type.tensor_type.elem_type == KINDS[kind]
    assert half.before.weight_bytes < wide.before.weight_bytes
    assert half.before.macs == wide.before.macs


def test_widening_is_complete_and_leaves_the_model_alone() -> None:
    body = "c = Cast<to=10>(x) k = Constant<value = float16[2] {15360, 16384}>() e = ConstantOfShape<value = float16[1] {16896}>(two)" \
           " a = Add(c, k) b = Add(a, e) d = Cast<to=1>(b) y = Mul(d, w)"
    loaded = spa.load(net("float[2] x -> float[2] y", body, two=ints(2), w=(2,)))
    before = to_proto(loaded)
    wide, feeds = widen(loaded, {"x": np.ones(2, np.float16), "i": np.ones(1, np.int64)})
    assert to_proto(loaded) == before
    assert feeds["x"].dtype == np.float32
    assert feeds["i"].dtype == np.int64
    text = onnx.printer.to_text(to_proto(wide))
    assert "float16" not in text
    assert "to: int = 10" not in text
    assert np.allclose(spa.proof.check.run(wide, feeds)["y"], spa.proof.check.run(loaded, {"x": np.ones(2, np.float32)})["y"])


def test_a_model_without_halves_is_the_same_object() -> None:
    loaded = spa.load(model("float"))
    feeds = {"x": np.ones((2, 4), np.float32)}
    wide, given = widen(loaded, feeds)
    assert wide is loaded
    assert given is feeds
