"""Edits: changes before tracing that a plan holds as plain data, and the pass that drops branches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import net
from typer.testing import CliRunner

import spa
from passes import drop_branches
from spa import api
from spa.cli import app
from spa.errors import BadPlan
from spa.plans import edits
from spa.plans.edits import Edit, Kind
from spa.plans.plan import graph_sha256

BODY = """a = MatMul(x, w0) b = MatMul(a, u1) c = Relu(b) d = MatMul(c, v1) e = Add(a, d)
f = MatMul(e, u2) k = Concat<axis=0>(past, f) l = ReduceMean<axes=[0], keepdims=1>(k) g = Add(f, l) h = MatMul(g, v2) i = Add(e, h)
y = MatMul(i, w3)"""
FIRST = {"kind": "drop_branches", "replace": {"e": "a"}}
SECOND = {"kind": "drop_branches", "replace": {"i": "e"}, "inputs": ["past"], "outputs": ["k"]}
BOTH = {**SECOND, "replace": {**FIRST["replace"], **SECOND["replace"]}}


def model(seed: int = 0) -> onnx.ModelProto:
    """Two residual layers; the second one reads and gives a state."""
    made = net("float[n,6] x, float[p,12] past -> float[n,5] y, float[q,12] k", BODY, w0=(6, 16), u1=(16, 32), v1=(32, 16), u2=(16, 12),
               v2=(12, 16), w3=(16, 5))
    for tensor in made.graph.initializer if seed else ():
        array = np.random.default_rng(seed).standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return made


def run(made: spa.Model | onnx.ModelProto, **feeds: Any) -> dict[str, np.ndarray]:
    from spa.proof.check import run as run_model

    opened = made if isinstance(made, spa.Model) else spa.load(made)
    return run_model(opened, feeds)  # type: ignore[return-value]


def without(made: onnx.ModelProto, *layers: int) -> onnx.ModelProto:
    """The same function by other means: the last matrix of a layer is zero."""
    zero = onnx.ModelProto()
    zero.CopyFrom(made)
    for tensor in zero.graph.initializer:
        if tensor.name in {f"v{n}" for n in layers}:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    return zero


X = {"x": np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32), "past": np.ones((2, 12), np.float32)}


def test_a_dropped_branch_counts_as_zero_and_its_state_goes() -> None:
    for records, layers in (([FIRST], (1,)), ([SECOND], (2,)), ([BOTH], (1, 2)), ([SECOND, FIRST], (1, 2))):
        analysis = spa.analyze(model(), edits=records)
        wanted, found = run(without(model(), *layers), **X), run(analysis.edited, **X)
        np.testing.assert_allclose(found["y"], wanted["y"], atol=1e-5)
        state = 2 not in layers
        assert [t.name for t in analysis.edited.graph.inputs] == (["x", "past"] if state else ["x"])
        assert ("k" in found) == state
        assert analysis.given.graph is not analysis.edited.graph
        assert graph_sha256(analysis.given.graph) == graph_sha256(spa.load(model()).graph)


def test_the_pass_is_idempotent_and_says_how_much_it_did() -> None:
    graph = spa.load(model()).graph.copy()
    assert drop_branches(graph, {"i": "e", "e": "a"}, ["past"], ["k"]) == 2
    assert [n.op for n in graph.nodes] == ["MatMul", "MatMul"]
    assert drop_branches(graph, {"i": "e", "e": "a"}, ["past"], ["k"]) == 0
    graph = spa.load(model()).graph.copy()
    assert drop_branches(graph, {"i": "e"}, ["past"]) == 1  # an output that is not named stays, and with it what it needs
    assert [t.name for t in graph.inputs] == ["x", "past"]


def test_an_output_of_the_graph_keeps_its_name() -> None:
    made = net("float[2,6] x -> float[2,6] y", "a = MatMul(x, w) b = MatMul(a, u) y = Add(a, b)", w=(6, 6), u=(6, 6))
    graph = spa.load(made).graph.copy()
    assert drop_branches(graph, {"y": "a"}) == 1
    assert [(n.op, n.outputs[0].name) for n in graph.nodes] == [("MatMul", "a"), ("Identity", "y")]
    assert drop_branches(graph, {"y": "a"}) == 0


def test_plans_hold_edits_and_do_them_again(tmp_path: Path) -> None:
    result = spa.apply(analysis := spa.analyze(model(), edits=[SECOND]), plan := spa.plan(analysis, 0.5, multiple_of=1))
    assert plan.trace["edits"] == [SECOND]
    assert spa.load_plan(json.loads(plan.to_json())) == plan
    again = spa.apply(model(), plan)
    assert spa.storage.store.to_bytes(again.model) == spa.storage.store.to_bytes(result.model)
    other = spa.apply(model(seed=1), plan, other_weights=True)
    wanted = {t.name: numpy_helper.to_array(t) for t in model(seed=1).graph.initializer}
    kept = plan.groups["u1:1"]["kept"]
    small = {t.name: numpy_helper.to_array(t) for t in other.to_proto().graph.initializer}
    assert "v2" not in small
    np.testing.assert_array_equal(small["v1"], wanted["v1"][kept][:, plan.groups["w0:1"]["kept"]])
    result.save(tmp_path / "small.onnx", plan=tmp_path / "p.json")
    onnx.save(model(), tmp_path / "m.onnx")
    arguments = ["check", str(tmp_path / "m.onnx"), str(tmp_path / "small.onnx"), "--plan", str(tmp_path / "p.json"), "--json"]
    checked = CliRunner().invoke(app, arguments)
    assert checked.exit_code == 0, checked.output
    assert not json.loads(checked.stdout)["weights"]["differing"]


def test_savings_are_counted_from_the_model_as_given() -> None:
    dense = spa.count(spa.analyze(model()).groups)
    result = spa.apply(analysis := spa.analyze(model(), edits=[FIRST]), spa.plan(analysis, 0.5, multiple_of=1))
    assert result.before == dense
    assert result.after == spa.count(spa.analyze(result.model).groups)
    assert analysis.dense.groups.total > analysis.groups.total


def test_steps_and_repaired_models_do_not_edit_twice(tmp_path: Path) -> None:
    result = spa.prune(model(), 0.5, multiple_of=1, steps=2, edits=[SECOND])
    assert result.plan.trace["edits"] == [SECOND]
    again = spa.apply(model(), result.plan)
    np.testing.assert_allclose(run(again.model, **X)["y"], run(result.model, **X)["y"], atol=1e-5)
    repaired = spa.prune(model(), 0.5, multiple_of=1, repair="bias", calibration="none", edits=[SECOND])
    repaired.save_repaired(tmp_path / "r.onnx", plan=tmp_path / "r.json")
    assert "edits" not in spa.load_plan(tmp_path / "r.json").trace
    small = spa.apply(tmp_path / "r.onnx", tmp_path / "r.json")
    np.testing.assert_allclose(run(small.model, **X)["y"], run(repaired.model, **X)["y"], atol=1e-5)


def test_shapes_of_inputs_that_go_do_not_disturb() -> None:
    analysis = spa.analyze(model(), edits=[SECOND], inputs={"x": [2, 6], "past": [4, 12]})
    assert analysis.settings["inputs"] == {"x": [2, 6], "past": [4, 12]}
    assert analysis.options["inputs"] == {"x": [2, 6]}


@pytest.mark.parametrize("records, words", [
    ("drop", "no list"), ([3], "number 1"), ([{"kind": "melt"}], "does not know"), ([{"kind": "drop_branches"}], "wrong arguments"),
    ([{**FIRST, "speed": 3}], "wrong arguments"), ([{"kind": "drop_branches", "replace": {"e": "nothing"}}], "no value 'nothing'"),
    ([{"kind": "drop_branches", "replace": {"a": "e"}}], "depends on"), ([{"kind": "drop_branches", "replace": {"a": "a"}}], "itself"),
    ([{"kind": "drop_branches", "replace": 3}], "does not fit"),
])  # fmt: skip
def test_bad_edits_are_refused_in_one_sentence(records: Any, words: str) -> None:
    analysis = spa.analyze(model())
    fields = json.loads(spa.plan(analysis, 0.5, multiple_of=1).to_json())
    fields["trace"]["edits"] = records
    with pytest.raises(BadPlan, match=words):
        spa.apply(model(), fields)


def test_edits_that_need_data_are_left_out_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(graph: Any, value: str, array: Any) -> int:
        tensor = graph.tensors()[value]
        tensor._values = array
        return 1

    monkeypatch.setitem(edits.KINDS, "fill", Kind(fill, None, ("array",), "a matrix"))
    array = np.ones((16, 5), np.float32)
    analysis = spa.analyze(model(), edits=[Edit("fill", {"value": "w3"}, {"array": array})])
    assert not analysis.left_out
    assert analysis.settings["edits"] == [{"kind": "fill", "value": "w3"}]
    assert not np.allclose(run(analysis.edited, **X)["y"], run(model(), **X)["y"])
    bare = spa.analyze(model(), edits=analysis.settings["edits"])
    assert bare.left_out == ("a matrix was left out: it is fitted to data, which a plan does not hold.",)
    np.testing.assert_array_equal(run(bare.edited, **X)["y"], run(model(), **X)["y"])
    assert api.analyzed_for(model(), spa.plan(analysis, 0.5, multiple_of=1)).left_out
