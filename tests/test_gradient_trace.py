"""TraceNAS's proxy, against the network written down in torch and the formula in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_depth import D, H, T, V, analysed, data, decoder, net
from typer.testing import CliRunner

import spa
from spa.cli import app
from spa.data.evidence import Evidence
from spa.errors import UnsupportedModel
from spa.layers.depth import Depth, choose_layers
from spa.layers.sublayers import sub_layers

torch = pytest.importorskip("torch", reason="gradients run in torch")


def logits(x: Any, w: dict[str, Any], blocks: int, gone: tuple[str, ...]) -> Any:
    """The decoder of test_depth, by hand. x (n, T, 6) -> (n, T, V)."""
    x = x @ w["we"]
    for k in range(blocks):
        if f"A{k}" not in gone:
            q, key, v = ((x @ w[f"w{n}{k}"]).reshape(-1, T, H, D // H).transpose(1, 2) for n in "qkv")
            x = x + (torch.softmax(q @ key.transpose(2, 3), -1) @ v).transpose(1, 2).reshape(-1, T, D) @ w[f"wo{k}"]
        if f"M{k}" not in gone:
            x = x + torch.relu(x @ w[f"wu{k}"]) @ w[f"wd{k}"] + w[f"bd{k}"]
    return x @ w["wh"]


def gradients(model: onnx.ModelProto, blocks: int, gone: tuple[str, ...], labels: bool) -> dict[str, np.ndarray]:
    """Of each sub-layer's matrices, of the mean loss over all rows; labels are the data's or what the whole network predicts."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    w = {n: torch.tensor(a, requires_grad=True) for n, a in stored.items() if a.dtype == np.float32}
    loss = 0.0
    for batch in data(labels=labels):
        x = torch.tensor(batch["x"])
        truth = torch.tensor(batch["labels"]) if labels else logits(x, w, blocks, ()).argmax(-1)
        loss = loss + torch.nn.functional.cross_entropy(logits(x, w, blocks, gone).reshape(-1, V), truth.reshape(-1)) / len(data())
    loss.backward()
    names = {f"A{k}": [f"w{n}{k}" for n in "kovq"] for k in range(blocks)} | {f"M{k}": [f"wd{k}", f"wu{k}"] for k in range(blocks)}
    return {b: np.concatenate([w[n].grad.numpy().ravel() for n in held]) for b, held in names.items() if b not in gone}


@pytest.mark.parametrize("labels", [True, False])
def test_tracenas_is_greedy_by_the_correlation_of_gradients(labels: bool) -> None:
    model, blocks = decoder(3), 3
    base = gradients(model, blocks, (), labels)

    def fitness(*gone: str) -> float:
        return sum(np.corrcoef(g, base[b])[0, 1] for b, g in gradients(model, blocks, gone, labels).items())

    gone: tuple[str, ...] = ()
    expected: dict[str, float] = {}
    for _ in range(2):
        expected |= {b: fitness(*gone) - fitness(*gone, b) for b in base if b not in gone}
        gone += (min((b for b in base if b not in gone), key=lambda b: expected[b]),)
    analysis, evidence = analysed(model, labels=labels)
    got = choose_layers(analysis, Depth(2, "tracenas"), evidence)
    layers = {s.name: s.branch for s in sub_layers(analysis.groups).layers}
    assert tuple(layers[n] for n in got.order) == gone
    assert {layers[n]: s for n, s in got.scores.items()} == pytest.approx(expected, rel=1e-3)


def test_all_layers_count_whatever_kind_may_go() -> None:
    analysis, evidence = analysed(decoder(2))
    every, some = (choose_layers(analysis, Depth(1, "tracenas", kind), evidence).scores for kind in ("any", "mlp"))
    assert some == {n: s for n, s in every.items() if n in some}
    assert len(some) == 2


def test_blocks_and_spared_ones_count() -> None:
    analysis, evidence = analysed(decoder(3))
    got = choose_layers(analysis, Depth(1, "tracenas", "block", spare=0.4), evidence)
    assert set(got.scores) == {"block 1", "block 2"}
    assert len(got.layers) == 2
    assert all(s > 0 for s in got.scores.values())  # two layers' own correlations, 1 each, and what the others lose


def test_layers_without_matrices_are_refused() -> None:
    body = "c = MatMul(x, w) v = DequantizeLinear(q, s) h = MatMul(c, v) z = Add(c, h) y = Relu(z)"
    made = net("float[2,4] x -> float[2,4] y", body, w=(4, 4), q=np.arange(16, dtype=np.int8).reshape(4, 4), s=np.float32(0.1))
    analysis = spa.analyze(made)
    seen = Evidence("data", [{"x": np.ones((2, 4), np.float32)}], analysis.normal.model, False)
    with pytest.raises(UnsupportedModel, match="no layer has one"):
        choose_layers(analysis, Depth(1, "tracenas", "mlp"), seen)


def test_command_line(tmp_path: Path) -> None:
    onnx.save(decoder(2), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.concatenate([b["x"] for b in data()]))
    asked = ["prune", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "s.onnx"), "--drop-layers", "1", "--layers", "tracenas", "--no-bench"]
    result = CliRunner().invoke(app, [*asked, "--calibration", str(tmp_path / "d.npz")])
    assert result.exit_code == 0, result.output
    assert spa.load_plan(tmp_path / "s.plan.json").options["depth"]["method"] == "tracenas"
