"""Equal split of MLPs, ranks as part of a plan, and `spa rewrite` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from test_cli import refused, run
from test_exact import HALF, equal, separate, stacked, stored
from test_trace import ints, net

import spa
from passes import split_branches
from spa.errors import BadOption
from spa.exact.experts import branch_of, find_mlps
from spa.exact.flow import Flow
from spa.storage.store import load, to_bytes, to_proto


def gated() -> onnx.ModelProto:
    body = "g = MatMul(x, wg) u = MatMul(x, wu) a = Sigmoid(g) m = Mul(a, u) t = Transpose(wd) d = MatMul(m, t) y = Add(x, d)"
    return net("float[2,5,8] x -> float[2,5,8] y", body, wg=(8, 12), wu=(8, 12), wd=(8, 12))


def plain() -> onnx.ModelProto:
    body = "h = Gemm<transB=1>(x, w1, b1) e = Mul(h, half) r = Gelu(e) f = Reshape(r, flat) y = Gemm(f, w2, b2)"
    return net("float[4,8] x -> float[4,5] y", body, opset=20, w1=(12, 8), b1=(12,), w2=(12, 5), b2=(5,), half=HALF, flat=ints(4, 12))


def normed() -> onnx.ModelProto:
    return net("float[4,8] x -> float[4,5] y", "h = MatMul(x, w1) r = LayerNormalization(h, g) y = MatMul(r, w2)", w1=(8, 12), g=(12,),
               w2=(12, 5))


@pytest.mark.parametrize("make", [gated, plain])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_sum_to_the_whole(make: object, parts: int) -> None:
    model = make()  # type: ignore[operator]
    result = spa.rewritten(model, split_mlp=parts)
    assert [s.done for s in result.steps] == [parts]
    assert equal(model, result.model) < 1e-6
    onnx.checker.check_model(to_proto(result.model), full_check=True)
    widths = [g.size for g in spa.analyze(result.model).groups.free() if g.kind == "neuron"]
    assert widths == [12 // parts] * parts
    before = sum(a.size for n, a in stored(load(model)).items() if n != "flat")
    after = sum(a.size for n, a in stored(result.model).items() if "Reshape" not in n and "flat" not in n)
    assert before == after  # the second bias is added once


def test_what_does_not_split_says_why() -> None:
    for make, parts, says in ((plain, 5, "its 12 hidden channels do not make 5 equal parts"), (normed, 2, "a statistic runs over")):
        with pytest.raises(spa.NothingToPrune, match=says):
            spa.rewritten(make(), split_mlp=parts)


def test_the_pass_leaves_alone_what_it_split_before() -> None:
    analysis = spa.analyze(gated())
    mlps, left = find_mlps(Flow(analysis.groups))
    branch = branch_of(analysis.groups, mlps[0], 2)
    graph = analysis.normal.model.graph
    assert not left
    assert split_branches(graph, [branch]) == 1
    assert split_branches(graph, [branch]) == 0


def test_a_plan_with_ranks_can_be_applied_again(tmp_path: Path) -> None:
    onnx.save(separate(), tmp_path / "m.onnx")
    once = spa.prune(tmp_path / "m.onnx", qk_rank=2, vo_rank=0.5)
    once.save(tmp_path / "s.onnx", plan=tmp_path / "p.json")
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["trace"]["edits"] == [{"kind": "singular_basis", "qk": True, "vo": True}]
    assert written["options"] == {"ratio": None, "qk_rank": 2, "vo_rank": 0.5}
    assert {g: len(v["kept"]) for g, v in written["groups"].items()} == {"wq:1": 2, "wv:1": 2}
    again = spa.apply(tmp_path / "m.onnx", tmp_path / "p.json")
    assert to_bytes(again.model) == to_bytes(load(tmp_path / "s.onnx")) == to_bytes(once.model)


def test_ranks_go_with_a_ratio() -> None:
    both = spa.prune(separate(), 0.34, qk_rank=2, multiple_of=1)
    kept = {g: len(v["kept"]) for g, v in both.plan.groups.items()}
    assert kept["wq:1"] == 2
    assert len(kept) > 1


def test_one_width_for_all_is_cut_for_all() -> None:
    with pytest.raises(BadOption, match="share one width in this graph.*give --vo-rank the same as --qk-rank"):
        spa.prune(stacked(), qk_rank=2)
    result = spa.prune(stacked(), qk_rank=2, vo_rank=2)
    assert stored(result.model)["w"].shape == (12, 18)


def test_rewrite_on_the_command_line(tmp_path: Path) -> None:
    source, out = tmp_path / "m.onnx", tmp_path / "r.onnx"
    onnx.save(separate(), source)
    done = run("rewrite", source, "-o", out, "--all", "--json")
    data = json.loads(done.stdout)
    assert done.exit_code == 0
    assert [s["rewrite"] for s in data["steps"]] == ["key bias", "QK basis", "value bias", "VO basis"]
    assert data["proof"]["passed"]
    assert equal(separate(), load(out)) < 1e-5
    assert "it computes what it did" in run("rewrite", source, "-o", out, "--drop-key-bias").stdout
    says = "Nothing to rewrite: key bias at s0 was left alone because the keys have no bias."
    refused(tmp_path, "rewrite", out, "-o", tmp_path / "n.onnx", "--drop-key-bias", code=1, says=says)
    refused(tmp_path, "rewrite", source, "-o", tmp_path / "n.onnx", says="Which rewrite?")
    refused(tmp_path, "rewrite", source, "-o", source, "--all")
    refused(tmp_path, "rewrite", source, "-o", tmp_path / "n.onnx", "--split-mlp", 1, says="--split-mlp is 1")
    refused(tmp_path, "prune", source, "-o", tmp_path / "n.onnx", "--qk-rank", 9, says="more than the width of any head, which is 4")
    refused(tmp_path, "prune", source, "-o", tmp_path / "n.onnx", "--vo-rank", 0, says="--vo-rank is 0")
