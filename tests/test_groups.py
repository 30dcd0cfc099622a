"""Groups of small models, compared as a whole: what goes together, and what does not."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
from test_trace import free, groups_of, ints, net

IMAGE = "float[2,3,8,8] x -> float[2,5,8,8] y"
ROWS = "float[2,4] x -> float[2,5] y"
TOKENS = "float[2,7,16] x -> float[2,7,16] y"


def sites(model: onnx.ModelProto) -> dict[str, str]:
    """Free groups: name -> "size: the stored axes that they occur on"."""
    groups = groups_of(model)
    constants = groups.traced.constants
    return {g.name: f"{g.size}: " + " ".join(f"{v}:{a}" for v, a in g.sites if v in constants) for g in groups.free()}


CASES = {
    "chain": (IMAGE, "a = Conv(x, w1, b1) r = Relu(a) y = Conv(r, w2, b2)",
              {"w1": (8, 3, 1, 1), "b1": (8,), "w2": (5, 8, 1, 1), "b2": (5,)}, {"w1:0": "8: w1:0 b1:0 w2:1"}),
    "batch norm": (IMAGE, "a = Conv(x, w1) n = BatchNormalization(a, s, b, m, v) y = Conv(n, w2)",
                   {"w1": (8, 3, 1, 1), "s": (8,), "b": (8,), "m": (8,), "v": np.ones(8, np.float32), "w2": (5, 8, 1, 1)},
                   {"w1:0": "8: w1:0 s:0 b:0 m:0 v:0 w2:1"}),
    "residual": (IMAGE, "a = Conv(x, w1) b = Conv(a, w2) c = Conv(b, w3) d = Add(a, c) y = Conv(d, w4)",
                 {"w1": (8, 3, 1, 1), "w2": (6, 8, 1, 1), "w3": (8, 6, 1, 1), "w4": (5, 8, 1, 1)},
                 {"w1:0": "8: w1:0 w2:1 w3:0 w4:1", "w2:0": "6: w2:0 w3:1"}),
    "a residual with the input stays": (IMAGE, "a = Conv(x, w1) b = Conv(a, w2) c = Add(x, b) y = Conv(c, w3)",
                                        {"w1": (8, 3, 1, 1), "w2": (3, 8, 1, 1), "w3": (5, 3, 1, 1)}, {"w1:0": "8: w1:0 w2:1"}),
    "concat": (IMAGE, "a = Conv(x, w1) b = Conv(x, w2) c = Concat<axis=1>(a, b) y = Conv(c, w3)",
               {"w1": (8, 3, 1, 1), "w2": (6, 3, 1, 1), "w3": (5, 14, 1, 1)}, {"w1:0": "8: w1:0 w3:1", "w2:0": "6: w2:0 w3:1"}),
    "split": (ROWS, "a = MatMul(x, w1) b, c = Split<axis=1>(a, s) d = MatMul(b, w2) e = MatMul(c, w3) y = Add(d, e)",
              {"w1": (4, 10), "s": ints(4, 6), "w2": (4, 5), "w3": (6, 5)}, {"w1:1": "4: w1:1 w2:0", "w1:1#2": "6: w1:1 w3:0"}),
    "halves that meet": (ROWS, "a = MatMul(x, w1) b, c = Split<axis=1>(a, s) g = Sigmoid(b) d = Mul(g, c) y = MatMul(d, w2)",
                         {"w1": (4, 12), "s": ints(6, 6), "w2": (6, 5)}, {"w1:1": "6: w1:1 w2:0"}),
    "flatten": ("float[2,3,4,4] x -> float[2,5] y", "a = Conv(x, w1, b1) f = Flatten(a) y = Gemm<transB=1>(f, w2)",
                {"w1": (8, 3, 1, 1), "b1": (8,), "w2": (5, 128)}, {"w1:0": "8: w1:0 b1:0 w2:1"}),
    "depthwise": (IMAGE, "a = Conv(x, w1) b = Conv<group=8>(a, w2) y = Conv(b, w3)",
                  {"w1": (8, 3, 1, 1), "w2": (8, 1, 1, 1), "w3": (5, 8, 1, 1)}, {"w1:0": "8: w1:0 w2:0 w3:1"}),
    "grouped": (IMAGE, "a = Conv(x, w1) b = Conv<group=2>(a, w2) y = Conv(b, w3)",
                {"w1": (8, 3, 1, 1), "w2": (12, 4, 1, 1), "w3": (5, 12, 1, 1)},
                {"w1:0": "2: w1:0 w2:0 w3:1", "w1:0#2": "4: w1:0 w2:1", "w2:0": "6: w2:0 w3:1"}),
    "small shared bias": (IMAGE, "a = Conv(x, w1, b) c = Conv(a, w2, b) y = Conv(c, w3)",
                          {"w1": (8, 3, 1, 1), "b": (8,), "w2": (8, 8, 1, 1), "w3": (5, 8, 1, 1)},
                          {"w1:0": "8: w1:0 b:0 w2:1", "w2:0": "8: w2:0 b/copy1:0 w3:1"}),
    "PRelu": (IMAGE, "a = Conv(x, w1) p = PRelu(a, s) y = Conv(p, w2)", {"w1": (8, 3, 1, 1), "s": (8, 1, 1), "w2": (5, 8, 1, 1)},
              {"w1:0": "8: w1:0 s:0 w2:1"}),
    "PRelu of one number": (IMAGE, "a = Conv(x, w1) p = PRelu(a, s) y = Conv(p, w2)",
                            {"w1": (8, 3, 1, 1), "s": (1, 1, 1), "w2": (5, 8, 1, 1)}, {"w1:0": "8: w1:0 w2:1"}),
    "LSTM": ("float[6,2,4] x -> float[6,2,5] y",
             "o, h, c = LSTM<hidden_size=8>(x, w, r, b) s = Squeeze(o, one) y = MatMul(s, w2)",
             {"w": (1, 32, 4), "r": (1, 32, 8), "b": (1, 64), "one": ints(1), "w2": (8, 5)}, {"w:1#2": "8: w:1 r:1 r:2 b:1 w2:0"}),
}


@pytest.mark.parametrize("case", CASES)
def test_small_models(case: str) -> None:
    values, body, weights, expected = CASES[case]
    assert sites(net(values, body, **weights)) == expected


TIED = "e = Gather(t, x) h = MatMul(e, w1) r = Relu(h) z = MatMul(r, w2) u = Transpose(t) y = MatMul(z, u)"


def tied() -> onnx.ModelProto:
    return net("int64[2,7] x -> float[2,7,50] y", TIED, t=(50, 16), w1=(16, 8), w2=(8, 16))


def test_an_embedding_that_is_the_head_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["spa.graph.normalize"], "SHARED", 100)  # the name spa.normalize is the function
    assert sites(tied()) == {"t:1": "16: t:1 w1:0 w2:1", "w1:1": "8: w1:1 w2:0"}


def test_a_small_table_read_twice_is_two_tables() -> None:
    assert sites(tied()) == {"t:1": "16: t:1 w1:0", "w1:1": "8: w1:1 w2:0", "w2:1": "16: w2:1 t/copy1:1"}


HEADS = """
 q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
 q1 = Reshape(q0, s) k1 = Reshape(k0, s) v1 = Reshape(v0, s)
 q = Transpose<perm=[0,2,1,3]>(q1) k = Transpose<perm=[0,2,3,1]>(k1) v = Transpose<perm=[0,2,1,3]>(v1)
 a = MatMul(q, k) p = Softmax(a) o = MatMul(p, v)
 t = Transpose<perm=[0,2,1,3]>(o) m = Reshape(t, f) y = MatMul(m, wo)"""


def attention() -> onnx.ModelProto:
    return net(TOKENS, HEADS, wq=(16, 24), wk=(16, 24), wv=(16, 24), wo=(24, 16), s=ints(0, 0, 4, 6), f=ints(0, 0, 24))


def test_heads_their_width_and_the_values_width() -> None:
    assert sites(attention()) == {
        "wq:1": "6: wq:1 wk:1",
        "wq:1#2": "4: wq:1 wk:1 wv:1 wo:0",
        "wv:1": "6: wv:1 wo:0",
    }


def test_factors_of_a_product_are_a_family() -> None:
    groups = groups_of(attention())
    width, heads, values = (groups.by_name[n].index for n in ("wq:1", "wq:1#2", "wv:1"))
    assert groups.families.has_edge(heads, width)
    assert groups.families.has_edge(heads, values)
    assert not groups.families.has_edge(width, values)


GQA = """
 q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
 q1 = Reshape(q0, s) q = Transpose<perm=[0,2,1,3]>(q1)
 k1 = Reshape(k0, kv) k2 = Transpose<perm=[0,2,1,3]>(k1) k3 = Unsqueeze(k2, two) k4 = Expand(k3, e) k5 = Reshape(k4, r)
 k = Transpose<perm=[0,1,3,2]>(k5)
 v1 = Reshape(v0, kv) v2 = Transpose<perm=[0,2,1,3]>(v1) v3 = Unsqueeze(v2, two) v4 = Expand(v3, e) v = Reshape(v4, r)
 a = MatMul(q, k) p = Softmax(a) o = MatMul(p, v) t = Transpose<perm=[0,2,1,3]>(o) m = Reshape(t, f) y = MatMul(m, wo)"""


def grouped_queries() -> onnx.ModelProto:
    return net(TOKENS, GQA, wq=(16, 24), wk=(16, 8), wv=(16, 8), wo=(24, 16), s=ints(0, 0, 6, 4), kv=ints(0, 0, 2, 4), two=ints(2),
               e=ints(2, 2, 3, 7, 4), r=ints(0, 6, 7, 4), f=ints(0, 0, 24))


def test_queries_that_share_keys() -> None:
    assert sites(grouped_queries()) == {
        "wq:1": "3: wq:1 wo:0",
        "wq:1#2": "2: wq:1 wk:1 wv:1 wo:0",
        "wq:1#3": "4: wq:1 wk:1",
        "wv:1": "4: wv:1 wo:0",
    }


def test_names_and_costs() -> None:
    """Coordinates follow each other in graph order; a channel costs its own weights and the multiplications that use them."""
    groups = groups_of(net(IMAGE, *[CASES["chain"][1]], **CASES["chain"][2]))
    group = groups.by_name["w1:0"]
    assert group.parameters == 3 + 1 + 5
    assert group.macs == 2 * 64 * (3 + 5)
    assert [g.start for g in groups.groups] == np.cumsum([0, *(g.size for g in groups.groups)]).tolist()[:-1]
    assert groups.total == sum(g.size for g in groups.groups)
    assert len(groups.by_name) == len(groups.groups)
    assert groups.of_coordinate()[group.coordinates].tolist() == [group.index] * 8


def test_a_group_of_one_and_one_without_weights_stay() -> None:
    model = net(IMAGE, "a = Conv(x, w1) y = Conv(a, w2)", w1=(1, 3, 1, 1), w2=(5, 1, 1, 1))
    assert free(model) == {}
    assert "w1:0" not in groups_of(model).by_name


def test_positions_that_stay() -> None:
    groups = groups_of(net(*CASES["grouped"][:2], **CASES["grouped"][2]))
    gone = np.zeros(groups.total, bool)
    assert groups.keep(("a", 1), gone) is None
    inner = groups.by_name["w1:0#2"]
    gone[inner.start + 1] = True
    keep = groups.keep(("a", 1), gone)
    assert keep is not None
    assert keep.tolist() == [True, False, True, True] * 2
    keep = groups.keep(("w2", 1), gone)
    assert keep is not None
    assert keep.tolist() == [True, False, True, True]
    assert groups.keep(("w2", 0), gone) is None
    outer = groups.by_name["w1:0"]
    gone[outer.start] = True
    keep = groups.keep(("a", 1), gone)
    assert keep is not None
    assert keep.tolist() == [False] * 4 + [True, False, True, True]
