"""The straight line in Python: whatever a model comes as, whatever network it is, and what is written when something fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import ints, net

import spa
from models import weightless
from spa.errors import BadFile, BadModel, BadOption, CheckFailed, NothingToPrune, UnsupportedModel
from spa.storage.store import to_bytes

ZOO = sorted((Path(__file__).parent.parent / "models" / "zoo").glob("*.onnx.xz"))
TWICE = sorted({p.name.split(".")[0] for p in ZOO if p.with_name(p.name.split(".")[0] + ".script.onnx.xz") in ZOO
                and p.with_name(p.name.split(".")[0] + ".dynamo.onnx.xz") in ZOO})


def model(**more: Any) -> onnx.ModelProto:
    body = "a = Conv(x, w1, b1) n = BatchNormalization(a, s, b, m, v) r = Relu(n) c = Conv(r, w2) z = Add(c, r) f = GlobalAveragePool(z)" \
           " g = Flatten(f) y = Gemm<transB=1>(g, w3, b3)"
    return net("float[n,3,8,8] x -> float[n,5] y", body, w1=(8, 3, 1, 1), b1=(8,), s=(8,), b=(8,), m=(8,), v=np.ones(8, np.float32),
               w2=(8, 8, 1, 1), w3=(5, 8), b3=(5,), **more)


# ---------------------------------------------------------------------- the zoo


def check_prunes(path: Path, ratio: float, criterion: str) -> None:
    made = weightless.load(path)
    result = spa.prune(made, ratio, criterion=criterion, multiple_of=1)
    assert result.check is not None
    assert result.check.passed
    assert result.check.worst < 1e-5
    assert 0 < result.after.macs < result.before.macs
    assert 0 < result.after.parameters < result.before.parameters
    small = result.to_proto()
    onnx.checker.check_model(small, full_check=True)
    assert [i.name for i in small.graph.input] == [i.name for i in made.graph.input]
    assert [o.name for o in small.graph.output] == [o.name for o in made.graph.output]


@pytest.mark.parametrize("path", ZOO, ids=lambda p: p.name.removesuffix(".onnx.xz"))
def test_the_zoo_prunes(path: Path) -> None:
    check_prunes(path, 0.5, "l2")


@pytest.mark.slow
@pytest.mark.parametrize("ratio, criterion", [(0.25, "l2"), (0.75, "l2"), (0.25, "random"), (0.5, "random"), (0.75, "random")])
@pytest.mark.parametrize("path", ZOO, ids=lambda p: p.name.removesuffix(".onnx.xz"))
def test_the_zoo_prunes_at_all_ratios(path: Path, ratio: float, criterion: str) -> None:
    check_prunes(path, ratio, criterion)


def share(path: Path) -> float:
    analysis = spa.analyze(weightless.load(path))
    result = spa.apply(analysis, spa.plan(analysis, 0.5, multiple_of=1), check=False)
    return result.after.macs / result.before.macs


@pytest.mark.parametrize("network", TWICE)
def test_both_exporters_give_the_same_share(network: str) -> None:
    script, dynamo = (share(ZOO[0].with_name(f"{network}.{how}.onnx.xz")) for how in ("script", "dynamo"))
    assert script == pytest.approx(dynamo, abs=0.02)


def test_the_zoo_is_there() -> None:
    assert len(ZOO) >= 19
    assert len(TWICE) >= 5


# ---------------------------------------------------------------------- in and out


def test_whatever_the_model_comes_as(tmp_path: Path) -> None:
    made = model()
    onnx.save(made, tmp_path / "m.onnx")
    sources: list[Any] = [made, made.SerializeToString(), tmp_path / "m.onnx", str(tmp_path / "m.onnx"), spa.load(made)]
    results = [spa.prune(s, 0.5, multiple_of=1) for s in sources]
    assert len({to_bytes(r.model) for r in results}) == 1
    assert len({r.plan.to_json().replace(r.plan.model_sha256, "") for r in results}) == 1
    assert made == model()


def test_the_same_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        spa.prune(model(), 0.5, criterion="random", seed=3).save(tmp_path / f"{name}.onnx", plan=tmp_path / f"{name}.json")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    other = spa.prune(model(), 0.5, criterion="random", seed=4)
    assert to_bytes(other.model) != (tmp_path / "one.onnx").read_bytes()


def test_model_and_plan_together(tmp_path: Path) -> None:
    result = spa.prune(model(), 0.5, multiple_of=1)
    result.save(tmp_path / "m.onnx", plan=tmp_path / "p.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "p.json"]
    assert spa.load_plan(tmp_path / "p.json") == result.plan
    assert onnx.load(tmp_path / "m.onnx") == result.to_proto()
    again = spa.apply(model(), tmp_path / "p.json")
    assert to_bytes(again.model) == (tmp_path / "m.onnx").read_bytes()


@pytest.mark.parametrize("model_path, plan_path", [("m.onnx", "nowhere/p.json"), ("nowhere/m.onnx", "p.json"), ("m.onnx", "folder")])
def test_both_or_neither(tmp_path: Path, model_path: str, plan_path: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "something").touch()
    result = spa.prune(model(), 0.5, multiple_of=1)
    with pytest.raises((BadFile, BadOption)):
        result.save(tmp_path / model_path, plan=tmp_path / plan_path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_files_that_were_there_stay_if_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(BadFile):
        spa.prune(model(), 0.5, multiple_of=1).save(tmp_path / "m.onnx", plan=tmp_path / "nowhere" / "p.json")
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_external_data_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    onnx.save(model(), tmp_path / "in" / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    monkeypatch.chdir(tmp_path / "in")
    expected = spa.prune("m.onnx", 0.5, multiple_of=1).to_proto()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = spa.prune(os.path.join("..", "in", "m.onnx"), 0.5, multiple_of=1)
    assert result.check is not None
    assert result.check.passed
    result.save(Path("..") / "out" / "small.onnx", plan="p.json")
    assert [p.name for p in Path.cwd().iterdir()] == ["p.json"]
    loaded = onnx.load(tmp_path / "out" / "small.onnx")
    assert {t.name: numpy_helper.to_array(t).tobytes() for t in loaded.graph.initializer} == {
        t.name: numpy_helper.to_array(t).tobytes() for t in expected.graph.initializer}
    inline = spa.prune(model(), 0.5, multiple_of=1).plan
    assert inline.removed == result.plan.removed


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 15, 17, 18, 19, 20, 21, 22])
def test_opsets(opset: int) -> None:
    made = model()
    made.opset_import[0].version = opset
    made.ir_version = 8 if opset < 21 else 10
    result = spa.prune(made, 0.5, multiple_of=1)
    assert result.check is not None
    assert result.check.worst < 1e-5
    assert result.to_proto().opset_import[0].version == opset
    assert [list(t.dims) for t in result.to_proto().graph.initializer if t.name == "w2"] == [[4, 4, 1, 1]]


# ---------------------------------------------------------------------- options and refusals


def test_stages_are_told() -> None:
    told: list[str] = []

    class Stage:
        def __init__(self, name: str) -> None:
            told.append(name)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    spa.prune(model(), 0.5, multiple_of=1, stage=Stage)
    assert told == ["reading", "finding shapes", "tracing", "scoring", "choosing", "rewriting", "proving"]


def test_an_analysis_is_made_once() -> None:
    analysis = spa.analyze(model())
    one, two = (spa.plan(analysis, r, multiple_of=1) for r in (0.25, 0.5))
    assert len(one.removed["w1"]["0"]) == 2
    assert len(two.removed["w1"]["0"]) == 4
    assert set(one.removed["w1"]["0"]) < set(two.removed["w1"]["0"])
    assert to_bytes(spa.apply(analysis, two).model) == to_bytes(spa.prune(model(), 0.5, multiple_of=1).model)


def test_nothing_to_prune() -> None:
    with pytest.raises(NothingToPrune, match=r"^Nothing to prune: all \d+ groups are frozen, the most costly one because axis . of"):
        spa.prune(net("float[2,4] x -> float[2,5] y", "y = MatMul(x, w)", w=(4, 5)))
    with pytest.raises(NothingToPrune, match="the model has no weights"):
        spa.prune(net("float x -> float y", "y = Relu(x)"))
    with pytest.raises(NothingToPrune, match=r"w1:0 stays whole: 8 channels have no smaller width that is a multiple of 8"):
        spa.prune(model(), 0.5, multiple_of=8)
    with pytest.raises(NothingToPrune):
        spa.prune(model(), 0.5, exclude=["*"])


def test_wrong_options_are_refused_before_anything_is_read() -> None:
    for options in ({"ratio": 2.0}, {"multiple_of": 0}, {"scope": "x"}, {"criterion": "x"}, {"include": ["x*y"]}, {"inputs": {"q": [1]}}):
        with pytest.raises(BadOption):
            spa.prune(model(), **options)  # type: ignore[arg-type]


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model at all")
    with pytest.raises((BadFile, BadModel)):
        spa.prune(tmp_path / "m.onnx")
    with pytest.raises(BadFile):
        spa.prune(tmp_path / "missing.onnx")


def test_given_feeds_and_tolerance() -> None:
    feeds = {"x": np.full((3, 3, 8, 8), 0.5, np.float32)}
    plan = spa.plan(model(), 0.5, multiple_of=1)
    result = spa.apply(model(), plan, feeds=feeds, tolerance=1e-3)
    assert result.check is not None
    assert result.check.tolerance == 1e-3
    with pytest.raises(UnsupportedModel, match="does not run"):
        spa.apply(model(), plan, feeds={"x": np.ones((3, 4, 8, 8), np.float32)})
    with pytest.raises(CheckFailed, match="--feeds"):
        spa.apply(model(), plan, feeds={"x": np.full((1, 3, 8, 8), np.nan, np.float32)})


def test_without_the_proof_shapes_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    import spa.plans.cutting

    result = spa.prune(model(), 0.5, multiple_of=1, check=False)
    assert result.check is None
    right = spa.plans.cutting.rewrite

    def wrong(*args: Any) -> Any:
        graph = right(*args)
        tensor = graph.nodes[-1].inputs[1]
        tensor.values = np.concatenate([tensor.values, tensor.values])
        return graph

    monkeypatch.setattr(spa.plans.cutting, "rewrite", wrong)
    with pytest.raises(CheckFailed, match=r"Output 'y' of the pruned graph would have shape \(2, 10\) instead of \(2, 5\)"):
        spa.prune(model(), 0.5, multiple_of=1, check=False)


def test_bodies_and_their_neighbours() -> None:
    body = """h = MatMul(x, w1) k = MatMul(h, w2) l = MatMul(k, w4)
     y = If (c) <then_branch = t () => (float[2,5] o) { o = MatMul(l, w3) }, else_branch = e () => (float[2,5] u) { u = MatMul(l, w5) }>"""
    made = net("float[2,4] x, bool c -> float[2,5] y", body, w1=(4, 8), w2=(8, 6), w3=(7, 5), w4=(6, 7), w5=(7, 5))
    result = spa.prune(made, 0.5, multiple_of=1)
    shapes = {t.name: list(t.dims) for t in result.to_proto().graph.initializer}
    assert shapes == {"w1": [4, 4], "w2": [4, 3], "w4": [3, 7], "w3": [7, 5], "w5": [7, 5]}


def test_sizes_of_inputs_can_be_given() -> None:
    made = net("float[n,t] x -> float[m,5] y", "h = MatMul(w1, x) r = Reshape(h, s) y = MatMul(r, w2)", w1=(6, 3), s=ints(0, 4), w2=(4, 5))
    result = spa.prune(made, 0.5, multiple_of=1, inputs={"x": [3, 4]}, protect_outputs=False)
    assert result.plan.trace["inputs"] == {"x": [3, 4]}
