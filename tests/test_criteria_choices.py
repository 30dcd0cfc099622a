"""From scores to choices: scaling, aggregation, one threshold for all, exchanges, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from criteria_cases import CASES, Array, Case, attention, conv, every_row, grouped, mlp, norm, scored  # noqa: F401
from repair_cases import drawn, network, outputs_of, weights_of
from test_criteria import BY_LAYER, CURVED, least_error, tensors_of
from test_criteria_gradients import Differences
from test_trace import net

import spa
from spa import criteria
from spa.criteria.views import Data
from spa.errors import BadModel, BadOption

# ------------------------------------------------------------------------------------------------ scaling, cutting, putting together

@pytest.mark.parametrize("criterion, into, out", [
    ("lamp", 0, 0), ("fpgm", 1, 1), ("bn-scale", 1, 1), ("l1", 1, 1), ("l2", 1, 1), ("random", 0, 0), ("fold", 0, 0),
    ("activation", 1, 0), ("variance", 2, 0), ("apoz", 0, 0), ("wanda", 1, 1), ("flap", 2, 2), ("amp", 1, 0),
    ("obs", 2, 2), ("obspa", 2, 2), ("obspa-greedy", 2, 2), ("obspa-prototype", 2, 2),
])  # fmt: skip
@pytest.mark.parametrize("factors", [(4, 4), (1, 4), (4, 1)])
def test_scaling(criterion: str, into: int, out: int, factors: tuple[float, float]) -> None:
    """Weights before the channels times one factor, those behind times another; where both are summed, only one for both."""
    def case(scale: tuple[float, float]) -> Case:
        return Case(mlp(scale=scale), "w1:1", (6,), (), lambda d, w: [])

    whole = criterion in ("l1", "l2", "lamp", "fpgm", "bn-scale")
    if whole and factors[0] != factors[1]:
        pytest.skip("a sum over both sides")
    power = factors[0] ** into if whole else factors[0] ** into * factors[1] ** out
    one, other = scored(case((1, 1)), criterion), scored(case(factors), criterion)
    np.testing.assert_allclose(other, one * power, rtol=1e-5)
    assert (np.argsort(one) == np.argsort(other)).all()


CUTS = [(24,), (12, 12), (7, 1, 16), (1,) * 24]


@pytest.mark.parametrize("name", ["conv", "mlp", "heads", "grouped"])
@pytest.mark.parametrize("criterion", [n for n in criteria.names() if criteria.get(n).needs not in ("", "gradients")])
def test_batches_do_not_matter(criterion: str, name: str) -> None:
    case = CASES[name]()
    found = [scored(case, criterion, case.feeds(cuts)) for cuts in CUTS]
    rtol = 3e-4 if criteria.get(criterion).needs == "covariances" else 1e-5  # the inverse: float32's rounding times a condition of 400
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=rtol)


GRADIENT_MEANS = ("taylor", "taylor-sum", "snip", "grasp", "crop")


@pytest.mark.parametrize("criterion, cuts", [
    *itertools.product([*GRADIENT_MEANS, "fisher", "entropy-taylor"], [(12, 12), (1,) * 24]),
    *itertools.product(["fisher", "entropy-taylor"], [(7, 1, 16)]),
    *((c, (7, 1, 16)) for c in GRADIENT_MEANS),
    pytest.param("synflow", (12, 12), marks=pytest.mark.xfail(strict=True, reason="R is summed over the first batch, not of one input")),
])  # fmt: skip
def test_batches_do_not_matter_to_gradients(criterion: str, cuts: tuple[int, ...]) -> None:
    pytest.importorskip("torch")
    case = CASES["mlp"]()
    whole = scored(case, criterion, case.feeds((24,)))
    np.testing.assert_allclose(scored(case, criterion, case.feeds(cuts)), whole, rtol=1e-4, atol=1e-4 * np.abs(whole).max())


PUT_TOGETHER = {"sum": np.sum, "mean": np.mean, "median": np.median, "max": np.max, "prod": np.prod}


@pytest.mark.parametrize("way", PUT_TOGETHER)
def test_aggregates(way: str) -> None:
    case = CASES["mlp"]()
    readers, (tensors, _) = case.readers(), tensors_of(case)

    def together(rows: Sequence[Array]) -> Array:
        return PUT_TOGETHER[way](np.stack(rows), axis=0)

    for criterion, by_hand in {**BY_LAYER, **CURVED}.items():
        np.testing.assert_allclose(scored(case, criterion, aggregate=way), together([by_hand(r) for r in readers]), rtol=2e-4)
    np.testing.assert_allclose(scored(case, "l1", aggregate=way), together([np.abs(t).sum(1) for t in tensors]), rtol=1e-5)
    np.testing.assert_allclose(scored(case, "l2", aggregate=way), np.sqrt(together([(t**2).sum(1) for t in tensors])), rtol=1e-5)
    distances = [np.linalg.norm(t[:, None] - t, axis=2).sum(1) for t in tensors]
    np.testing.assert_allclose(scored(case, "fpgm", aggregate=way), together(distances), rtol=1e-5)
    squares = together([(t**2).sum(1) for t in tensors])
    expected = [s / squares[squares >= s].sum() for s in squares]
    np.testing.assert_allclose(scored(case, "lamp", aggregate=way), expected, rtol=1e-5)
    made, _ = network("residual")
    w = weights_of(made)
    analysis = spa.analyze(made)
    found = spa.score(analysis.normal.model.graph, analysis.groups, "bn-scale", aggregate=way).values
    expected = together([np.abs(w["ns"]), np.abs(w["ps"])])
    np.testing.assert_allclose(found[analysis.groups.by_name["w1:0"].coordinates], expected, rtol=1e-5)


@pytest.mark.parametrize("way", PUT_TOGETHER)
def test_aggregates_of_gradients(way: str) -> None:
    pytest.importorskip("torch")
    case, d = CASES["heads"](), Differences("heads")
    rows = d.sums({n: np.abs(d.w[n] * g) for n, g in d.gradient().items()})
    found = scored(case, "taylor", case.feeds((4, 4)), aggregate=way)
    np.testing.assert_allclose(found, PUT_TOGETHER[way](np.stack(rows), axis=0), rtol=2e-3)


# ------------------------------------------------------------------------------------------------ one threshold for all

def chain() -> tuple[onnx.ModelProto, Array]:
    """Three groups of different sizes and scales."""
    body = "a = MatMul(x, w1) p = Relu(a) b = MatMul(p, w2) q = Sigmoid(b) c = MatMul(q, w3) r = Relu(c) y = MatMul(r, w4)"
    made = net("float[n,5] x -> float[n,4] y", body, w1=(5, 6), w2=(6, 15), w3=(15, 10), w4=(10, 4))
    for tensor in made.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor) * np.float32({"w1": 2, "w2": 0.5, "w3": 4, "w4": 0.3}[tensor.name])
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return made, drawn((60, 5), 3)


BY_HAND: dict[str, Callable[[Array], Array]] = {
    "none": lambda s: s, "sum": lambda s: s / s.sum(), "mean": lambda s: s / s.mean(), "max": lambda s: s / s.max(),
    "standardize": lambda s: (s - s.mean()) / s.std(),
}  # fmt: skip


def kept_by(plan: spa.Plan) -> dict[str, list[int]]:
    return {n: list(e["kept"]) for n, e in plan.groups.items()}


def below(scores: dict[str, Array], ratio: float, sizes: dict[str, int]) -> dict[str, list[int]]:
    """Group -> what stays above one threshold; the best channel always."""
    every = np.sort(np.concatenate(list(scores.values())))
    threshold = every[int(ratio * len(every)) - 1]
    found = {}
    for name, s in scores.items():
        stay = np.flatnonzero((s > threshold) | (s == s.max()))
        if len(stay) < sizes[name]:
            found[name] = [int(i) for i in stay]
    return found


@pytest.mark.parametrize("criterion", ["l2", "wanda", "obspa"])
def test_normalize(criterion: str) -> None:
    made, x = chain()
    analysis = spa.analyze(made)
    data = Data(analysis.normal.model, [{"x": x}])
    values = spa.score(analysis.normal.model.graph, analysis.groups, criterion, data=data).values
    scores = {g.name: values[g.coordinates] for g in analysis.groups.free()}
    sizes = {g.name: g.size for g in analysis.groups.free()}
    assert sorted(sizes.values()) == [6, 10, 15]
    seen = set()
    for way, by_hand in BY_HAND.items():
        plan = spa.plan(made, 0.4, criterion=criterion, scope="global", normalize=way, multiple_of=1, calibration=x)
        assert kept_by(plan) == below({n: by_hand(s) for n, s in scores.items()}, 0.4, sizes), way
        seen.add(str(kept_by(plan)))
    assert len(seen) > 2
    default = spa.plan(made, 0.4, criterion=criterion, scope="global", multiple_of=1, calibration=x)
    assert kept_by(default) == below({n: BY_HAND["mean"](s) for n, s in scores.items()}, 0.4, sizes)


@pytest.mark.parametrize("criterion", ["obs", "obspa", "obspa-greedy", "obspa-prototype"])
def test_normalize_energy(criterion: str) -> None:
    """Errors over the variance of what the layer gives."""
    made, x = chain()
    analysis = spa.analyze(made)
    data = Data(analysis.normal.model, [{"x": x}])
    proto = onnx.ModelProto()
    proto.CopyFrom(made)
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(v) for v in "bc")
    found = outputs_of(proto, [{"x": x}])[0]
    energy = {"w1:1": found["b"].var(0).sum(), "w2:1": found["c"].var(0).sum(), "w3:1": found["y"].var(0).sum()}
    graph = analysis.normal.model.graph
    plain, relative = (spa.score(graph, analysis.groups, criterion, data=data, relative=r).values for r in (False, True))
    scores = {}
    for group in analysis.groups.free():
        scores[group.name] = plain[group.coordinates] / energy[group.name]
        np.testing.assert_allclose(relative[group.coordinates], scores[group.name], rtol=1e-5)
    plan = spa.plan(made, 0.4, criterion=criterion, scope="global", normalize="energy", multiple_of=1, calibration=x)
    assert kept_by(plan) == below(scores, 0.4, {"w1:1": 6, "w2:1": 15, "w3:1": 10})


# ------------------------------------------------------------------------------------------------ exchanges

@pytest.mark.parametrize("criterion", ["random", "l2", "obspa"])
@pytest.mark.parametrize("name", ["conv", "mlp", "heads", "grouped"])
def test_swaps_never_raise_the_error(name: str, criterion: str) -> None:
    case = CASES[name]()
    readers, feeds = case.readers(), [f["x"] for f in case.feeds()]
    errors = []
    for swaps in (0, 1, 5):
        plan = spa.plan(case.model, 0.5, criterion=criterion, include=[case.group], multiple_of=1, calibration=feeds, swaps=swaps)
        kept = kept_by(plan)
        assert list(kept) == [case.group]
        gone = np.setdiff1d(np.arange(readers[0].size), kept[case.group])
        assert len(gone) == readers[0].size // 2
        errors.append(least_error(readers, list(gone)))
    assert errors[1] <= errors[0] * (1 + 1e-6)
    assert errors[2] <= errors[1] * (1 + 1e-6)
    if criterion == "random" and name in ("conv", "mlp"):
        assert errors[2] < 0.9 * errors[0]


# ------------------------------------------------------------------------------------------------ what is said and refused

NEED = [n for n in criteria.names() if criteria.get(n).needs]


def test_the_registry_is_covered() -> None:
    tested = {*BY_LAYER, *CURVED, "obspa-greedy", "lamp", "fpgm", "bn-scale", "taylor", "taylor-sum", "snip", "fisher", "grasp", "crop",
              "synflow", "entropy-taylor"}
    assert set(criteria.names()) == tested | {"l1", "l2", "random", "fold", "2ssp", "usage", "loraprune", "position", "reap"}  # elsewhere


@pytest.mark.parametrize("criterion", NEED)
def test_data_are_asked_for(criterion: str) -> None:
    with pytest.raises(BadOption, match="--calibration") as refused:
        spa.plan(mlp(), 0.3, criterion=criterion, multiple_of=1)
    text = str(refused.value)
    assert repr(criterion) in text
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text


@pytest.mark.parametrize("criterion", [n for n in criteria.names() if criteria.get(n).needs != "covariances"])
def test_energy_is_for_errors(criterion: str) -> None:
    with pytest.raises(BadOption, match="--normalize energy"):
        spa.plan(mlp(), 0.3, criterion=criterion, normalize="energy", multiple_of=1, calibration=drawn((20, 6), 0))


def test_unknown_names() -> None:
    for options, words in (({"criterion": "best"}, "no criterion 'best'; the choice is: 2ssp, activation, amp"),
                           ({"aggregate": "most"}, "--aggregate is 'most'; the choice is: sum, mean, median, max, prod"),
                           ({"normalize": "l2"}, "--normalize is 'l2'; the choice is: none, sum, mean, max, standardize, energy")):
        with pytest.raises(BadOption, match=words):
            spa.plan(mlp(), 0.3, multiple_of=1, **options)
    for wrong in ({"per": "channel"}, {"needs": "labels"}, {"aggregate": "most"}):
        with pytest.raises(BadOption, match="Criterion 'mine': per is 'group' or 'layer'"):
            spa.criterion("mine", **wrong)
    assert "mine" not in criteria.names()


LAYERED = [n for n in criteria.names() if criteria.get(n).needs in ("vectors", "projections", "usage", "covariances")]


@pytest.mark.parametrize("criterion", LAYERED)
def test_groups_that_no_layer_sums_over(criterion: str) -> None:
    """Width of queries and keys, whose product holds no weights."""
    made = attention()
    x = drawn((12, 5, 6), 0)
    plan = spa.plan(made, 0.4, criterion=criterion, multiple_of=1, calibration=x, include=["wq:1", "wv:1"])
    assert plan.notes == {"wq:1": f"was scored by l2: no layer sums over it, so {criterion} says nothing of it"}
    w = weights_of(made)
    norms = sum((w[n].reshape(6, 4, 3).astype(np.float64) ** 2).sum((0, 1)) for n in ("wq", "wk"))
    assert list(plan.groups["wq:1"]["kept"]) == [np.argmax(norms)]


@pytest.mark.parametrize("criterion", LAYERED)
def test_l2_in_place_of_a_criterion(criterion: str) -> None:
    analysis = spa.analyze(attention())
    graph, at = analysis.normal.model.graph, analysis.groups.by_name["wq:1"].coordinates
    data = Data(analysis.normal.model, [{"x": drawn((12, 5, 6), 0)}])
    found = spa.score(graph, analysis.groups, criterion, data=data)
    assert found.instead == ("wq:1",)
    np.testing.assert_allclose(found.values[at], spa.score(graph, analysis.groups, "l2").values[at], rtol=1e-6)


def test_a_layer_criterion_of_ones_own() -> None:
    @spa.criterion("spread", per="layer", needs="vectors", aggregate="max")
    def spread(layer: criteria.LayerView) -> Array:
        return layer.per_channel(layer.vectors.square - layer.vectors.mean**2) * np.abs(layer.weight).max()

    case = CASES["mlp"]()
    readers = case.readers()
    expected = np.max([r.x[0].var(0) * np.abs(r.w).max() for r in readers], axis=0)
    np.testing.assert_allclose(scored(case, "spread"), expected, rtol=1e-5)
    expected = np.sum([r.x[0].var(0) * np.abs(r.w).max() for r in readers], axis=0)
    np.testing.assert_allclose(scored(case, "spread", aggregate="sum"), expected, rtol=1e-5)
    plan = spa.plan(case.model, 0.3, criterion="spread", multiple_of=1, calibration=[f["x"] for f in case.feeds()])
    assert plan.options["criterion"] == "spread"
    assert set(range(10)) - set(plan.groups["w1:1"]["kept"]) == set(np.argsort(expected)[:3].tolist())
    with pytest.raises(BadOption, match="Criterion 'spread' looks at what channels carry"):
        spa.plan(case.model, 0.3, criterion="spread", multiple_of=1)

    @spa.criterion("poor", per="layer", needs="vectors")
    def poor(layer: criteria.LayerView) -> Array:
        return layer.per_channel(layer.vectors.mean * np.nan)

    with pytest.raises(BadModel, match="Criterion 'poor' gave NaN for group w1:1"):
        scored(case, "poor")


def test_a_criterion_sees_systems_and_the_group() -> None:
    @spa.criterion("traces", needs="covariances")
    def traces(view: criteria.GroupView) -> Array:
        return sum(np.bincount(s.of, np.diagonal(s.covariance), view.size) for layer in view.layers() for s in layer.systems)

    case = CASES["heads"]()
    [reader] = case.readers()
    expected = reader.sum(reader.statistic(lambda x: x.var(0)))
    np.testing.assert_allclose(scored(case, "traces"), expected, rtol=1e-5)
