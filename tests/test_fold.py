"""Folding: exact where channels are duplicates, better than dropping where they nearly are, and nothing else touched."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime import InferenceSession
from test_trace import ints, net

import spa
from spa.api import Analysis
from spa.criteria import Slice
from spa.criteria.folding import distances, ward
from spa.plans.plan import mask_of
from spa.plans.rewrite import rewrite
from spa.proof.check import session
from spa.repairs.fold import Folded, fold, merged_variance
from spa.storage.store import Model, to_proto, with_graph

IMAGE = "float[2,3,8,8] x -> float[2,5] y"


def norm(name: str, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(name) + size)
    return {f"{name}s": rng.uniform(0.5, 2, size).astype(np.float32), f"{name}b": rng.standard_normal(size).astype(np.float32),
            f"{name}m": rng.standard_normal(size).astype(np.float32), f"{name}v": rng.uniform(0.5, 2, size).astype(np.float32)}


def convs() -> onnx.ModelProto:
    body = "a = Conv<pads=[1,1,1,1]>(x, w1, b1) n = BatchNormalization(a, ns, nb, nm, nv) r = Relu(n) c = Conv(r, w2)"
    body += " o = BatchNormalization(c, os, ob, om, ov) s = Relu(o) p = GlobalAveragePool(s) f = Flatten(p) y = Gemm<transB=1>(f, w3, b3)"
    return net(IMAGE, body, w1=(8, 3, 3, 3), b1=(8,), w2=(12, 8, 3, 3), w3=(5, 12), b3=(5,), **norm("n", 8), **norm("o", 12))


def residual() -> onnx.ModelProto:
    body = "a = Conv<pads=[1,1,1,1]>(x, w1, b1) c = Conv<pads=[1,1,1,1]>(a, w2) n = BatchNormalization(c, ns, nb, nm, nv) r = Relu(n)"
    body += " d = Conv<pads=[1,1,1,1]>(r, w3) e = Add(a, d) s = Relu(e) g = Conv<pads=[1,1,1,1]>(s, w4) t = Add(e, g)"
    body += " f = Flatten(t) y = Gemm<transB=1>(f, w5)"
    return net(IMAGE, body, w1=(8, 3, 3, 3), b1=(8,), w2=(6, 8, 3, 3), w3=(8, 6, 3, 3), w4=(8, 8, 3, 3), w5=(5, 512), **norm("n", 6))


def perceptron() -> onnx.ModelProto:
    body = "a = Gemm<alpha=0.5>(x, w1, b1) r = Gelu(a) h = MatMul(r, w2) k = Add(h, b2) s = Tanh(k) t = Transpose<perm=[1,0]>(w3)"
    body += " m = MatMul(s, t) q = PRelu(m, slope) y = MatMul(q, w4)"
    return net("float[7,6] x -> float[7,5] y", body, opset=20, w1=(6, 8), b1=(8,), w2=(8, 10), b2=(10,), w3=(12, 10), slope=(12,),
               w4=(12, 5))


def depthwise() -> onnx.ModelProto:
    body = "a = Conv(x, w1) n = BatchNormalization(a, ns, nb, nm, nv) r = Clip(n, lo, hi) d = Conv<group=8,pads=[1,1,1,1]>(r, w2, b2)"
    body += " o = BatchNormalization(d, os, ob, om, ov) s = Relu(o) c = Conv(s, w3) f = Flatten(c) y = Gemm(f, w4)"
    return net(IMAGE, body, w1=(8, 3, 1, 1), w2=(8, 1, 3, 3), b2=(8,), w3=(6, 8, 1, 1), w4=(384, 5), **norm("n", 8), **norm("o", 8),
               lo=np.float32(0), hi=np.float32(6))


def grouped() -> onnx.ModelProto:
    body = "a = Conv(x, w1) r = Relu(a) g = Conv<group=4>(r, w2, b2) n = BatchNormalization(g, ns, nb, nm, nv) s = Relu(n)"
    body += " c = Conv(s, w3) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, w4)"
    return net(IMAGE, body, w1=(16, 3, 1, 1), w2=(24, 4, 3, 3), b2=(24,), w3=(6, 24, 1, 1), w4=(6, 5), **norm("n", 24))


def flat() -> onnx.ModelProto:
    body = "a = Conv(x, w1, b1) r = Relu(a) p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(r) f = Flatten(p) h = Gemm<transB=1>(f, w2, b2)"
    body += " s = Relu(h) y = Gemm<transB=1>(s, w3)"
    return net(IMAGE, body, w1=(8, 3, 1, 1), b1=(8,), w2=(10, 128), b2=(10,), w3=(5, 10))


def concat() -> onnx.ModelProto:
    body = "a = Conv(x, w1) b = Conv(x, w2) r = Relu(b) c = Concat<axis=1>(a, r) n = BatchNormalization(c, ns, nb, nm, nv) s = Relu(n)"
    body += " d = Conv(s, w3) e = Concat<axis=1>(c, d) f = Flatten(e) y = Gemm(f, w4)"
    return net(IMAGE, body, w1=(6, 3, 1, 1), w2=(8, 3, 1, 1), w3=(6, 14, 1, 1), w4=(1280, 5), **norm("n", 14))


def transposed() -> onnx.ModelProto:
    body = "a = ConvTranspose<strides=[2,2]>(x, w1, b1) r = Relu(a) b = ConvTranspose<group=2>(r, w2) f = Flatten(b) y = Gemm(f, w3)"
    return net(IMAGE, body, w1=(3, 8, 2, 2), b1=(8,), w2=(8, 3, 1, 1), w3=(1536, 5))


def shuffle() -> onnx.ModelProto:
    body = "a = Conv(x, w1) n = BatchNormalization(a, ns, nb, nm, nv) r = Relu(n) b = Reshape(r, s) t = Transpose<perm=[0,2,1,3,4]>(b)"
    body += " c = Reshape(t, e) p, q = Split<axis=1>(c, half) d = Conv(p, w2) f = Conv(q, w3) g = Add(d, f) h = Flatten(g) y = Gemm(h, w4)"
    return net(IMAGE, body, w1=(16, 3, 1, 1), w2=(6, 8, 1, 1), w3=(6, 8, 1, 1), w4=(384, 5), **norm("n", 16), s=ints(0, 2, 8, 8, 8),
               e=ints(0, 16, 8, 8), half=ints(8, 8))


def heads() -> onnx.ModelProto:
    body = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) qs = Reshape(q, s) ks = Reshape(k, s) vs = Reshape(v, s)"
    body += " qt = Transpose<perm=[0,2,1,3]>(qs) kt = Transpose<perm=[0,2,3,1]>(ks) vt = Transpose<perm=[0,2,1,3]>(vs)"
    body += " z = MatMul(qt, kt) p = Softmax(z) o = MatMul(p, vt) ot = Transpose<perm=[0,2,1,3]>(o) c = Reshape(ot, e) y = MatMul(c, wo)"
    return net("float[2,7,6] x -> float[2,7,6] y", body, wq=(6, 24), wk=(6, 24), wv=(6, 24), wo=(24, 6), s=ints(0, 0, 4, 6),
               e=ints(0, 0, 24))


TOPOLOGIES = [convs, residual, perceptron, depthwise, grouped, flat, concat, transposed, shuffle, heads]


def duplicated(made: onnx.ModelProto, noise: float = 0.0) -> tuple[onnx.ModelProto, np.ndarray]:
    """The model with every second coordinate of each group a copy of the one before, and the mask of the copies."""
    analysis = spa.analyze(made)
    groups = analysis.groups
    model = onnx.ModelProto.FromString(made.SerializeToString())
    tensors = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    gone = np.zeros(groups.total, bool)
    rng = np.random.default_rng(0)
    for group in groups.free():
        gone[group.start + 1 : group.start + group.size : 2] = True
        for value, axis in group.sites:
            if value not in tensors or tensors[value].dtype != np.float32:
                continue
            labels, cube = groups.labels[value, axis], np.moveaxis(tensors[value], axis, 0)
            for c in range(group.start + 1, group.start + group.size, 2):
                before, here = ((labels == x).any(axis=1) for x in (c, c + 1))
                cube[here] = cube[before]
                if cube.ndim > 1:
                    cube[here] *= 1 + noise * rng.standard_normal(cube[here].shape).astype(np.float32)
    for t in model.graph.initializer:
        t.CopyFrom(numpy_helper.from_array(tensors[t.name], t.name))
    return model, gone


def outputs(model: Model, seed: int = 0) -> np.ndarray:
    runner = session(model)
    rng = np.random.default_rng(seed)
    feeds = {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in runner.get_inputs()}
    return np.asarray(runner.run(None, feeds)[0])


def cut(analysis: Analysis, model: Model, gone: np.ndarray) -> Model:
    return with_graph(analysis.normal.model, rewrite(model.graph, analysis.groups, gone))


def folded(made: onnx.ModelProto, gone: np.ndarray, **options: bool) -> tuple[Analysis, Folded]:
    analysis = spa.analyze(made)
    return analysis, fold(analysis.normal.model, analysis.groups, gone, **options)


def mask(made: onnx.ModelProto, group: str, *coordinates: int) -> np.ndarray:
    groups = spa.analyze(made).groups
    gone = np.zeros(groups.total, bool)
    gone[groups.by_name[group].start + np.array(coordinates, int)] = True
    return gone


def without_products(analysis: Analysis, gone: np.ndarray) -> np.ndarray:
    """One factor of a product at a time: the other one stays whole, as plans have it."""
    found = gone.copy()
    for one, two in analysis.groups.families.edges:
        other = analysis.groups.groups[max(one, two)]
        if gone[analysis.groups.groups[min(one, two)].coordinates].any():
            found[other.coordinates] = False
    return found


@pytest.mark.parametrize("variance", [True, False])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda f: f.__name__)
def test_duplicates_change_nothing(topology, variance: bool) -> None:
    made, gone = duplicated(topology())
    analysis, found = folded(made, gone, variance=variance)
    for group in analysis.groups.free():
        if group.name in found.skipped:
            gone[group.coordinates] = False
    assert found.merged
    assert gone.any()
    dense = outputs(analysis.given)
    for which in (gone, without_products(analysis, gone)):
        analysis, found = folded(made, which, variance=variance)
        assert not found.skipped
        small = outputs(cut(analysis, found.model, which))
        np.testing.assert_allclose(small, dense, atol=2e-5 * np.abs(dense).max())
        dropped = outputs(cut(analysis, analysis.normal.model, which))
        assert np.abs(dropped - dense).max() > 1e-3 * np.abs(dense).max()


@pytest.mark.parametrize("topology", [convs, residual, perceptron, depthwise, flat, concat], ids=lambda f: f.__name__)
def test_better_than_dropping_where_channels_are_similar(topology) -> None:
    made, _ = duplicated(topology(), noise=0.1)
    analysis = spa.analyze(made)
    plan = spa.plan(analysis, 0.5, criterion="fold", multiple_of=1)
    gone = np.asarray(mask_of(plan, analysis.groups))
    merged = fold(analysis.normal.model, analysis.groups, gone)
    assert not merged.skipped
    errors = []
    for model in (merged.model, analysis.normal.model):
        small = cut(analysis, model, gone)
        errors.append(np.mean([np.square(outputs(small, seed) - outputs(analysis.given, seed)).mean() for seed in range(8)]))
    assert errors[0] < 0.3 * errors[1]


def test_nothing_else_is_changed() -> None:
    """Names, types, nodes and what goes stay; so does what nothing is merged into, bit by bit. The input is not touched."""
    made = convs()
    analysis = spa.analyze(made)
    gone = mask(made, "w1:0", 3)
    before = to_proto(analysis.normal.model).SerializeToString(deterministic=True)
    found = fold(analysis.normal.model, analysis.groups, gone)
    assert to_proto(analysis.normal.model).SerializeToString(deterministic=True) == before
    assert found.changed == {"w1", "b1", "ns", "nb", "nm", "nv", "w2"}
    assert found.variances == 1
    ((kept, lost),) = found.merged["w1:0"].items()
    assert lost == [3]
    was, now = (to_proto(m).graph for m in (analysis.normal.model, found.model))
    assert [n.SerializeToString() for n in was.node] == [n.SerializeToString() for n in now.node]
    held = [[(t.name, t.data_type, tuple(t.dims)) for t in g.initializer] for g in (was, now)]
    assert held[0] == held[1]
    old, new = ({t.name: numpy_helper.to_array(t) for t in g.initializer} for g in (was, now))
    for name in old:
        axis = 1 if name == "w2" else 0
        rest = np.arange(old[name].shape[axis]) != kept if name in found.changed else np.arange(old[name].shape[axis]) >= 0
        assert np.array_equal(np.compress(rest, old[name], axis), np.compress(rest, new[name], axis)), name
    both = [kept, 3]
    for name in ("w1", "b1", "ns", "nb", "nm"):
        np.testing.assert_allclose(new[name][kept], old[name][both].mean(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(new["w2"][:, kept], old["w2"][:, both].sum(axis=1), rtol=1e-5, atol=1e-7)
    one, two = (old["w1"][c].ravel() / np.linalg.norm(old["w1"][c]) for c in both)
    s, t = np.sqrt(old["nv"][both])
    np.testing.assert_allclose(new["nv"][kept], (s**2 + t**2 + 2 * s * t * (one @ two)) / 4, rtol=1e-5)
    plain = fold(analysis.normal.model, analysis.groups, gone, variance=False)
    values = {t.name: numpy_helper.to_array(t) for t in to_proto(plain.model).graph.initializer}
    np.testing.assert_allclose(values["nv"][kept], old["nv"][both].mean(), rtol=1e-5)


def test_half_precision() -> None:
    w = {n: np.random.default_rng(i).standard_normal(s).astype(np.float16) for i, (n, s) in enumerate({"w1": (4, 8), "w2": (8, 5)}.items())}
    made = net("float16[2,4] x -> float16[2,5] y", "h = MatMul(x, w1) y = MatMul(h, w2)", **w)
    _, found = folded(made, mask(made, "w1:1", 1, 3, 5, 7))
    assert {t.name: t.data_type for t in to_proto(found.model).graph.initializer} == dict.fromkeys(("w1", "w2"), onnx.TensorProto.FLOAT16)
    assert found.changed == {"w1", "w2"}


def test_nothing_gone_is_nothing_folded() -> None:
    analysis = spa.analyze(convs())
    found = fold(analysis.normal.model, analysis.groups, np.zeros(analysis.groups.total, bool))
    assert (found.changed, found.merged, found.skipped, found.variances) == (frozenset(), {}, {}, 0)


def test_each_goes_to_the_nearest_that_stays() -> None:
    w1 = np.array([[1.0, 0], [0, 1], [0.9, 0], [0, 1.2]], np.float32)
    made = net("float[3,2] x -> float[3,5] y", "h = Gemm<transB=1>(x, w1) y = Gemm(h, w2)", w1=w1, w2=np.ones((4, 5), np.float32))
    _, found = folded(made, mask(made, "w1:0", 2, 3))
    assert found.merged == {"w1:0": {0: [2], 1: [3]}}


def test_what_cannot_be_folded_says_why() -> None:
    made = heads()
    analysis = spa.analyze(made)
    group = next(g for g in analysis.groups.free() if {v for v, _ in g.sites} >= {"wq", "wk"} and "wv" not in {v for v, _ in g.sites})
    gone = np.zeros(analysis.groups.total, bool)
    gone[group.start] = True
    found = fold(analysis.normal.model, analysis.groups, gone)
    assert found.changed == frozenset()
    assert list(found.skipped) == [group.name]
    assert found.skipped[group.name].startswith("is summed over at ")
    body = "e = Gather(w, i) r = Relu(e) t = Transpose<perm=[1,0]>(w) y = MatMul(r, t)"
    tied = net("int64[2,7] i -> float[2,7,9000] y", body, w=(9000, 8))
    _, found = folded(tied, mask(tied, "w:1", 0))
    assert list(found.skipped.values()) == ["is both summed over and passed on in w"]


def test_recurrent_layers_are_left() -> None:
    body = "a, h, c = LSTM<hidden_size=4>(x, w, r) s = Squeeze(a, one) y = MatMul(s, w2)"
    made = net("float[5,2,3] x -> float[5,2,6] y", body, w=(1, 16, 3), r=(1, 16, 4), w2=(4, 6), one=ints(1))
    analysis = spa.analyze(made)
    assert analysis.groups.free()
    gone = np.zeros(analysis.groups.total, bool)
    gone[analysis.groups.free()[0].start] = True
    assert not fold(analysis.normal.model, analysis.groups, gone).merged


# ------------------------------------------------------------------ Ward's order


def by_hand(points: np.ndarray) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Ward's method from the definition: all pairs, the increase of Σ ‖x − mean‖²; the clusters after each step."""
    clusters, representative = [[i] for i in range(len(points))], list(range(len(points)))
    steps, history = np.full(len(points), float(len(points))), []

    def inside(members: list[int]) -> float:
        return float(np.square(points[members] - points[members].mean(axis=0)).sum())

    for step in range(1, len(points)):
        pairs = [(inside(clusters[a] + clusters[b]) - inside(clusters[a]) - inside(clusters[b]), a, b)
                 for a in range(len(clusters)) for b in range(a + 1, len(clusters))]
        _, a, b = min(pairs)
        both = clusters[a] + clusters[b]
        apart = [float(np.square(points[representative[c]] - points[both].mean(axis=0)).sum()) for c in (a, b)]
        tie = abs(apart[0] - apart[1]) < 1e-9  # the halves of a pair are as near as each other
        winner, loser = (a, b) if (representative[a] < representative[b] if tie else apart[0] < apart[1]) else (b, a)
        steps[representative[loser]] = step
        clusters[winner] = both
        del clusters[loser], representative[loser]
        history.append([sorted(c) for c in clusters])
    return steps, history


@pytest.mark.parametrize("seed", range(20))
def test_ward_against_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((int(rng.integers(2, 14)), int(rng.integers(1, 5))))
    squared = np.square(points[:, None] - points).sum(axis=-1)
    expected, history = by_hand(points)
    found = ward(squared)
    assert np.array_equal(found, expected)
    for k, clusters in enumerate(history, 1):
        stay = set(np.flatnonzero(found > k))
        assert all(len(stay & set(c)) == 1 for c in clusters)


def test_ward_of_duplicates_and_of_little() -> None:
    points = np.repeat(np.random.default_rng(0).standard_normal((5, 3)), 2, axis=0)
    found = ward(np.square(points[:, None] - points).sum(axis=-1))
    assert {int(c) // 2 for c in np.flatnonzero(found > 5)} == set(range(5))
    assert np.array_equal(ward(np.zeros((1, 1))), [1])
    assert ward(np.zeros((0, 0))).shape == (0,)
    assert np.array_equal(np.sort(ward(np.zeros((6, 6)))), np.arange(1, 7))
    assert np.isnan(ward(np.array([[0, np.nan], [np.nan, 0]]))).all()


def test_distances_weigh_matrices_alike_and_vectors_as_one_column(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((7, 30)) * 1000, rng.standard_normal((7, 4)), rng.standard_normal((7, 1)), np.zeros((7, 2))]
    slices = [Slice(f"w{i}", 0, i != 2, False, r.astype(np.float32)) for i, r in enumerate(rows)]
    whole = np.concatenate([r / np.linalg.norm(r) * (1 if i < 2 else 1 / np.sqrt(30)) for i, r in enumerate(rows[:3])], axis=1)
    expected = np.square(whole[:, None] - whole).sum(axis=-1)
    np.testing.assert_allclose(distances(slices, 7), expected, rtol=1e-5, atol=1e-8)
    monkeypatch.setattr("spa.criteria.folding.COLUMNS", 21)
    np.testing.assert_allclose(distances(slices, 7), expected, rtol=1e-5, atol=1e-8)


def test_the_criterion() -> None:
    made, _ = duplicated(convs())
    analysis = spa.analyze(made)
    found = spa.score(analysis.normal.model.graph, analysis.groups, "fold").values
    for group in analysis.groups.free():
        scores = found[group.coordinates]
        assert np.array_equal(np.sort(scores), np.arange(1, group.size + 1))
        first = np.flatnonzero(scores <= group.size // 2)
        assert len({int(c) // 2 for c in first}) == group.size // 2


# ------------------------------------------------------------------ variances


def test_variance_of_a_mean_against_sampling() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 20)) * rng.uniform(0.5, 2, (6, 1))
    weight[3] += 2 * weight[1]
    z = rng.standard_normal((200_000, 20)) @ weight.T
    target = np.array([0, 1, 1, 1, 0, 5])
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    found = merged_variance(z.var(axis=0), unit, target)
    for kept in (0, 1, 5):
        np.testing.assert_allclose(found[kept], z[:, target == kept].mean(axis=1).var(), rtol=0.02)
    equal = np.full((3, 3), 0.3) + 0.7 * np.eye(3)
    same = merged_variance(np.full(3, 2.0), np.linalg.cholesky(equal), np.zeros(3, int))
    np.testing.assert_allclose(same[0], 2 * (1 / 3 + 2 / 3 * 0.3))


def test_normalised_outputs_keep_their_variance() -> None:
    """On white inputs, what comes out of the norm behind a merged convolution varies as much as before; without correction, less."""
    body = "a = Conv(x, w1) n = BatchNormalization(a, ns, nb, nm, nv) y = Conv(n, w2)"
    weights = {"w1": np.random.default_rng(0).standard_normal((8, 6, 3, 3)).astype(np.float32)}
    variance = np.square(weights["w1"]).sum(axis=(1, 2, 3))
    made = net("float[64,6,8,8] x -> float[64,5,6,6] y", body, **weights, w2=(5, 8, 1, 1), ns=np.ones(8, np.float32),
               nb=np.zeros(8, np.float32), nm=np.zeros(8, np.float32), nv=variance)
    gone = mask(made, "w1:0", 1, 3, 5, 7)
    found = {}
    for corrected in (True, False):
        analysis, result = folded(made, gone, variance=corrected)
        proto = to_proto(cut(analysis, result.model, gone))
        proto.graph.output.append(onnx.helper.make_tensor_value_info("n", 1, None))
        runner = InferenceSession(proto.SerializeToString())
        n = runner.run(["n"], {"x": np.random.default_rng(1).standard_normal((64, 6, 8, 8)).astype(np.float32)})[0]
        found[corrected] = n.var(axis=(0, 2, 3)).mean()
    assert found[True] == pytest.approx(1, abs=0.05)
    assert found[False] < 0.8


def test_dead_rows_keep_their_variance() -> None:
    body = "a = Conv(x, w1) n = BatchNormalization(a, ns, nb, nm, nv) y = Conv(n, w2)"
    made = net("float[2,3,8,8] x -> float[2,5,8,8] y", body, w1=np.zeros((4, 3, 1, 1), np.float32), w2=(5, 4, 1, 1),
               **{**norm("n", 4), "nv": np.full(4, 0.25, np.float32)})
    _, found = folded(made, mask(made, "w1:0", 1, 2, 3))
    values = {t.name: numpy_helper.to_array(t) for t in to_proto(found.model).graph.initializer}
    assert values["nv"][0] == 0.25
