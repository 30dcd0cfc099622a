"""Stepping: the same values as of a plain run, little is held, files go, and weights may change on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import ints, net

import spa
from spa.data.evidence import put
from spa.errors import UnsupportedModel
from spa.plans.rewrite import copy_graph
from spa.statistics.stepper import Stepper, tapped
from spa.storage.store import Model, to_proto, with_graph

BODY = """a = Conv <pads=[1,1,1,1]> (x, w1) r = Relu(a) b = Conv(r, w2) c = Conv(r, w3) d = Sigmoid(c) e = Mul(b, d)
  s, t = Split <axis=1> (e, sizes) u = Concat <axis=1> (t, r, s) v = Add(u, z) f = Flatten(v) g = MatMul(f, w4) y = Relu(g)"""
EVERY = ["a", "r", "b", "c", "d", "e", "s", "t", "u", "v", "f", "g", "y"]


def branching() -> onnx.ModelProto:
    return net("float[n,3,5,5] x, float[1] z -> float[n,4] y, float[n,8,5,5] d", BODY, w1=(8, 3, 3, 3), w2=(8, 8, 1, 1), w3=(8, 8, 1, 1),
               sizes=ints(3, 5), w4=(400, 4))


def opened(model: onnx.ModelProto) -> tuple[Model, dict[str, int]]:
    analysis = spa.analyze(model)
    model = with_graph(analysis.normal.model, copy_graph(analysis.normal.model.graph))
    return model, dict(analysis.groups.traced.facts.types)


def feeds(count: int = 3, n: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((n, 3, 5, 5)).astype(np.float32), "z": np.ones(1, np.float32)} for _ in range(count)]


def plain(model: onnx.ModelProto, batches: list[dict[str, np.ndarray]], names: list[str]) -> list[dict[str, np.ndarray]]:
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    session = spa.proof.check.session(spa.load(whole), threads=1)
    return [dict(zip(names, session.run(None, b), strict=True)) for b in batches]


def same(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]], names: list[str]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(names)
        for name in names:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "steps",
    [[[n] for n in EVERY], [["y"]], [["x"], ["r"], ["e", "u"], ["y"]], [["x", "c"], ["b"], ["u"], ["y"]], [["d", "r"], ["t"], ["g"]]],
)
@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_steps_give_what_a_run_gives(steps: list[list[str]], limit: int) -> None:
    model, batches = branching(), feeds(n=90)  # values of 64 KiB and more go to files
    expected = plain(model, batches, EVERY)
    expected = [{**e, **b} for e, b in zip(expected, batches, strict=True)]
    with Stepper(*opened(model), batches, limit=limit, threads=1) as stepper:
        for names in steps:
            same(stepper.step(names), expected, names)


def test_only_what_later_nodes_read_is_held() -> None:
    with Stepper(*opened(branching()), feeds(), threads=1) as stepper:
        stepper.step(["r"])
        assert set(stepper._held[0]) == {"r", "z"}  # x is done with
        stepper.step(["b"])
        assert set(stepper._held[0]) == {"r", "b", "z"}
        stepper.step(["u"])
        assert set(stepper._held[0]) == {"u", "z"}
        size = sum(v.nbytes for held in stepper._held for v in held.values())
        assert stepper._spill.used == size
        stepper.step(["y"])
        assert set(stepper._held[0]) == set()
        assert stepper._spill.used == 0


def test_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = spa.statistics.stepper.session

    def noted(model: Model, **options: int) -> object:
        ran.extend(n.outputs[0].name for n in model.graph.nodes)
        return real(model, **options)

    monkeypatch.setattr("spa.statistics.stepper.session", noted)
    with Stepper(*opened(branching()), feeds(), threads=1) as stepper:
        for name in EVERY:
            stepper.step([name])
    assert len(ran) == len(set(ran)) == len(EVERY) - 1  # one Split makes s and t


def test_files_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of 64 KiB wait in files, which go as soon as nothing reads them, and all of them at the end."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, batches = branching(), feeds(2, n=90)
    with Stepper(*opened(model), batches, limit=0, threads=1) as stepper:
        stepper.step(["r"])
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == 2
        stepper.step(["b"])
        assert len(list(folder.iterdir())) == 4
        found = stepper.step(["u"])
        same(found, plain(model, batches, ["u"]), ["u"])
        stepper.step(["g"])
        assert list(folder.iterdir()) == []
        stepper.step(["y"])
    assert list(tmp_path.iterdir()) == []
    batches[1]["x"] = batches[1]["x"][:, :2]
    with pytest.raises(UnsupportedModel), Stepper(*opened(model), batches, limit=0, threads=1) as stepper:
        stepper.step(["r"])
    assert list(tmp_path.iterdir()) == []


def test_the_callers_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration data may be mapped from files; those are not the stepper's to remove."""
    (tmp_path / "spill").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spill"))
    model, batches = branching(), feeds(2, n=90)
    np.save(tmp_path / "x.npy", np.concatenate([b["x"] for b in batches]))
    whole = np.load(tmp_path / "x.npy", mmap_mode="r")
    mapped = [{"x": whole[:90], "z": batches[0]["z"]}, {"x": np.asarray(whole[90:]), "z": batches[0]["z"]}]
    with Stepper(*opened(model), mapped, limit=0, threads=1) as stepper:
        for name in ("r", "u", "y"):
            same(stepper.step([name]), plain(model, batches, [name]), [name])
    assert (tmp_path / "x.npy").exists()


def test_below_the_limit_there_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Stepper(*opened(branching()), feeds(), threads=1) as stepper:
        stepper.step(["y"])
        assert list(tmp_path.iterdir()) == []


def test_weights_that_change_between_steps() -> None:
    model, batches = branching(), feeds()
    running, types = opened(model)
    fresh = np.random.default_rng(5).standard_normal((8, 8, 1, 1)).astype(np.float32)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for tensor in other.graph.initializer:
        if tensor.name == "w3":
            tensor.CopyFrom(numpy_helper.from_array(fresh, "w3"))
    with Stepper(running, types, batches, threads=1) as stepper:
        same(stepper.step(["b"]), plain(model, batches, ["b"]), ["b"])
        put(running.graph, "w3", fresh)
        put(running.graph, "w2", np.zeros((8, 8, 1, 1)))  # has been run: too late
        same(stepper.step(["e"]), plain(other, batches, ["e"]), ["e"])
        same(stepper.step(["y"]), plain(other, batches, ["y"]), ["y"])


def test_values_that_a_body_reads_are_held() -> None:
    body = """r = Relu(x) q = Sigmoid(r) k = ReduceSum(q) o = Greater(k, zero)
      y = If (o) <then_branch = t () => (float[2,4] i) { i = Add(r, r) }, else_branch = e () => (float[2,4] j) { j = Neg(q) }>"""
    model = net("float[2,4] x -> float[2,4] y", body, zero=np.float32(0))
    batches = [{"x": np.random.default_rng(i).standard_normal((2, 4)).astype(np.float32)} for i in range(2)]
    with Stepper(*opened(model), batches, threads=1) as stepper:
        stepper.step(["k"])
        assert {"r", "q"} <= set(stepper._held[0])
        same(stepper.step(["y"]), plain(model, batches, ["y"]), ["y"])


def test_a_part_of_a_model_is_a_model() -> None:
    model, types = opened(branching())
    part = tapped(model, model.graph, ["r", "z"], ["e", "b"], types)
    proto = to_proto(part)
    assert [n.op_type for n in proto.graph.node] == ["Conv", "Conv", "Sigmoid", "Mul"]
    assert [i.name for i in proto.graph.input] == ["r"]
    assert [o.name for o in proto.graph.output] == ["e", "b"]
    assert {t.name for t in proto.graph.initializer} == {"w2", "w3"}
    assert len(model.graph.nodes) == 12


def test_the_runtimes_words() -> None:
    wrong = [{"x": np.ones((4, 2, 5, 5), np.float32), "z": np.ones(1, np.float32)}]
    with Stepper(*opened(branching()), wrong, threads=1) as stepper, pytest.raises(UnsupportedModel, match="on the data: "):
        stepper.step(["y"])
