"""Plans: text and back, what they list, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import ints, net

import spa
from spa.errors import BadFile, BadPlan
from spa.graph.shapes import infer
from spa.plans.plan import graph_sha256, mask_of

BODY = "a = Conv(x, w1, b) n = Relu(a) c = Conv(n, w2, b) d = Reshape(c, s) y = Gemm<transB=1>(d, w3)"


def model(seed: int = 0) -> onnx.ModelProto:
    """Two convolutions that share a bias, which an exporter merged."""
    made = net("float[2,3,4,4] x -> float[2,5] y", BODY, w1=(8, 3, 1, 1), b=(8,), w2=(8, 8, 1, 1), s=ints(0, 128), w3=(5, 128))
    for tensor in made.graph.initializer:
        if seed and tensor.data_type == 1:
            array = np.random.default_rng(seed).standard_normal(tuple(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return made


def plan_of(made: onnx.ModelProto | None = None, **options: Any) -> spa.Plan:
    return spa.plan(made or model(), 0.5, **{"multiple_of": 1, **options})


def arrays(made: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}


def test_text_and_back(tmp_path: Path) -> None:
    plan = plan_of()
    plan.save(tmp_path / "p.json")
    assert spa.load_plan(tmp_path / "p.json") == plan
    assert spa.load_plan(json.loads(plan.to_json())) == plan
    assert spa.load_plan(plan) is plan
    assert plan_of().to_json() == plan.to_json()
    assert spa.load_plan(tmp_path / "p.json").to_json() == plan.to_json()


def test_a_checkpoint_that_does_not_fit_is_told_by_the_first_tensor() -> None:
    wider = net("float[2,3,4,4] x -> float[2,5] y", BODY, w1=(16, 3, 1, 1), b=(16,), w2=(16, 16, 1, 1), s=ints(0, 256), w3=(5, 256))
    says = r"its tensor 'w1' has the shape \(8, 3, 1, 1\), that of this model is \(16, 3, 1, 1\)\. Make a plan"
    with pytest.raises(BadPlan, match=says):
        spa.apply(wider, plan_of(), other_weights=True)
    renamed = onnx.ModelProto.FromString(model().SerializeToString().replace(b"w2", b"v2"))
    with pytest.raises(BadPlan, match="there is no tensor 'w2' in this one"):
        spa.apply(renamed, plan_of(), other_weights=True)


def test_removed_positions_are_exactly_what_is_missing() -> None:
    """From every initializer and from the shape of every activation, under the names of the model as given."""
    made = model()
    plan = plan_of(made)
    small = spa.apply(made, plan).to_proto()
    before, after = arrays(made), arrays(small)
    names = {i.name for i in made.graph.initializer} | {o for n in made.graph.node for o in n.output}
    assert set(plan.removed) - set(plan.copies) <= names
    for name, axes in plan.removed.items():
        array = before.get(plan.copies.get(name, name))
        if array is None:
            continue
        for axis, positions in axes.items():
            array = np.delete(array, positions, int(axis))
        assert np.array_equal(after[name], array), name
    for name, array in before.items():
        if name not in plan.removed and name != "s":
            assert np.array_equal(after[name], array)
    shapes_before, shapes_after = (infer(spa.load(m).graph).shapes for m in (made, small))
    for name in (o for n in made.graph.node for o in n.output):
        lost = {int(a): len(p) for a, p in plan.removed.get(name, {}).items()}
        assert shapes_after[name] == tuple(n - lost.get(a, 0) for a, n in enumerate(shapes_before[name] or ()))
    assert len(plan.removed["d"]["1"]) == 64
    assert all(p == sorted(set(p)) for axes in plan.removed.values() for p in axes.values())


def test_copies_of_shared_constants() -> None:
    plan = plan_of()
    assert plan.copies == {"b/copy1": "b"}
    assert plan.removed["b"]["0"] == plan.removed["w1"]["0"]
    assert plan.removed["b/copy1"]["0"] == plan.removed["w2"]["0"]
    assert plan.removed["b"] != plan.removed["b/copy1"]
    small = spa.apply(model(), plan).to_proto()
    assert {"b", "b/copy1"} <= {t.name for t in small.graph.initializer}


def test_copies_that_are_cut_alike_are_one_again() -> None:
    body = "a = Conv(x, w1, b) c = Conv(x, w2, b) d = Add(a, c) y = Conv(d, w3)"
    made = net("float[2,3,4,4] x -> float[2,5,4,4] y", body, w1=(8, 3, 1, 1), b=(8,), w2=(8, 3, 1, 1), w3=(5, 8, 1, 1))
    plan = plan_of(made)
    assert plan.copies == {}
    assert set(plan.removed) == {"w1", "w2", "w3", "b", "a", "c", "d"}
    small = spa.apply(made, plan).to_proto()
    assert {t.name for t in small.graph.initializer} == {"w1", "w2", "w3", "b"}
    assert [n.input[2] for n in small.graph.node[:2]] == ["b", "b"]
    untouched = plan_of(model(), include=["w1:0"])
    assert untouched.copies == {"b/copy1": "b"}
    assert "b/copy1" not in untouched.removed


def test_groups_list_what_they_keep() -> None:
    plan = plan_of()
    assert {n: (e["size"], len(e["kept"])) for n, e in plan.groups.items()} == {"w1:0": (8, 4), "w2:0": (8, 4)}
    assert sorted(plan.groups["w1:0"]["kept"] + plan.removed["w1"]["0"]) == list(range(8))
    analysis = spa.analyze(model())
    gone = mask_of(plan, analysis.groups)
    assert np.flatnonzero(~gone[analysis.groups.by_name["w1:0"].coordinates]).tolist() == plan.groups["w1:0"]["kept"]
    assert plan.options["ratio"] == 0.5
    assert plan.trace == {"protect_outputs": True, "stat": True, "keep_state": False, "inputs": {}}


def test_the_trace_settings_travel() -> None:
    body = "h = MatMul(x, w1) s = Softmax(h) y = MatMul(s, w2)"
    made = net("float[n,4] x -> float[n,6] y", body, w1=(4, 8), w2=(8, 6))
    plan = spa.plan(made, 0.5, multiple_of=1, protect_outputs=False, inputs={"x": [3, 4]})
    assert plan.trace == {"protect_outputs": False, "stat": True, "keep_state": False, "inputs": {"x": [3, 4]}}
    result = spa.apply(made, spa.load_plan(json.loads(plan.to_json())))
    assert arrays(result.to_proto())["w2"].shape == (4, 3)
    assert result.check is not None
    assert result.check.passed


def test_other_weights_of_the_same_graph() -> None:
    plan = plan_of(model())
    other = model(seed=1)
    with pytest.raises(BadPlan, match="other weights: --other-weights applies it"):
        spa.apply(other, plan)
    small = arrays(spa.apply(other, plan, other_weights=True).to_proto())
    assert np.array_equal(small["w1"], np.delete(arrays(other)["w1"], plan.removed["w1"]["0"], 0))


def test_another_graph() -> None:
    plan = plan_of(model())
    other = model()
    other.graph.node[1].op_type = "Sigmoid"
    for accept in (False, True):
        with pytest.raises(BadPlan, match="for another model: the graphs differ"):
            spa.apply(other, plan, other_weights=accept)


def test_the_hash_of_a_graph_leaves_out_weights_alone() -> None:
    def digest(change: Any = None) -> str:
        made = model()
        if change:
            change(made.graph)
        return graph_sha256(spa.load(made).graph)

    def weights(graph: onnx.GraphProto) -> None:
        graph.initializer[0].raw_data = bytes(len(graph.initializer[0].raw_data))

    def sizes(graph: onnx.GraphProto) -> None:
        graph.initializer[3].CopyFrom(numpy_helper.from_array(ints(2, 128), "s"))

    def attribute(graph: onnx.GraphProto) -> None:
        graph.node[4].attribute[0].i = 0

    def name(graph: onnx.GraphProto) -> None:
        graph.output[0].name = graph.node[4].output[0] = "z"

    assert digest() == digest() == digest(weights)
    assert len({digest(), digest(sizes), digest(attribute), digest(name)}) == 4
    assert digest() == plan_of().graph_sha256


def damaged(**fields: Any) -> dict[str, Any]:
    return {**json.loads(plan_of().to_json()), **fields}


@pytest.mark.parametrize(
    "fields, words",
    [
        ([], 'lacks "format": "spa-plan"'),
        ({"format": "spa-plan"}, "version None"),
        ({"format": "other"}, 'lacks "format"'),
        ("version", "version 99, this spa reads version 1"),
        ("groups", "is damaged"),
        ("removed", "is damaged"),
        ("trace", "is damaged"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, fields: Any, words: str) -> None:
    if isinstance(fields, str):
        fields = damaged(**{fields: 99})
    (tmp_path / "p.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(BadPlan, match=words):
        spa.load_plan(tmp_path / "p.json")


@pytest.mark.parametrize("key", ["model_sha256", "graph_sha256", "groups", "removed", "trace"])
def test_plans_that_lack_something(key: str) -> None:
    fields = damaged()
    del fields[key]
    with pytest.raises(BadPlan, match=f"is damaged: KeyError '{key}'"):
        spa.load_plan(fields)


@pytest.mark.parametrize("text, words", [("{", "it is no JSON"), ("[" * 100_000, "it is no JSON"), ("\xff", "no JSON"), ("", "no JSON")])
def test_text_that_is_no_json(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadPlan, match=words):
        spa.load_plan(tmp_path / "p.json")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadPlan, match="There is no plan file"):
        spa.load_plan(tmp_path / "p.json")
    with pytest.raises(BadPlan, match="can't be read"):
        spa.load_plan(tmp_path)
    (tmp_path / "p.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadPlan, match="can't be read"):
        spa.load_plan(tmp_path / "p.json")
    with pytest.raises(BadFile):
        plan_of().save(tmp_path / "nowhere" / "p.json")


@pytest.mark.parametrize(
    "groups, words",
    [
        ({"q:0": {"size": 8, "kept": [0]}}, "group 'q:0' of 8 channels is not in this model"),
        ({"w1:0": {"size": 9, "kept": [0]}}, "group 'w1:0' of 9 channels is not in this model"),
        ({"w1:0": {"size": 8, "kept": []}}, "are not a part of 0 … 7"),
        ({"w1:0": {"size": 8, "kept": [0, 8]}}, "are not a part of 0 … 7"),
        ({"w1:0": {"size": 8, "kept": [-1, 1]}}, "are not a part of 0 … 7"),
        ({"w1:0": {"size": 8, "kept": [1, 1]}}, "are not a part of 0 … 7"),
        ({"w1:1": {"size": 3, "kept": [0]}}, "shrinks group 'w1:1', which must stay: axis 1 of x is an input"),
    ],
)
def test_groups_that_do_not_fit(groups: dict[str, Any], words: str) -> None:
    with pytest.raises(BadPlan, match=words):
        spa.apply(model(), damaged(groups=groups))
