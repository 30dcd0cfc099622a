"""Turned residual streams: the same function, energy in falling order, exact where the rest is zero; and what can't be turned says why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import spa
from spa import cli
from spa.errors import BadOption
from spa.exact.stream import NotTurnable
from spa.proof.check import run

IDS, WIDTH, RANK, LENGTH = 24, 8, 4, 6
IDS_FED = [{"ids": np.random.default_rng(i).integers(0, IDS, (2, LENGTH))} for i in range(4)]


class Net:
    """A pre-norm network of two blocks: ids -> table -> + MLP -> + MLP -> norm -> head."""

    def __init__(self, norm: str, *, rank: int = WIDTH, tied: bool = False, between: str = "", post: bool = False) -> None:
        self.rng, self.nodes, self.held = np.random.default_rng(0), [], []
        basis = np.linalg.qr(self.rng.standard_normal((WIDTH, WIDTH)))[0][:, :rank]
        self.project = basis @ basis.T  # what writers write lies in a subspace
        self.norm_kind = norm
        self.weight("table", (IDS, WIDTH), writes=True)
        x = self.node("Gather", "table", "ids")
        if between:
            x = self.node(between, x)
        for i in range(2):
            branch = self.node("MatMul", x if post else self.norm(x, f"norm{i}"), self.weight(f"up{i}", (WIDTH, 12)))
            branch = self.node("Add", self.node("Relu", self.node("Add", branch, self.weight(f"b{i}", (12,)))), self.number(0.1))
            down = self.node("MatMul", branch, self.weight(f"down{i}", (12, WIDTH), writes=True))
            x = self.node("Add", x, self.node("Add", self.weight(f"c{i}", (WIDTH,), writes=True), down))
            x = self.norm(x, f"post{i}") if post else x
        head = self.node("Transpose", "table", perm=[1, 0]) if tied else self.weight("head", (WIDTH, 5))
        self.node("MatMul", x if post else self.norm(x, "last"), head, out="y")

    def node(self, op: str, *inputs: str, out: str = "", **attrs: Any) -> str:
        name = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], f"n{len(self.nodes)}", **attrs))
        return name

    def weight(self, name: str, shape: tuple[int, ...], *, writes: bool = False, positive: bool = False) -> str:
        values = self.rng.standard_normal(shape)
        values = values @ self.project if writes else np.abs(values) + 0.5 if positive else values
        self.held.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def number(self, value: float) -> str:
        self.held.append(numpy_helper.from_array(np.array(value, np.float32), f"k{len(self.held)}"))
        return self.held[-1].name

    def norm(self, x: str, name: str) -> str:
        scale = self.weight(f"{name}.scale", (WIDTH,), positive=True)
        if self.norm_kind == "LayerNormalization":
            return self.node("LayerNormalization", x, scale, self.weight(f"{name}.bias", (WIDTH,)), axis=-1, epsilon=1e-3)
        if self.norm_kind == "SimplifiedLayerNormalization":
            return self.node("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=1e-3)
        steps = self.norm_kind == "LayerNorm in steps"
        if steps:
            x = self.node("Sub", x, self.node("ReduceMean", x, axes=[-1]))
        square = self.node("Pow", x, self.number(2.0)) if steps else self.node("Mul", x, x)
        root = self.node("Sqrt", self.node("Add", self.node("ReduceMean", square, axes=[-1]), self.number(1e-3)))
        if not steps:
            return self.node("Mul", scale, self.node("Mul", x, self.node("Reciprocal", root)))
        return self.node("Add", self.node("Mul", self.node("Div", x, root), scale), self.weight(f"{name}.bias", (WIDTH,)))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "net", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", LENGTH])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], self.held,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


NORMS = ["LayerNormalization", "SimplifiedLayerNormalization", "LayerNorm in steps", "RMSNorm in steps"]


def outputs(model: Any) -> np.ndarray:
    opened = spa.load(model) if isinstance(model, onnx.ModelProto) else model
    return np.concatenate([np.asarray(run(opened, feeds)["y"]) for feeds in IDS_FED])


@pytest.mark.parametrize("norm", NORMS)
def test_the_turned_network_computes_the_same(norm: str) -> None:
    model = Net(norm).model()
    turned = spa.rotated(model, IDS_FED)
    assert turned.check is not None
    assert turned.check.worst < 1e-5
    dense = outputs(model)
    assert np.abs(outputs(turned.model) - dense).max() < 1e-5 * np.abs(dense).max()
    assert (np.diff(turned.energies) <= 1e-12).all()
    assert turned.energies.sum() == pytest.approx(1)
    operators = {n.op for n in turned.model.graph.nodes}
    assert not operators & {"LayerNormalization", "SimplifiedLayerNormalization", "ReduceMean", "Sub"}


@pytest.mark.parametrize("norm", NORMS)
def test_positions_without_energy_go_for_nothing(norm: str) -> None:
    """Writers that fill half of the positions' space: the other half goes, and the outputs stay, since norms keep the old width."""
    model = Net(norm, rank=RANK).model()
    turned = spa.rotated(model, IDS_FED)
    needed = RANK + 1 if "Layer" in norm and "Simplified" not in norm else RANK  # taking the mean off may leave the subspace
    small = spa.prune(turned.model, 1 - needed / WIDTH, criterion="position", include=[turned.group], multiple_of=1)
    assert small.plan.groups[turned.group] == {"size": WIDTH, "kept": list(range(needed))}
    assert small.check is not None
    assert small.check.passed
    dense = outputs(model)
    assert np.abs(outputs(small.model) - dense).max() < 1e-4 * np.abs(dense).max()


def test_the_mean_that_is_taken_off_costs_no_position() -> None:
    turned = spa.rotated(Net("LayerNormalization").model(), IDS_FED)
    assert turned.energies[-1] < 1e-6 < turned.energies[-2]


def test_a_tied_table_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["spa.graph.normalize"], "SHARED", 64)
    model = Net("RMSNorm in steps", tied=True).model()
    turned = spa.rotated(model, IDS_FED)
    assert turned.check is not None
    assert turned.check.worst < 1e-5
    held = [t for t in spa.storage.store.to_proto(turned.model).graph.initializer if list(t.dims) in ([IDS, WIDTH], [WIDTH, IDS])]
    assert len(held) == 1
    small = spa.prune(turned.model, 0.5, criterion="position", include=[turned.group])
    assert small.check is not None
    assert small.check.passed
    with pytest.raises(NotTurnable, match=r"\(tied\), and its norms take a mean off"):
        spa.rotated(Net("LayerNormalization", tied=True).model(), IDS_FED)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Net("RMSNorm in steps", between="Relu"), "Relu n1 means something else in another basis"),
        (Net("RMSNorm in steps", between="Softmax"), "Softmax n1"),
        (Net("LayerNormalization", post=True), "past the norm that takes its mean off"),
        (Net("RMSNorm in steps", post=True), "scaled"),
    ],
)
def test_what_looks_at_single_elements_is_refused(net: Net, words: str) -> None:
    with pytest.raises(NotTurnable, match=words):
        spa.rotated(net.model(), IDS_FED, group="table:1")


def test_other_refusals() -> None:
    model = Net("RMSNorm in steps").model()
    with pytest.raises(BadOption, match="no group 'nothing'"):
        spa.rotated(model, IDS_FED, group="nothing")
    with pytest.raises(BadOption, match="no residual stream|can't be turned"):
        spa.rotated(model, IDS_FED, group="up0:1")
    with pytest.raises(BadOption, match="give some with --calibration"):
        spa.rotated(model, None)


def test_the_command(tmp_path: Path) -> None:
    model, data, out = tmp_path / "model.onnx", tmp_path / "ids.npz", tmp_path / "turned.onnx"
    onnx.save(Net("LayerNormalization").model(), model)
    np.savez(data, ids=np.concatenate([feeds["ids"] for feeds in IDS_FED]))

    def spa_(*words: Any) -> Any:
        return CliRunner().invoke(cli.app, [str(w) for w in words])

    for words, said in ((("--rotate",), "go together"), (("--rotate", "--all", "--calibration", data), "goes alone")):
        refused = spa_("rewrite", model, *words, "-o", out)
        assert refused.exit_code == 2
        assert said in refused.output
        assert not out.exists()
    done = spa_("rewrite", model, "--rotate", "--calibration", data, "-o", out)
    assert done.exit_code == 0, done.output
    assert "table:1, 8 positions" in done.output
    cut = spa_("prune", out, "--criterion", "position", "--include", "table:1", "--no-bench", "-o", tmp_path / "small.onnx")
    assert cut.exit_code == 0, cut.output


def test_turned_and_cut_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `spa rewrite --rotate` and `spa prune --criterion position` come to."""
    monkeypatch.chdir(tmp_path)
    onnx.save(Net("LayerNormalization", rank=RANK).model(), "m.onnx")
    np.savez("d.npz", ids=np.concatenate([feeds["ids"] for feeds in IDS_FED]))

    def spa_(*words: Any) -> Any:
        return CliRunner().invoke(cli.app, [str(w) for w in words])

    asked = ("--ratio", "0.375", "--multiple-of", "1", "--no-bench")
    done = spa_("prune", "m.onnx", "-o", "one.onnx", "--rotate", "--calibration", "d.npz", *asked)
    assert done.exit_code == 0, done.output
    assert "no plan was written" in " ".join(done.output.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz", "m.onnx", "one.onnx"]
    assert spa_("rewrite", "m.onnx", "-o", "turned.onnx", "--rotate", "--calibration", "d.npz").exit_code == 0
    assert spa_("prune", "turned.onnx", "-o", "two.onnx", "--criterion", "position", "--include", "table:1", *asked).exit_code == 0
    dense, one, two = (outputs(spa.load(name)) for name in ("m.onnx", "one.onnx", "two.onnx"))
    assert np.abs(one - two).max() < 1e-6 * np.abs(dense).max()
    assert np.abs(one - dense).max() < 1e-4 * np.abs(dense).max()  # what went carries no energy
    for words, said in (((), "--rotate and --calibration go together"), (("--calibration", "d.npz"), "say by how much"),
                        (("--calibration", "d.npz", "--ratio", "0.5", "--criterion", "l1"), "leave out --criterion"),
                        (("--calibration", "d.npz", "--ratio", "0.5", "--plan-out", "p.json"), "leave out --plan-out")):  # fmt: skip
        refused = spa_("prune", "m.onnx", "-o", "no.onnx", "--rotate", *words)
        assert refused.exit_code == 2, refused.output
        assert said in " ".join(refused.output.split())
        assert not Path("no.onnx").exists()


def test_the_input_is_left_alone() -> None:
    model = Net("LayerNormalization").model()
    before = model.SerializeToString(deterministic=True)
    spa.rotated(model, IDS_FED)
    assert model.SerializeToString(deterministic=True) == before
