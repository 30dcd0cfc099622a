"""Depth: what is a layer, which layers go, and that without them the network is the gated one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_trace import ints, net
from typer.testing import CliRunner

import spa
from spa.cli import app
from spa.errors import BadOption
from spa.layers.depth import Depth, choose_layers, without_layers
from spa.layers.gates import Gated, Unit, means
from spa.layers.replace_me import RIDGE
from spa.layers.sublayers import sub_layers
from spa.proof.check import run as run_model

D, H, T, V = 12, 3, 5, 11  # width, heads, tokens, classes
LENGTHS = {"s3": ints(0, 0, H, D // H), "s2": ints(0, 0, D)}


def attention(x: str, out: str, k: int) -> str:
    """Attention of value x, unfused, without a norm."""
    parts = "".join(f"{n}{k} = MatMul({x}, w{n}{k}) {n}s{k} = Reshape({n}{k}, s3) {n}t{k} = Transpose<perm={p}>({n}s{k}) "
                    for n, p in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])))
    return (parts + f"a{k} = MatMul(qt{k}, kt{k}) p{k} = Softmax<axis=-1>(a{k}) o{k} = MatMul(p{k}, vt{k}) "
            f"ot{k} = Transpose<perm=[0, 2, 1, 3]>(o{k}) of{k} = Reshape(ot{k}, s2) {out} = MatMul(of{k}, wo{k}) ")  # fmt: skip


def mlp(x: str, out: str, k: int) -> str:
    return f"u{k} = MatMul({x}, wu{k}) g{k} = Relu(u{k}) d{k} = MatMul(g{k}, wd{k}) {out} = Add(d{k}, bd{k}) "


def weights(k: int) -> dict[str, Any]:
    return {f"w{n}{k}": (D, D) for n in "qkvo"} | {f"wu{k}": (D, 20), f"wd{k}": (20, D), f"bd{k}": (D,)}


def decoder(layers: int = 3, parallel: bool = False, post: bool = False) -> onnx.ModelProto:
    """Blocks of attention and MLP; parallel: side by side; post: with norms behind the sums."""
    body, x = "x0 = MatMul(x, we) ", "x0"
    more: dict[str, Any] = {}
    for k in range(layers):
        more |= weights(k)
        if parallel:
            body += attention(x, f"A{k}", k) + mlp(x, f"M{k}", k) + f"c{k} = Add(A{k}, M{k}) x{k + 1} = Add(c{k}, {x}) "
        else:
            body += attention(x, f"A{k}", k)
            y = f"y{k}"
            if post:
                body += f"z{k} = Add({x}, A{k}) {y} = LayerNormalization<axis=-1>(z{k}, n{k}) "
                body += mlp(y, f"M{k}", k) + f"e{k} = Add({y}, M{k}) x{k + 1} = LayerNormalization<axis=-1>(e{k}, m{k}) "
                more |= {f"n{k}": np.ones(D, np.float32), f"m{k}": np.ones(D, np.float32)}
            else:
                body += f"{y} = Add({x}, A{k}) " + mlp(y, f"M{k}", k) + f"x{k + 1} = Add({y}, M{k}) "
        x = f"x{k + 1}"
    return net(f"float[n,{T},6] x -> float[n,{T},{V}] y", body + f"y = MatMul({x}, wh)", we=(6, D), wh=(D, V), **LENGTHS, **more)


def data(n: int = 3, size: int = 2, labels: bool = False) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(5)
    made = [{"x": random.standard_normal((size, T, 6)).astype(np.float32)} for _ in range(n)]
    for batch in made if labels else ():
        batch["labels"] = random.integers(0, V, (size, T))
    return made


def analysed(model: onnx.ModelProto, labels: bool = False, **more: Any) -> tuple[spa.Analysis, Any]:
    analysis = spa.analyze(model)
    from spa.data.evidence import Evidence

    return analysis, Evidence("data", data(labels=labels, **more), analysis.normal.model, False, "labels" if labels else None)


def zeroed(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """The same model with some weights zero."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    return made


def outputs(model: Any, feeds: Any) -> np.ndarray:
    return run_model(model if isinstance(model, spa.Model) else spa.load(model), feeds)["y"]


def inner(model: onnx.ModelProto, *values: str) -> list[dict[str, np.ndarray]]:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.graph.output.extend(onnx.ValueInfoProto(name=v) for v in values)
    for value in made.graph.output[1:]:
        value.type.tensor_type.elem_type = 1
    return [run_model(spa.load(made), feeds) for feeds in data()]


# ---------------------------------------------------------------------- what is a layer


def found(model: onnx.ModelProto) -> list[tuple[str, str, str, int]]:
    return [(s.kind, s.branch, s.total, s.block) for s in sub_layers(spa.analyze(model).groups).layers]


def test_attention_and_mlp_alternate_in_blocks() -> None:
    assert found(decoder(2)) == [("attention", "A0", "y0", 0), ("mlp", "M0", "x1", 0), ("attention", "A1", "y1", 1), ("mlp", "M1", "x2", 1)]
    (first, *_), dense = sub_layers(spa.analyze(decoder(2)).groups).layers, spa.count(spa.analyze(decoder(2)).groups)
    assert first.parameters == 4 * D * D
    left = spa.count(spa.analyze(decoder(2), edits=[sub_layers(spa.analyze(decoder(2)).groups).edit([first])]).groups)
    assert dense.parameters - left.parameters == first.parameters
    assert dense.macs - left.macs == first.macs


def test_parallel_branches_and_norms_behind_sums() -> None:
    assert [(k, b, t) for k, b, t, _ in found(decoder(1, parallel=True))] == [("attention", "A0", "x1"), ("mlp", "M0", "x1")]
    assert [(k, t) for k, _, t, _ in found(decoder(1, post=True))] == [("attention", "z0"), ("mlp", "e0")]


def test_sums_that_are_no_residuals() -> None:
    """Cubes of an activation function, two embeddings, a mask on scores, a shortcut with weights, an equal operand twice."""
    for body in ("h = MatMul(x, w) c = Mul(h, h) s = Add(h, c) y = MatMul(s, u)",
                 "a = MatMul(x, w) b = MatMul(x, v) s = Add(a, b) y = MatMul(s, u)",
                 "h = MatMul(x, w) s = Add(h, h) y = MatMul(s, u)", "h = MatMul(x, w) b = MatMul(h, r) s = Sub(b, h) y = MatMul(s, u)"):
        assert not found(net("float[2,6] x -> float[2,5] y", body, w=(6, 8), v=(6, 8), u=(8, 5), r=(8, 8)))
    mask = "h = MatMul(x, w) k = Transpose<perm=[1, 0]>(h) p = MatMul(h, k) m = Add(p, q) y = Softmax(m)"
    assert not found(net("float[8,6] x, float[8,8] q -> float[8,8] y", mask, w=(6, 8)))


def test_convolutions_nests_and_values_that_others_read() -> None:
    conv = "a = Conv<pads=[1,1,1,1]>(x, w) b = Conv<pads=[1,1,1,1]>(a, v) s = Add(a, b) y = Relu(s)"
    made = net("float[2,4,6,6] x -> float[2,4,6,6] y", conv, w=(4, 4, 3, 3), v=(4, 4, 3, 3))
    assert found(made) == [("branch", "b", "s", 0)]
    nest = "h = MatMul(x, w) a = MatMul(h, v) b = MatMul(a, r) c = Add(a, b) s = Add(h, c) t = MatMul(s, u) y = Relu(t)"
    assert [k for k, *_ in found(net("float[2,6] x -> float[2,5] y", nest, w=(6, 8), v=(8, 8), r=(8, 8), u=(8, 5)))] == ["mlp"]
    read = "h = MatMul(x, w) y = MatMul(h, v) s = Add(h, y) z = MatMul(s, u)"
    assert not found(net("float[2,6] x -> float[2,8] y, float[2,5] z", read, w=(6, 8), v=(8, 8), u=(8, 5)))


# ---------------------------------------------------------------------- dropping


@pytest.mark.parametrize("model", [decoder(), decoder(parallel=True), decoder(post=True)], ids=["pre", "parallel", "post"])
def test_dropped_is_gated_is_zeroed(model: onnx.ModelProto) -> None:
    analysis = spa.analyze(model)
    layers = sub_layers(analysis.groups)
    for chosen, zero in ((("A1",), ("wo1",)), (("M0", "M2"), ("wd0", "bd0", "wd2", "bd2")), (("A1", "M1"), ("wo1", "wd1", "bd1"))):
        gone = [s for s in layers.layers if s.branch in chosen]
        small = spa.analyze(model, edits=[layers.edit(gone)]).edited
        gated = Gated(analysis.normal.model, analysis.groups.traced, [Unit(s.branch, s.branch) for s in layers.layers])
        for feeds in data():
            wanted = outputs(zeroed(model, *zero), feeds)
            np.testing.assert_allclose(outputs(small, feeds), wanted, atol=1e-5)
            np.testing.assert_allclose(gated.run(feeds, chosen)["y"], wanted, atol=1e-5)
            np.testing.assert_allclose(gated.run(feeds)["y"], outputs(model, feeds), atol=1e-6)


def test_prune_drops_proves_and_records() -> None:
    result = spa.prune(decoder(), drop_layers=Depth(2, "random", "attention"), seed=3)
    assert result.check is not None
    assert result.check.passed
    assert not result.plan.groups
    record = result.plan.options["depth"]
    assert [s["kind"] for s in record["dropped"]] == ["attention"] * 2
    again = spa.apply(decoder(), spa.load_plan(json.loads(result.plan.to_json())))
    assert spa.storage.store.to_bytes(again.model) == spa.storage.store.to_bytes(result.model)
    assert result.after.parameters == spa.count(spa.analyze(decoder()).groups).parameters - 2 * 4 * D * D


def test_large_models_are_proven_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.proof import pieces

    monkeypatch.setattr(pieces, "WHOLE", 0)
    monkeypatch.setattr(pieces, "PIECE", 1000)
    result = spa.prune(decoder(), 0.5, multiple_of=1, drop_layers=Depth(("M1",)))
    assert result.check is not None
    assert result.check.passed


def test_a_wrong_removal_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.errors import CheckFailed
    from spa.plans import edits

    right = edits.KINDS["drop_branches"]

    def wrong(graph: Any, replace: Any, **_: Any) -> int:
        return int(right.change(graph, dict.fromkeys(replace, "x0")))

    monkeypatch.setitem(edits.KINDS, "drop_branches", edits.Kind(wrong, right.other))
    monkeypatch.setattr("inspect.Signature.bind", lambda *a, **k: None)
    with pytest.raises(CheckFailed, match="Removing and masking differ"):
        spa.prune(decoder(), drop_layers=Depth(("M1",)))


def test_layers_then_channels_then_repair() -> None:
    """COMP's staging."""
    result = spa.prune(decoder(), 0.5, multiple_of=1, drop_layers=Depth(1, "llm-drop"), calibration=calibration, repair="obspa")
    assert result.plan.groups
    assert len(result.plan.options["depth"]["dropped"]) == 1
    assert result.check is not None
    assert result.check.passed


def test_targets_are_shares_of_the_model_as_given() -> None:
    dense = spa.count(spa.analyze(decoder()).groups)
    result = spa.prune(decoder(), target="params=0.5", multiple_of=1, drop_layers=Depth(("M1",)))
    assert result.plan.groups
    assert 0.4 < result.after.parameters / dense.parameters <= 0.5
    alone = spa.prune(decoder(), target="macs=0.9", multiple_of=1, drop_layers=Depth(("M1", "A1")))
    assert not alone.plan.groups
    assert alone.after.macs < 0.9 * dense.macs
    analysis = spa.analyze(decoder(), edits=result.plan.trace["edits"])
    assert analysis.nbytes < analysis.given.nbytes - 4 * 2 * 20 * D


def calibration() -> Any:
    yield from data()


# ---------------------------------------------------------------------- methods, against their equations in numpy


def cosine_score(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.reshape(-1, D).astype(np.float64), y.reshape(-1, D).astype(np.float64)
    return float(1 - np.mean((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)))


def test_llm_drop_and_shortgpt() -> None:
    model = decoder()
    seen = inner(model, *[f"x{k}" for k in range(4)], *[f"y{k}" for k in range(3)])
    joined = {n: np.concatenate([s[n] for s in seen]) for n in seen[0]}
    analysis, evidence = analysed(model)
    got = choose_layers(analysis, Depth(2, "llm-drop"), evidence)
    wanted = {f"A{k}": cosine_score(joined[f"x{k}"], joined[f"y{k}"]) for k in range(3)}
    wanted |= {f"M{k}": cosine_score(joined[f"y{k}"], joined[f"x{k + 1}"]) for k in range(3)}
    by_branch = {s.branch: got.scores[s.name] for s in sub_layers(analysis.groups).layers}
    assert by_branch == pytest.approx(wanted, rel=1e-5)
    assert {s.branch for s in got.layers} == set(sorted(wanted, key=lambda n: wanted[n])[:2])
    blocks = choose_layers(analysis, Depth(1, "shortgpt"), evidence)
    influence = [cosine_score(joined[f"x{k}"], joined[f"x{k + 1}"]) for k in range(3)]
    assert [blocks.scores[f"block {k}"] for k in range(3)] == pytest.approx(influence, rel=1e-5)
    assert {s.block for s in blocks.layers} == {int(np.argmin(influence))}


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_finercut_is_greedy_by_js_divergence() -> None:
    model = decoder()
    zero = {f"A{k}": (f"wo{k}",) for k in range(3)} | {f"M{k}": (f"wd{k}", f"bd{k}") for k in range(3)}
    dense = [softmax(outputs(model, b).reshape(-1, V).astype(np.float64)) for b in data()]
    gone: list[str] = []
    costs: dict[str, float] = {}
    for _ in range(3):
        for name in zero:
            if name in gone:
                continue
            small = zeroed(model, *[w for n in (*gone, name) for w in zero[n]])
            parts = []
            for p, batch in zip(dense, data(), strict=True):
                q = softmax(outputs(small, batch).reshape(-1, V).astype(np.float64))
                m = (p + q) / 2
                parts.append(np.mean(0.5 * ((m * np.log(m / p)).sum(1) + (m * np.log(m / q)).sum(1))))
            costs[name] = float(np.mean(parts))
        gone.append(min((n for n in zero if n not in gone), key=lambda n: costs[n]))
    analysis, evidence = analysed(model)
    got = choose_layers(analysis, Depth(3), evidence)
    assert {s.branch for s in got.layers} == set(gone)
    by_branch = {s.branch: got.scores[s.name] for s in sub_layers(analysis.groups).layers}
    assert by_branch == pytest.approx(costs, rel=1e-3, abs=1e-7)


def test_two_ssp_is_greedy_by_loss() -> None:
    model = decoder()
    analysis, evidence = analysed(model, labels=True)
    got = choose_layers(analysis, Depth(1, "2ssp", "attention"), evidence)
    losses = {}
    for k in range(3):
        rows = [(softmax(outputs(zeroed(model, f"wo{k}"), {"x": b["x"]}).astype(np.float64)), b["labels"]) for b in data(labels=True)]
        losses[f"A{k}"] = float(np.mean([-np.log(np.take_along_axis(q, y[..., None], -1)).mean() for q, y in rows]))
    by_branch = {s.branch: got.scores.get(s.name) for s in sub_layers(analysis.groups).layers}
    assert {k: by_branch[k] for k in losses} == pytest.approx(losses, rel=1e-5)
    assert [s.branch for s in got.layers] == [min(losses, key=lambda n: losses[n])]
    with pytest.raises(BadOption, match="labels"):
        choose_layers(*_swap(analysed(model), Depth(1, "2ssp")))


def _swap(pair: tuple[Any, Any], depth: Depth) -> tuple[Any, Depth, Any]:
    return pair[0], depth, pair[1]


def test_replace_me_folds_the_ridge_map() -> None:
    model = decoder()
    analysis, evidence = analysed(model)
    small, _, got = without_layers(analysis, Depth(1, "replaceme"), evidence)
    run = got.layers[0].block
    assert run > 0
    i = run - 1
    seen = inner(model, f"M{i}", f"x{i + 1}", f"x{i + 2}")
    m, x, y = (np.concatenate([s[n] for s in seen]).reshape(-1, D).astype(np.float64) for n in (f"M{i}", f"x{i + 1}", f"x{i + 2}"))
    gram = m.T @ m
    t = np.linalg.solve(gram + RIDGE * np.trace(gram) / D * np.eye(D), m.T @ (y + m - x))
    arrays = {a.name: numpy_helper.to_array(a) for a in model.graph.initializer}
    kept = {a.name: numpy_helper.to_array(a) for a in spa.storage.store.to_proto(small.edited).graph.initializer}
    np.testing.assert_allclose(kept[f"wd{i}"], arrays[f"wd{i}"] @ t, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(kept[f"bd{i}"], arrays[f"bd{i}"] @ t, rtol=1e-3, atol=1e-4)
    assert f"wd{run}" not in kept
    distance = {k: cosine_score(*(np.concatenate([s[f"x{j}"] for s in inner(model, *[f"x{j}" for j in range(4)])]) for j in (k, k + 1)))
                for k in (1, 2)}  # fmt: skip
    assert min(distance, key=lambda k: distance[k]) == run
    assert not small.left_out
    result = spa.prune(model, drop_layers=Depth(1, "replaceme"), calibration=calibration)
    assert any("maps" in edit for edit in result.plan.trace["edits"])
    bare = spa.apply(model, result.plan)
    assert "left out" in bare.analysis.left_out[0]
    again = spa.apply(model, result.plan, calibration=calibration)
    assert not again.analysis.left_out
    assert spa.storage.store.to_bytes(again.model) == spa.storage.store.to_bytes(result.model)


# ---------------------------------------------------------------------- modes, refusals, the command line


def test_modes_of_gates() -> None:
    model = decoder()
    analysis = spa.analyze(model)
    branches = [s.branch for s in sub_layers(analysis.groups).layers]
    units = [Unit(b, b) for b in branches]
    batch, other = data()[:2]
    mean = Gated(analysis.normal.model, analysis.groups.traced, units, mode="mean")
    mean.others = means(analysis.normal.model, analysis.groups.traced, branches, data())
    seen = np.concatenate([s["M1"] for s in inner(model, "M1")])
    np.testing.assert_allclose(mean.others["M1"].ravel(), seen.mean((0, 1)), atol=1e-6)
    swapped = Gated(analysis.normal.model, analysis.groups.traced, units, mode="swap")
    there = inner(model, "M2")[1]
    np.testing.assert_allclose(swapped.run(batch, ["M2"], {"M2": there["M2"]})["y"], swapped_by_hand(model, batch, there["M2"]), atol=1e-5)
    np.testing.assert_allclose(swapped.run(other, ["M2"], {"M2": there["M2"]})["y"], outputs(model, other), atol=1e-5)


def swapped_by_hand(model: onnx.ModelProto, batch: Any, branch: np.ndarray) -> np.ndarray:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.graph.output.append(onnx.helper.make_tensor_value_info("y2", 1, None))
    arrays = {a.name: numpy_helper.to_array(a) for a in model.graph.initializer}
    return np.asarray((run_model(spa.load(made), batch)["y2"] + branch) @ arrays["wh"])


@pytest.mark.parametrize("depth, words", [
    ({"drop": 99}, "ask for fewer"), ({"drop": 0}, "number of layers"), ({"drop": 1.5}, "number of layers"),
    ({"drop": 1, "method": "x"}, "no method"),
    ({"drop": 1, "kind": "x"}, "--layer-kind"), ({"drop": ("nothing",)}, "no layer 'nothing'"),
    ({"drop": 1, "kind": "branch"}, "no layers of"),
    ({"drop": 1, "method": "llm-drop"}, "give some with --calibration"), ({"drop": 1, "spare": 2}, "spared"),
])  # fmt: skip
def test_refusals(depth: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption, match=words):
        choose_layers(spa.analyze(decoder(2)), Depth(**depth), None)


def test_command_line(tmp_path: Path) -> None:
    onnx.save(decoder(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=data(1, 8)[0]["x"])
    listed = CliRunner().invoke(app, ["inspect", str(tmp_path / "m.onnx"), "--layers", "--json"])
    assert [s["kind"] for s in json.loads(listed.stdout)["layers"]] == ["attention", "mlp"] * 3
    out, plan = str(tmp_path / "small.onnx"), str(tmp_path / "small.plan.json")
    base = ["prune", str(tmp_path / "m.onnx"), "-o", out, "--no-bench", "--json", "--drop-layers"]
    for end in ("md", "html", "json"):
        told = ["--report", str(tmp_path / f"report.{end}")]
        made = CliRunner().invoke(app, [*base, "0.3", "--layers", "llm-drop", "--calibration", str(tmp_path / "d.npz"), *told])
        assert made.exit_code == 0, made.output
        text = (tmp_path / f"report.{end}").read_text()
        assert "Layers dropped" in text or '"depth"' in text
    assert made.exit_code == 0, made.output
    assert len(json.loads(made.stdout)["depth"]["dropped"]) == 2
    checked = CliRunner().invoke(app, ["check", str(tmp_path / "m.onnx"), out, "--plan", plan])
    assert checked.exit_code == 0, checked.output
    refused = CliRunner().invoke(app, [*base, "9", "--layers", "random"])
    assert refused.exit_code == 2
    assert "ask for fewer" in refused.output
