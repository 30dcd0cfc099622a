"""Choosing: how many channels go from each group, and which."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from test_groups import attention
from test_trace import groups_of, net

import spa
from spa.criteria.score import Scores
from spa.errors import BadOption
from spa.plans.choose import Choice, Options, choose, matches, structure


def chain(width: int = 32, other: int = 24) -> onnx.ModelProto:
    """Two hidden groups between matrices: nothing convolves."""
    return net("float[2,4] x -> float[2,5] y", "[one] h = MatMul(x, w1) [two] k = MatMul(h, w2) [three] y = MatMul(k, w3)",
               w1=(4, width), w2=(width, other), w3=(other, 5))


def picture(width: int, second: int = 16) -> onnx.ModelProto:
    """One hidden group that is the input of a dense convolution, one that feeds a Gemm."""
    return net("float[2,3,4,4] x -> float[2,5] y", "a = Conv(x, w1) b = Conv(a, w2) f = Flatten(b) y = Gemm<transB=1>(f, w3)",
               w1=(width, 3, 1, 1), w2=(second, width, 1, 1), w3=(5, 16 * second))


def chosen(model: onnx.ModelProto | spa.Groups, *, block: int = 16, scores: Any = None, **options: Any) -> tuple[dict[str, int], Choice]:
    """What each group keeps, where it loses any; scores are the coordinates' numbers unless given."""
    groups = model if isinstance(model, spa.Groups) else groups_of(model)
    values = np.arange(groups.total, dtype=np.float64) if scores is None else np.asarray(scores, np.float64)
    choice = choose(groups, Scores("test", values), Options(**{"multiple_of": 1, **options}), block=block)
    kept = {g.name: int((~choice.gone[g.coordinates]).sum()) for g in groups.groups}
    return {n: k for n, k in kept.items() if k < groups.by_name[n].size}, choice


@pytest.mark.parametrize("ratio, kept", [(0.5, (16, 12)), (0.25, (24, 18)), (0.75, (8, 6)), (0.99, (1, 1)), (0.1, (28, 21))])
def test_ratios_round_down_what_stays(ratio: float, kept: tuple[int, int]) -> None:
    assert tuple(chosen(chain(), ratio=ratio)[0].values()) == kept


def test_too_little_to_remove_is_said() -> None:
    kept, choice = chosen(chain(), ratio=1e-9)
    assert kept == {}
    assert set(choice.notes) == {"w1:1", "w2:1"}


def test_the_lowest_scores_go_and_ties_go_in_order() -> None:
    groups = groups_of(chain(8, 8))
    scores = np.zeros(groups.total)
    one, two = (groups.by_name[n] for n in ("w1:1", "w2:1"))
    scores[one.coordinates] = [5, 1, 7, 3, 8, 2, 6, 4]
    scores[two.coordinates] = 1
    _, choice = chosen(groups, ratio=0.5, scores=scores)
    assert np.flatnonzero(choice.gone[one.coordinates]).tolist() == [1, 3, 5, 7]
    assert np.flatnonzero(choice.gone[two.coordinates]).tolist() == [0, 1, 2, 3]
    assert not choice.notes


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("unit", [2, 3, 4, 8, 16])
def test_widths_are_multiples_nearest_to_the_ratio(ratio: float, unit: int) -> None:
    kept, choice = chosen(chain(), ratio=ratio, multiple_of=unit)
    for name, size in {"w1:1": 32, "w2:1": 24}.items():
        target = size * (1 - ratio)
        best = min(max(int(target / unit + 0.5) * unit, unit), size)
        assert kept.get(name, size) == best
        if best == size:
            assert choice.notes[name] == f"stays whole: {size} channels have no smaller width that is a multiple of {unit}"


def test_a_group_smaller_than_the_multiple_stays() -> None:
    kept, choice = chosen(chain(6, 24), ratio=0.5, multiple_of=8)
    assert kept == {"w2:1": 16}
    assert set(choice.notes) == {"w1:1"}


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.33, 0.5, 0.62, 0.75, 0.9])
@pytest.mark.parametrize("width", [6, 12, 16, 20, 28, 40, 64, 96, 100])
def test_auto_leaves_dense_convolutions_aligned(width: int, ratio: float, block: int) -> None:
    kept, _ = chosen(picture(width), ratio=ratio, multiple_of="auto", block=block)
    keep = kept.get("w1:0", width)
    assert keep == width or keep % 4 == 0
    if width >= 12:
        assert abs(keep - width * (1 - ratio)) <= max(width / 6, 4)


def test_auto_takes_the_block_where_it_is_near() -> None:
    assert chosen(picture(128), ratio=0.5, multiple_of="auto", block=16)[0]["w1:0"] == 64
    assert chosen(picture(128), ratio=0.45, multiple_of="auto", block=16)[0]["w1:0"] == 64
    assert chosen(picture(24), ratio=0.5, multiple_of="auto", block=16)[0]["w1:0"] == 16
    assert chosen(picture(20), ratio=0.75, multiple_of="auto", block=16)[0]["w1:0"] == 8
    assert chosen(picture(16, 7), ratio=0.5, multiple_of="auto", block=16)[0]["w2:0"] == 4


@pytest.mark.parametrize("least", [1, 5, 20, 100])
def test_every_group_keeps_at_least(least: int) -> None:
    kept, _ = chosen(chain(), ratio=0.9, keep_at_least=least)
    assert kept.get("w1:1", 32) == min(max(3, least), 32)
    assert kept.get("w2:1", 24) == min(max(2, least), 24)
    kept, _ = chosen(chain(), ratio=0.9, keep_at_least=least, multiple_of=8)
    assert kept.get("w1:1", 32) == min(max(8, math.ceil(least / 8) * 8), 32)


@pytest.mark.parametrize(
    "options, names",
    [
        ({"include": ("w1:1",)}, {"w1:1"}),
        ({"include": ("w1*",)}, {"w1:1"}),
        ({"include": ("/^w2/",)}, {"w1:1", "w2:1"}),  # w2 is a value of both groups
        ({"include": ("one",)}, {"w1:1"}),  # a node
        ({"include": ("three",)}, {"w2:1"}),
        ({"include": ("h",)}, {"w1:1"}),  # an activation
        ({"exclude": ("w1:1",)}, {"w2:1"}),
        ({"exclude": ("one", "three")}, set()),
        ({"include": ("two",), "exclude": ("/^k$/",)}, {"w1:1"}),
        ({"include": ("w1:1", "w2:1"), "exclude": ()}, {"w1:1", "w2:1"}),
    ],
)
def test_patterns(options: dict[str, Any], names: set[str]) -> None:
    assert set(chosen(chain(), **options)[0]) == names


def test_matching() -> None:
    assert matches(["a*"], ["b", "ab"])
    assert matches(["/b$/"], ["ab"])
    assert not matches(["/b$/"], ["ba"])
    assert not matches(["A"], ["a"])
    assert not matches([], ["a"])
    assert matches(["//"], ["//"])


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_that_match_nothing(option: str) -> None:
    with pytest.raises(BadOption, match=f"--{option}: 'nothing' matches no group, node or value"):
        chosen(chain(), **{option: ("nothing",)})
    with pytest.raises(BadOption, match="is no regular expression"):
        chosen(chain(), **{option: ("/(/",)})


def test_ratios_of_their_own() -> None:
    assert chosen(chain(), ratio=0.5, ratios={"w1:1": 0.25})[0] == {"w1:1": 24, "w2:1": 12}
    assert chosen(chain(), ratio=0.5, ratios={"w1:1": 0})[0] == {"w2:1": 12}
    assert chosen(chain(), ratio=0.5, ratios={"one": 0.75, "w1:1": 0.25})[0]["w1:1"] == 8  # the first that fits
    with pytest.raises(BadOption, match="the ratios file: 'q' matches no"):
        chosen(chain(), ratios={"q": 0.1})


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ratio": 0}, "--ratio is 0"),
        ({"ratio": 1}, "--ratio is 1"),
        ({"ratio": -0.5}, "--ratio"),
        ({"ratio": 1.5}, "--ratio"),
        ({"ratio": math.nan}, "--ratio"),
        ({"ratios": {"a": 1}}, "the ratio of 'a' is 1"),
        ({"ratios": {"a": -0.1}}, "the ratio of 'a'"),
        ({"scope": "galactic"}, "--scope is 'galactic'; the choice is: local, global, isomorphic"),
        ({"multiple_of": 0}, "--multiple-of is 0"),
        ({"multiple_of": "many"}, "--multiple-of is 'many'"),
        ({"multiple_of": 2.0}, "--multiple-of"),
        ({"keep_at_least": 0}, "--keep-at-least is 0"),
    ],
)
def test_impossible_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption, match=words):
        Options(**options)


def test_one_threshold_over_all_groups() -> None:
    """Scores are divided by their group's mean; what lies below the threshold goes, wherever it is."""
    groups = groups_of(chain(8, 8))
    one, two = (groups.by_name[n] for n in ("w1:1", "w2:1"))
    scores = np.zeros(groups.total)
    scores[one.coordinates] = [1, 1, 1, 1, 1, 1, 9, 9]
    scores[two.coordinates] = [90, 91, 92, 93, 94, 95, 96, 97]
    assert chosen(groups, ratio=6 / 16, scope="global", scores=scores)[0] == {"w1:1": 2}
    assert chosen(groups, ratio=6 / 16, scope="local", scores=scores)[0] == {"w1:1": 5, "w2:1": 5}


def test_one_threshold_among_groups_of_one_structure() -> None:
    body = "a = MatMul(x, w1) b = MatMul(a, w2) c = MatMul(b, w3) d = MatMul(c, w4) e = MatMul(d, w5) y = MatMul(e, w6)"
    model = net("float[2,4] x -> float[2,8] y", body, w1=(4, 8), w2=(8, 8), w3=(8, 8), w4=(8, 8), w5=(8, 6), w6=(6, 8))
    groups = groups_of(model)
    first, twin, last = (groups.by_name[n] for n in ("w2:1", "w3:1", "w5:1"))
    assert structure(groups, first) == structure(groups, twin)
    assert structure(groups, first) != structure(groups, last)
    scores = np.ones(groups.total)
    scores[first.coordinates] = [1, 1, 1, 1, 1, 1, 37, 37]
    scores[twin.coordinates] = [9, 9, 9, 9, 10, 10, 11, 11]
    kept, _ = chosen(groups, ratio=6 / 16, scope="isomorphic", scores=scores)
    assert kept["w2:1"] == 2
    assert "w3:1" not in kept


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_scopes_keep_every_group_alive(scope: str) -> None:
    rng = np.random.default_rng(0)
    groups = groups_of(chain())
    kept, choice = chosen(groups, ratio=0.95, scope=scope, scores=rng.random(groups.total) ** 4)
    assert all(k >= 1 for k in kept.values())
    assert choice.gone.any()
    assert not choice.gone[[c for g in groups.groups if g.frozen for c in range(g.start, g.start + g.size)]].any()


def test_one_factor_of_a_product_shrinks() -> None:
    kept, choice = chosen(attention(), ratio=0.5)
    groups = groups_of(attention())
    heads = next(g.name for g in groups.free() if g.size == 4)
    widths = {g.name for g in groups.free() if g.size == 6}
    assert kept == dict.fromkeys(widths, 3)
    assert choice.notes[heads].startswith("stays whole: it multiplies ")
    assert choice.notes[heads].endswith("which shrinks instead (--include chooses)")


def test_the_factor_that_comes_closest() -> None:
    """A quarter of 4 heads is exact, a quarter of a width of 6 is not."""
    groups = groups_of(attention())
    heads = next(g.name for g in groups.free() if g.size == 4)
    kept, choice = chosen(groups, ratio=0.25)
    assert kept == {heads: 3}
    assert set(choice.notes) == {g.name for g in groups.free() if g.size == 6}


def test_include_chooses_the_factor() -> None:
    heads = next(g.name for g in groups_of(attention()).free() if g.size == 4)
    kept, choice = chosen(attention(), ratio=0.5, include=(heads,))
    assert kept == {heads: 2}
    assert not choice.notes


def test_positions_of_repeated_coordinates_count() -> None:
    """A coordinate within a convolution's groups is one channel of each: two groups make 6 coordinates 12 channels."""
    model = net("float[2,3,4,4] x -> float[2,5,4,4] y", "a = Conv(x, w1) b = Conv<group=2>(a, w2) y = Conv(b, w3)",
                w1=(16, 3, 1, 1), w2=(12, 8, 1, 1), w3=(5, 12, 1, 1))
    assert chosen(model, ratio=0.25, multiple_of=4, include=("w1:0#2",))[0] == {"w1:0#2": 6}
