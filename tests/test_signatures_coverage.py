"""Every operator of onnx is in the table, with a signature or with the cause of its freezing."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from spa.signatures import operators, rule_of
from tools.op_coverage import coverage_of, in_models, in_onnx, main

NEWEST = 28
"""Later operator sets are unknown to the table, and freeze."""

ZOO = sorted((Path(__file__).parent.parent / "models" / "zoo").glob("*.onnx.xz"))


def test_every_operator_of_onnx_is_known() -> None:
    later = {s.name for s in onnx.defs.get_all_schemas() if s.domain == "" and s.since_version > NEWEST}
    rows = [coverage_of(*key) for key in in_onnx()]
    assert [r for r in rows if r.state == "unknown" and r.op not in later] == []
    assert all(r.cause for r in rows if r.state == "frozen")
    assert sum(r.state == "signature" for r in rows) >= 181


def test_the_table_names_real_operators() -> None:
    """A misspelt name would never be found; what left the standard before opset 7 is named."""
    schemas = {("" if s.domain == "ai.onnx" else s.domain, s.name) for s in onnx.defs.get_all_schemas_with_history()}
    gone = {"ImageScaler", "ParametricSoftplus", "ScaledTanh", "SpatialBN", "SimplifiedLayerNormalization", "Trunc"}
    strange = {(d, op) for d, op in operators() if d in ("", "ai.onnx.ml")} - schemas
    assert {op for _, op in strange} <= gone


def test_the_zoo_is_known() -> None:
    rows = [coverage_of(*key, n) for key, n in in_models(ZOO).items()]
    assert rows
    assert [r.op for r in rows if r.state != "signature"] in ([], ["Range"])


def test_an_operator_nobody_knows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    node = onnx.helper.make_node("Mystery", ["x"], ["y"], domain="my.domain")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["y"], ["z"])], "body", [], [])
    branch = onnx.helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner)
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([node, branch], "g", [], [])).SerializeToString())
    assert main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "my.domain" in printed
    assert "3 operators: 1 signature, 1 frozen, 1 unknown" in printed


def test_domains_are_told_apart() -> None:
    assert rule_of("ai.onnx", "Relu") is rule_of("", "Relu")
    assert rule_of("my.domain", "Relu") is None
    refused = coverage_of("com.microsoft", "NhwcFusedConv")
    assert refused.state == "frozen"
