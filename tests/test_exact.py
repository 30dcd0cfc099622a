"""Exact rewrites of attention: found in whatever layout, equal on ONNX Runtime, refused with the cause where they are not exact."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import ints, net

import spa
from passes import drop_biases, replace_constants
from spa.errors import NothingToPrune
from spa.exact.basis import is_singular_basis, singular_basis
from spa.proof.check import difference, run
from spa.proof.feeds import draw
from spa.storage.store import load

TOKENS = "float[2,6,12] x -> float[2,6,12] y"
HALF = np.float32(0.5)
HEADS = {"split": ints(0, 0, 3, 4), "join": ints(0, 0, 12)}
FOUR = {"wq": (12, 12), "wk": (12, 12), "wv": (12, 12), "wo": (12, 12), "bq": (12,), "bk": (12,), "bv": (12,), "bo": (12,)}
PROJECT = "q0 = MatMul(x, wq) q1 = Add(q0, bq) k0 = MatMul(x, wk) k1 = Add(bk, k0) v0 = MatMul(x, wv) v1 = Add(v0, bv)"
SPLIT = " q2 = Reshape(q1, split) k2 = Reshape(k1, split) v2 = Reshape(v1, split) q = Transpose<perm=[0,2,1,3]>(q2)"
SPLIT += " k = Transpose<perm=[0,2,3,1]>(k2) v = Transpose<perm=[0,2,1,3]>(v2)"
MIX = " s0 = MatMul(q, k) s = Mul(s0, half) p = Softmax<axis=-1>(s) o = MatMul(p, v)"
OUT = " o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, join) o3 = MatMul(o2, wo) y = Add(o3, bo)"


def separate(mix: str = MIX, project: str = PROJECT, split: str = SPLIT, **more: object) -> onnx.ModelProto:
    return net(TOKENS, project + split + mix + OUT, **{"half": HALF, **HEADS, **FOUR, **more})  # type: ignore[arg-type]


def masked() -> onnx.ModelProto:
    mask = np.triu(np.full((6, 6), -1e9, np.float32), 1)
    return separate(MIX.replace("Softmax<axis=-1>(s)", "Softmax<axis=-1>(t)").replace(" p =", " t = Add(mask, s) p ="), mask=mask)


def filled() -> onnx.ModelProto:
    mix = MIX.replace("Softmax<axis=-1>(s)", "Softmax<axis=-1>(t)").replace(" p =", " t = Where(seen, s, low) p =")
    return separate(mix, seen=np.tril(np.ones((6, 6), bool)), low=np.float32(-1e30))


def fused() -> onnx.ModelProto:
    body = "f = Reshape(x, flat) a = Gemm(f, w, b) r = Reshape(a, back) q1, k1, v1 = Split<axis=2>(r)" + SPLIT + MIX
    body += " o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, flat) o3 = Gemm<transB=1>(o2, wo) y = Reshape(o3, join)"
    return net(TOKENS, body, w=(12, 36), b=(36,), wo=(12, 12), half=HALF, flat=ints(-1, 12), back=ints(2, 6, 36), split=HEADS["split"],
               join=ints(2, 6, 12))


def stacked() -> onnx.ModelProto:
    body = "a = MatMul(x, w) c = Add(a, b) r = Reshape(c, five) t = Transpose<perm=[2,0,3,1,4]>(r) q = Gather<axis=0>(t, zero)"
    body += " k0 = Gather<axis=0>(t, one) v = Gather<axis=0>(t, two) k = Transpose<perm=[0,1,3,2]>(k0)" + MIX + OUT
    return net(TOKENS, body, w=(12, 36), b=(36,), wo=(12, 12), bo=(12,), half=HALF, five=ints(2, 6, 3, 3, 4), join=HEADS["join"],
               zero=np.int64(0), one=np.int64(1), two=np.int64(2))


def transposed() -> onnx.ModelProto:
    project = PROJECT.replace("MatMul(x, wk)", "MatMul(x, tk)").replace("MatMul(x, wv)", "MatMul(x, tv)")
    return separate(project="tk = Transpose(wk) tv = Transpose(wv) " + project)


def grouped() -> onnx.ModelProto:
    """Four query heads, two of keys and values, repeated by Expand."""
    body = "q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv) k1 = Add(k0, bk) v1 = Add(v0, bv) q1 = Reshape(q0, four)"
    body += " k2 = Reshape(k1, two) v2 = Reshape(v1, two) q = Transpose<perm=[0,2,1,3]>(q1) k3 = Transpose<perm=[0,2,1,3]>(k2)"
    body += " v3 = Transpose<perm=[0,2,1,3]>(v2) k4 = Unsqueeze(k3, axis) v4 = Unsqueeze(v3, axis) k5 = Expand(k4, wide)"
    body += " v5 = Expand(v4, wide) k6 = Reshape(k5, heads) v = Reshape(v5, heads) k = Transpose<perm=[0,1,3,2]>(k6)" + MIX
    body += " o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, join) y = MatMul(o2, wo)"
    return net(TOKENS, body, wq=(12, 12), wk=(12, 6), wv=(12, 6), wo=(12, 12), bk=(6,), bv=(6,), half=HALF, four=ints(2, 6, 4, 3),
               two=ints(2, 6, 2, 3), axis=ints(2), wide=ints(2, 2, 2, 6, 3), heads=ints(2, 4, 6, 3), join=ints(2, 6, 12))


def crossed() -> onnx.ModelProto:
    project = PROJECT.replace("MatMul(x, wk)", "MatMul(z, wk)").replace("MatMul(x, wv)", "MatMul(z, wv)")
    split = SPLIT.replace("(k1, split)", "(k1, split)")
    return net("float[2,6,12] x, float[2,5,7] z -> float[2,6,12] y", project + split + MIX + OUT, half=HALF, **HEADS,
               **{**FOUR, "wk": (7, 12), "wv": (7, 12)})  # fmt: skip


def spelled() -> onnx.ModelProto:
    """Einsum throughout, with weights of three axes."""
    body = 'q = Einsum<equation="bsc,chd->bshd">(x, wq) k = Einsum<equation="bsc,chd->bhds">(x, wk) v = Einsum<equation="bsc,hdc->bhsd">'
    body += '(x, wv) s0 = Einsum<equation="bshd,bhdt->bhst">(q, k) s = Mul(s0, half) p = Softmax<axis=-1>(s)'
    body += ' o = Einsum<equation="bhst,bhtd->bshd">(p, v) y = Einsum<equation="bshd,hdc->bsc">(o, wo)'
    return net(TOKENS, body, wq=(12, 3, 4), wk=(12, 3, 4), wv=(3, 4, 12), wo=(3, 4, 12), half=HALF)


def pixels() -> onnx.ModelProto:
    """Projections by 1x1 convolutions, channels first; scores with the keys in front."""
    body = "q0 = Conv(x, wq, bq) k0 = Conv(x, wk, bk) v0 = Conv(x, wv, bv) q = Reshape(q0, heads) k1 = Reshape(k0, heads)"
    body += " v = Reshape(v0, heads) k = Transpose<perm=[0,1,3,2]>(k1) s0 = MatMul(k, q) s = Div(s0, half) p = Softmax<axis=2>(s)"
    body += " o = MatMul(v, p) o1 = Reshape(o, image) y = Conv(o1, wo)"
    kernels = {n: (*FOUR[n], 1, 1) if n[0] == "w" else FOUR[n] for n in FOUR if n != "bo"}
    return net("float[2,12,4,4] x -> float[2,12,4,4] y", body, half=HALF, heads=ints(2, 3, 4, 16), image=ints(2, 12, 4, 4), **kernels)


EVERY = [separate, masked, filled, fused, stacked, transposed, grouped, crossed, pixels]


def equal(before: onnx.ModelProto, after: spa.Model) -> float:
    given = load(before)
    feeds = draw(spa.analyze(given).groups.traced, seed=3)
    one, two = run(given, feeds, optimize=False), run(after, feeds, optimize=False)
    return max(difference(n, one[n], two[n]).relative for n in one)


def stored(model: spa.Model) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in spa.storage.store.to_proto(model).graph.initializer}


def why(model: onnx.ModelProto, **asked: object) -> str:
    with pytest.raises(NothingToPrune) as error:
        spa.rewritten(model, **asked)  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize("make", EVERY)
def test_all_rewrites_keep_the_function(make: object) -> None:
    model = make()  # type: ignore[operator]
    result = spa.rewritten(model, drop_key_bias=True, fold_value_bias=True, singular_basis=True)
    assert {s.rewrite for s in result.done} == {"key bias", "value bias", "QK basis", "VO basis"}
    assert all(s.done for s in result.steps)
    assert equal(model, result.model) < 1e-5
    again = why(spa.storage.store.to_proto(result.model), drop_key_bias=True, fold_value_bias=True, singular_basis=True)
    assert "bias" in again  # there is none left, and the bases are found again


def test_weights_of_three_axes_have_heads_too() -> None:
    result = spa.rewritten(spelled(), singular_basis=True)
    assert [(s.rewrite, s.done) for s in result.steps] == [("QK basis", 3), ("VO basis", 3)]
    assert equal(spelled(), result.model) < 1e-5


def test_biases_that_are_gone_leave_no_node() -> None:
    result = spa.rewritten(separate(), drop_key_bias=True, fold_value_bias=True)
    assert not {"bk", "bv"} & stored(result.model).keys()
    assert len(result.model.graph.nodes) == len(load(separate()).graph.nodes) - 2
    expected = stored(load(separate()))
    assert np.allclose(stored(result.model)["bo"], expected["bo"] + expected["bv"] @ expected["wo"], atol=1e-6)


def test_part_of_a_fused_bias_becomes_zero_and_the_rest_stays() -> None:
    result = spa.rewritten(fused(), drop_key_bias=True)
    before, after = stored(load(fused()))["b"], stored(result.model)["b"]
    assert not after[12:24].any()
    assert np.array_equal(np.delete(after, np.s_[12:24]), np.delete(before, np.s_[12:24]))


def test_an_output_without_a_bias_gets_one() -> None:
    result = spa.rewritten(fused(), fold_value_bias=True)
    last = [n for n in result.model.graph.nodes if n.op == "Gemm"][-1]
    before = stored(load(fused()))
    assert np.allclose(last.inputs[2].values, before["wo"] @ before["b"][24:], atol=1e-6)


def per_head(weights: dict[str, np.ndarray], head: int) -> tuple[np.ndarray, np.ndarray]:
    """QK and VO products of one head of `separate`, biases included."""
    at = slice(4 * head, 4 * head + 4)
    q, k, v = (np.vstack([weights[f"w{n}"][:, at], weights.get(f"b{n}", np.zeros(12))[None, at]]) for n in "qkv")
    return q @ k.T, v @ weights["wo"][at]


def test_ranks_are_numpys_best_approximation_of_each_head() -> None:
    result = spa.prune(separate(), qk_rank=2, vo_rank=3, seed=1)
    assert result.after.parameters < result.before.parameters
    small, dense = stored(result.model), stored(spa.rewritten(separate(), drop_key_bias=True, fold_value_bias=True).model)
    assert {n: small[f"w{n}"].shape for n in "qkvo"} == {"q": (12, 6), "k": (12, 6), "v": (12, 9), "o": (9, 12)}
    for head in range(3):
        for number, rank in enumerate((2, 3)):
            whole = per_head(dense, head)[number].astype(np.float64)
            at = slice(rank * head, rank * head + rank)
            sides = {n: np.vstack([small[f"w{n}"][:, at], small.get(f"b{n}", np.zeros(12))[None, at]]) for n in ("qk", "v")[number]}
            cut = sides["q"] @ sides["k"].T if number == 0 else sides["v"] @ small["wo"][at]
            values = np.linalg.svd(whole, compute_uv=False)
            assert np.linalg.norm(whole - cut) == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-4)


def test_the_singular_basis_is_exact_for_narrow_dead_and_weighted_matrices() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 5)), rng.standard_normal((9, 5))
    b[:, 1] = 0
    ta, tb, s = singular_basis(a, b)
    assert np.allclose(a @ ta.T @ (b @ tb.T).T, a @ b.T)
    assert np.allclose(s[:3], np.linalg.svd(a @ b.T, compute_uv=False)[:3])
    assert not s[3:].any()
    assert is_singular_basis(a @ ta.T, b @ tb.T, 1e-9)
    assert not is_singular_basis(a, b, 1e-3)
    root = np.tril(rng.standard_normal((9, 9))) + 4 * np.eye(9)
    ta, tb, _ = singular_basis(a, root.T @ b)
    assert np.allclose(a @ ta.T @ (b @ tb.T).T, a @ b.T)


def test_passes_change_only_what_differs() -> None:
    graph = load(separate()).graph
    held = {t.name: t.values for n in graph.nodes for t in n.inputs if t.name in ("wq", "bk")}
    assert replace_constants(graph, held) == 0
    assert replace_constants(graph, {"bk": np.zeros(12, np.float32)}) == 1
    assert drop_biases(graph, {"k1": None, "q1": None}) == 1
    assert drop_biases(graph, {"k1": None}) == 0
    with pytest.raises(ValueError, match="bq is float32"):
        replace_constants(graph, {"bq": np.zeros(3, np.float32)})


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float16."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return model


def test_half_precision_is_solved_in_double_proven_in_single_and_stays_half() -> None:
    half = halved(separate())
    result = spa.rewritten(half, drop_key_bias=True, fold_value_bias=True, singular_basis=True)
    assert result.check is not None
    assert result.check.worst < 1e-6
    assert stored(result.model)["wq"].dtype == np.float16
    assert equal(half, result.model) < 5e-3
    assert stored(spa.prune(half, qk_rank=2).model)["wq"].shape == (12, 6)
