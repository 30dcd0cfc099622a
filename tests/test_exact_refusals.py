"""Where exact rewrites would not be exact: nothing changes, and the sentence names node and cause."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from test_exact import FOUR, HALF, MIX, OUT, PROJECT, SPLIT, equal, separate, stored, why
from test_trace import ints, net

import spa
from spa.errors import BadOption, NothingToPrune
from spa.exact.flow import Flow, Obstacle
from spa.exact.products import products, scores_of


def rotary() -> onnx.ModelProto:
    split = SPLIT.replace("q = Transpose", "qr = Transpose") + " a, b = Split<axis=3>(qr) m = Neg(b) h = Concat<axis=3>(m, a)"
    split += " c = Mul(qr, cos) d = Mul(h, sin) q = Add(c, d)"
    angle = np.arange(6)[:, None] * np.array([1, 0.1, 1, 0.1])
    return separate(split=split, cos=np.cos(angle).astype(np.float32), sin=np.sin(angle).astype(np.float32))


def normed() -> onnx.ModelProto:
    split = SPLIT.replace("q = Transpose", "qr = Transpose") + " q = LayerNormalization<axis=-1>(qr, g)"
    return separate(split=split, g=(4,))


def mixed(before: str = "", after: str = "", **more: object) -> onnx.ModelProto:
    """`separate` with nodes before and after the softmax, from t to s and from p to u."""
    mix = " s0 = MatMul(q, k) t = Mul(s0, half)" + (before or " s = Identity(t)") + " p = Softmax<axis=-1>(s)"
    return separate(mix + (after or " u = Identity(p)") + " o = MatMul(u, v)", **more)


BOTH = {"drop_key_bias": True, "fold_value_bias": True}


@pytest.mark.parametrize("make, says", [(rotary, "Add q"), (normed, "LayerNormalization q")])
def test_nothing_may_stand_between_projection_and_product(make: object, says: str) -> None:
    model = make()  # type: ignore[operator]
    result = spa.rewritten(model, drop_key_bias=True, singular_basis=True)
    left = [s for s in result.steps if not s.done]
    assert {s.rewrite for s in left} == {"key bias", "QK basis"}
    assert all("rotary embeddings and norms" in s.why and says in s.why and s.place == "s0" for s in left)
    assert [s.rewrite for s in result.done] == ["VO basis"]
    assert equal(model, result.model) < 1e-5
    with pytest.raises(NothingToPrune, match=r"--qk-rank finds no heads that it could cut: s0: .*rotary"):
        spa.prune(model, qk_rank=2)


def test_sink_logits_hold_both_biases() -> None:
    model = mixed(" s = Concat<axis=3>(t, sink)", " u = Slice(p, from, to, axis)", sink=np.zeros((2, 3, 6, 1), np.float32),
                  axis=ints(3), **{"from": ints(0), "to": ints(6)})  # fmt: skip
    result = spa.rewritten(model, drop_key_bias=True, fold_value_bias=True, singular_basis=True)
    assert {s.rewrite: s.why for s in result.steps if not s.done} == {
        "key bias": "between the product and the softmax stands a node that a constant does not pass (Concat s)",
        "value bias": "it does not sum over whole rows of Softmax p (MatMul o)",
    }
    assert equal(model, result.model) < 1e-5


def test_shares_that_are_counted_twice_hold_the_value_bias() -> None:
    model = mixed(after=" u = Gather<axis=3>(p, twice)", twice=ints(0, 0, 1, 2, 3, 4))
    assert "does not sum over whole rows of Softmax p (MatMul o)" in why(model, fold_value_bias=True)


def test_products_over_positions_are_no_scores() -> None:
    """Attention without a softmax, keys with values first: Σ_n k_n v_nᵀ sums over positions, q times that over mixed channels."""
    model = separate(" c = MatMul(k, v) s = Mul(c, half) o = MatMul(q, s)")
    flow = Flow(spa.analyze(model).groups)
    first, second = products(flow)
    with pytest.raises(Obstacle, match=r"it takes positions together, not channels alone \(MatMul c\)"):
        scores_of(flow, first)
    with pytest.raises(Obstacle, match=r"rotary embeddings and norms do \(MatMul c\)"):
        scores_of(flow, second)
    assert "Nothing to rewrite" in why(model, singular_basis=True)


def test_heads_that_are_summed_have_no_basis_of_their_own() -> None:
    body = 'q = Einsum<equation="bsc,chd->bhsd">(x, wq) k = Einsum<equation="bsc,chd->bhds">(x, wk) v = Einsum<equation="bsc,chd->bhsd">'
    body += '(x, wv) s = MatMul(q, k) p = Softmax<axis=-1>(s) o = Einsum<equation="bhst,bhtd->bsd">(p, v) y = MatMul(o, wo)'
    model = net("float[2,6,12] x -> float[2,6,12] y", body, wq=(12, 3, 4), wk=(12, 3, 4), wv=(12, 3, 4), wo=(4, 12))
    result = spa.rewritten(model, singular_basis=True)
    assert [(s.rewrite, s.why) for s in result.steps] == [
        ("QK basis", ""), ("VO basis", "it sums over values of several heads (Einsum o)")]  # fmt: skip


def test_rows_that_become_zero_hold_the_value_bias() -> None:
    model = mixed(after=" nan = IsNaN(p) u = Where(nan, zero, p)", zero=np.float32(0))
    result = spa.rewritten(model, **BOTH)
    assert [(s.rewrite, s.why) for s in result.steps] == [
        ("key bias", ""), ("value bias", "what weighs the values need not sum to one behind it (Where u)")]  # fmt: skip


@pytest.mark.parametrize("before, says, more", [
    (" s = Tanh(t)", "Tanh s", {}), (" s = Mul(t, soft)", "Mul s", {"soft": (6, 6)}), (" z = Neg(t) s = Add(t, z)", "Neg z", {}),
    (" s = Add(t, t)", "joins scores with scores (Add s)", {}),
    (" s = Where(seen, t, low)", "not known to be minus infinity (Where s)", {"seen": np.tril(np.ones((6, 6), bool)), "low": HALF}),
])  # fmt: skip
def test_what_changes_scores_holds_the_key_bias(before: str, says: str, more: dict[str, object]) -> None:
    assert says in why(mixed(before, **more), drop_key_bias=True)


def test_a_softmax_over_queries_holds_both_biases() -> None:
    mix = MIX.replace("Softmax<axis=-1>", "Softmax<axis=2>")
    sentence = why(separate(mix), drop_key_bias=False, fold_value_bias=True)
    assert "does not sum over whole rows of Softmax p" in sentence
    result = spa.rewritten(separate(mix), drop_key_bias=True)  # there the queries' bias cancels
    assert equal(separate(mix), result.model) < 1e-5
    assert "bq" not in stored(result.model)
    assert "bk" in stored(result.model)


def test_a_softmax_over_heads_holds_the_key_bias() -> None:
    assert "does not run over the rows of one operand (MatMul s0)" in why(separate(MIX.replace("axis=-1", "axis=1")), drop_key_bias=True)


def test_channels_that_are_read_elsewhere_stay() -> None:
    model = separate()
    model.graph.output.append(onnx.helper.make_tensor_value_info("k1", 1, [2, 6, 12]))
    result = spa.rewritten(model, drop_key_bias=True, singular_basis=True)
    assert {s.rewrite: s.why for s in result.steps if not s.done} == {
        "key bias": "k1 is an output of the graph", "QK basis": "k1 is an output of the graph"}  # fmt: skip


def test_tied_weights_stay() -> None:
    tied = PROJECT.replace("MatMul(x, wk)", "MatMul(x, wq)")
    result = spa.rewritten(separate(project=tied, wq=np.tile(np.float32(0.1), (12, 12))), singular_basis=True)
    # small constants are given each reader a copy of its own, as for pruning
    assert next(s.rewrite for s in result.done) == "QK basis"
    wide = net("float[2,6,300] x -> float[2,6,300] y", PROJECT.replace("wk", "wq") + SPLIT + MIX + OUT, half=HALF, split=ints(0, 0, 3, 100),
               join=ints(0, 0, 300), **{n: tuple(25 * d for d in s) for n, s in FOUR.items() if n != "wk"})  # fmt: skip
    assert "wq is read by another node too" in why(wide, drop_key_bias=True)


def test_options_that_make_no_sense() -> None:
    with pytest.raises(BadOption, match="Which rewrite"):
        spa.rewritten(separate())
    with pytest.raises(BadOption, match="--split-mlp is 1"):
        spa.rewritten(separate(), split_mlp=1)
    for rank, says in ((0, "--qk-rank is 0, but must be"), (1.5, "must be"), (-1, "must be"), (5, "any head, which is 4: give less")):
        with pytest.raises(BadOption, match=says):
            spa.prune(separate(), qk_rank=rank)
    with pytest.raises(BadOption, match="not with --target"):
        spa.prune(separate(), qk_rank=2, target="macs=0.5")
    with pytest.raises(NothingToPrune, match="as narrow already"):
        spa.prune(separate(), qk_rank=4)
    plain = net("float[2,4] x -> float[2,5] y", "h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)", w1=(4, 8), w2=(8, 5))
    assert "has no product of queries" in why(plain, drop_key_bias=True)


HELD = {
    "Attention": (23, "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "
                      "o = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) y = MatMul(o, wo)",
                  {"wq": (16, 24), "wk": (16, 12), "wv": (16, 12)}),
    "MultiHeadAttention": (17, "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "
                               "o = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, b) y = MatMul(o, wo)",
                           {"wq": (16, 24), "wk": (16, 24), "wv": (16, 24), "b": (72,)}),
    "com.microsoft.Attention": (17, "o = com.microsoft.Attention<num_heads=4>(x, w, b) y = MatMul(o, wo)", {"w": (16, 72), "b": (72,)}),
}  # fmt: skip


@pytest.mark.parametrize("op", HELD)
def test_what_one_operator_holds_is_left_alone_with_the_cause(op: str) -> None:
    opset, body, weights = HELD[op]
    model = net("float[2,7,16] x -> float[2,7,16] y", body, opset, wo=(24, 16), **weights)
    says = f"one operator holds the whole attention ({op.rpartition('.')[2]} o); export it as single operators"
    with pytest.raises(NothingToPrune) as caught:
        spa.rewritten(model, drop_key_bias=True, fold_value_bias=True, singular_basis=True)
    assert says in str(caught.value)
    for ranks in ({"qk_rank": 2}, {"vo_rank": 0.5}):
        with pytest.raises((BadOption, NothingToPrune)) as refused:
            spa.prune(model, **ranks)
        assert says in str(refused.value)
