"""PyTorch in every form: what comes out is what torch gives, with the sizes free that were asked for; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import refused, run

import spa
from spa.intake import converting
from spa.intake.frameworks import Origin
from spa.intake.remote import Here

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'spa-prune[torch]')")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install 'spa-prune[torch]')")
nets = pytest.importorskip("intake_nets")

FILE = Path(__file__).parent / "intake_nets.py"
IMAGE = {"image": (1, 3, 8, 8)}


class Near(Here):
    """A worker in this process, which has torch already."""

    def __init__(self, origin: Origin, wish: dict[str, Any]) -> None:
        super().__init__(origin.framework, origin.place, wish)


@pytest.fixture
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, without other processes."""
    monkeypatch.setattr(converting, "Remote", type("Near", (Near,), {"close": lambda self: None}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    return tmp_path


def shapes(model: spa.Model) -> list[Any]:
    return [list(t.shape) for t in (*model.graph.inputs, *model.graph.outputs)]


def test_a_live_module_is_converted_where_it_is() -> None:
    found = spa.convert(nets.seeded(), inputs=IMAGE)
    assert found.parity is not None
    assert found.parity.passed
    assert found.notes == ()
    assert shapes(found.model) == [["batch", 3, 8, 8], ["batch", 5]]
    assert [t.name for t in (*found.model.graph.inputs, *found.model.graph.outputs)] == ["image", "output"]
    assert len({s["image"][0] for s in found.parity.draws}) == 2  # another batch, too


@pytest.mark.parametrize(("dynamic", "given", "wanted"), [
    ("none", (1, 3, 8, 8), [[1, 3, 8, 8], [1, 5]]), ("batch", (2, 3, 8, 8), [["batch", 3, 8, 8], ["batch", 5]]),
    (None, ("n", 3, "h", "w"), [["n", 3, "h", "w"], ["n", 5]]),
])  # fmt: skip
def test_sizes_are_free_as_asked(dynamic: str | None, given: tuple[Any, ...], wanted: list[Any]) -> None:
    assert shapes(spa.convert(nets.seeded(), inputs={"image": given}, dynamic=dynamic).model) == wanted


@pytest.mark.parametrize("source", [f"{FILE}:seeded", f"{FILE}:with_inputs", "intake_nets:Net"])
def test_what_a_factory_makes(near: Path, source: str) -> None:
    found = spa.convert(source, inputs={} if "with_inputs" in source else IMAGE)
    assert found.framework.name == "torch"
    assert shapes(found.model)[0] == ["batch", 3, 8, 8]


def saved(folder: Path, kind: str) -> dict[str, Any]:
    """A file of each kind, with what `spa.convert` takes for it."""
    network, example = nets.seeded(), torch.zeros(2, 3, 8, 8)
    path = folder / f"net.{kind}"
    if kind == "pt2":
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, path)
        return {"source": path}
    if kind == "ts":
        torch.jit.trace(network, example).save(path)
    elif kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(network.state_dict(), path)
    else:
        torch.save(network if kind == "module.pt" else network.state_dict(), path)
    entry = "" if kind in ("ts", "module.pt") else f"{FILE}:Net"
    return {"source": path, "entry": entry, "trust": kind.endswith((".pt", "pth")), "inputs": [(1, 3, 8, 8)]}


@pytest.mark.parametrize(("kind", "name"), [
    ("pt2", "exported"), ("ts", "torchscript"), ("module.pt", "pickle"), ("state.pth", "pickle"), ("safetensors", "safetensors"),
])  # fmt: skip
def test_every_kind_of_file_gives_the_same_plan(near: Path, kind: str, name: str) -> None:
    found = spa.convert(**saved(near, kind))
    assert found.framework.name == name
    direct = spa.convert(nets.seeded(), inputs=IMAGE)
    plans = [spa.plan(f.model, 0.5, multiple_of=1) for f in (found, direct)]
    kept = [sorted((e["size"], tuple(e["kept"])) for e in p.groups.values()) for p in plans]
    assert kept[0] == kept[1]
    assert kept[0]
    image = np.random.default_rng(3).standard_normal((2, 3, 8, 8)).astype(np.float32)
    results = [next(iter(spa.proof.check.run(f.model, {f.model.graph.inputs[0].name: image}).values())) for f in (found, direct)]
    np.testing.assert_allclose(*results, atol=1e-5)


def test_a_branch_that_tracing_has_frozen_is_refused_with_its_layer(near: Path) -> None:
    with pytest.raises(spa.CheckFailed, match=r"output differs by .* part first at layer last") as refusal:
        spa.convert(f"{FILE}:Branch", inputs={"x": (2, 4)})
    assert refusal.value.exit_code == 1


def test_results_part_at_the_layer_that_was_converted_wrongly(near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nets.seeded()
    made = spa.convert(network, inputs=IMAGE).model
    with torch.no_grad():
        network.conv2.weight[0, 0, 1, 1] += 1
    wrong = near / "wrong.onnx"
    spa.save(made, wrong)
    monkeypatch.setattr(Here, "convert", lambda self, target: shutil.copy(wrong, target) and [])
    with pytest.raises(spa.CheckFailed, match=r"they part first at layer conv2 \(in ONNX from .*, on\)"):
        spa.convert(network, inputs=IMAGE)


def test_the_command_writes_the_model_and_says_how_well_it_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("convert", f"{FILE}:seeded", "-o", "net.onnx", "--input", "image:1x3x8x8", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["framework"] == "torch"
    assert data["parity"]["passed"]
    assert data["parity"]["largest_difference"] < 1e-5
    assert data["inputs"] == {"image": {"dtype": "float32", "shape": ["batch", 3, 8, 8]}}
    assert spa.prune("net.onnx", 0.5, multiple_of=1).after.macs < spa.prune("net.onnx", 0.5, multiple_of=1).before.macs


def test_what_is_refused(near: Path) -> None:
    torch.save(nets.seeded().state_dict(), "state.pth")
    torch.save(torch.nn.Linear(2, 2).state_dict(), "other.pth")
    Path("broken.pt2").write_bytes(b"PK\x03\x04 and no more")
    Path("notes.xyz").write_text("hello")
    Path("net.mlmodel").write_bytes(b"\x08\x01")
    made = ("-o", "out.onnx")
    refused(near, "convert", "state.pth", *made, says="loading a pickle runs whatever code lies in it")
    refused(near, "convert", "state.pth", *made, "--trust", says="say what makes it with --entry")
    refused(near, "convert", "other.pth", *made, "--trust", "--entry", f"{FILE}:Net", says="it lacks bn1.bias and 10 more")
    refused(near, "convert", "broken.pt2", *made, says="broken.pt2 can't be read as a torch.export model")
    refused(near, "convert", "notes.xyz", *made, says="none of what can be converted")
    refused(near, "convert", "gone.pt", *made, says="there is no such file")
    refused(near, "convert", "net.mlmodel", *made, says="is a Core ML model, which spa does not convert")
    refused(near, "convert", f"{FILE}:Net", *made, says="--input image:1x3x224x224")
    refused(near, "convert", f"{FILE}:needs", *made, "--input", "x:1x4", says="can't be called without arguments (width)")
    refused(near, "convert", f"{FILE}:absent", *made, says="intake_nets.py has no absent")
    refused(near, "convert", f"{FILE}:Sorts", *made, "--input", "x:4x4", says="PyTorch's converter can't convert")
    refused(near, "convert", f"{FILE}:Branch", *made, "--input", "x:2x4", code=1, says="does not give what PyTorch gives")
    refused(near, "convert", f"{FILE}:Net", *made, "--input", "image:1x3x0x8", says="axis of size 0")
    refused(near, "convert", f"{FILE}:Net", *made, "--from", "mxnet", says="is no framework; the choice is: auto, ")
    refused(near, "convert", f"{FILE}:Net", *made, "--dynamic", "all", says="batch, none, keep")


def test_a_missing_extra_gives_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from spa.intake import frameworks

    monkeypatch.chdir(tmp_path)
    rows = tuple(replace(r, modules=("no_such_framework",)) if r.name == "torch" else r for r in frameworks.FRAMEWORKS)
    monkeypatch.setattr(frameworks, "FRAMEWORKS", rows)
    says = "needs no_such_framework, which is not here: pip install 'spa-prune[torch]'"
    refused(tmp_path, "convert", f"{FILE}:Net", "-o", "o.onnx", says=says)
