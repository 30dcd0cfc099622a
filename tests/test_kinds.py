"""Kinds of groups: found by what dims do, whatever anything is called; and what options make of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_groups import IMAGE, TOKENS, attention, grouped_queries
from test_trace import groups_of, ints, net
from typer.testing import CliRunner

import spa
from models import weightless
from spa.cli import app
from spa.errors import BadOption
from spa.graph.kinds import KINDS, SIDES

ROOT = Path(__file__).parents[1]
GRAPHS = ROOT / "models" / "zoo"

MLP = "h = MatMul(x, w1) g = Gelu(h) y = MatMul(g, w2)"
GATED = "h = MatMul(x, w1) g = Sigmoid(h) u = MatMul(x, w3) m = Mul(g, u) y = MatMul(m, w2)"
TANH_GELU = "h = MatMul(x, w1) h3 = Mul(h, h) g = Add(h, h3) y = MatMul(g, w2)"  # adds data up, of one maker
STREAM = """
 e = MatMul(x, w0) n = LayerNormalization(e, s) h = MatMul(n, w1) r = Relu(h) d = MatMul(r, w2) a = Add(e, d)
 m = LayerNormalization(a, s) y = MatMul(m, w3)"""
EXPERTS = "u = Unsqueeze(x, zero) h = MatMul(u, w1) r = Relu(h) d = MatMul(r, w2) y = ReduceSum<keepdims=0>(d, zero)"
LOOKED_UP = "e = Gather(t, i) h = MatMul(e, w1) y = MatMul(h, w2)"
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {
    "neuron": (TOKENS, MLP, {"w1": (16, 24), "w2": (24, 16)}, {"w1:1": "neuron"}),
    "gated neuron": (TOKENS, GATED, {"w1": (16, 24), "w2": (24, 16), "w3": (16, 24)}, {"w1:1": "neuron"}),
    "a sum of data of one maker is no residual": (TOKENS, TANH_GELU, {"w1": (16, 24), "w2": (24, 16)}, {"w1:1": "neuron"}),
    "residual": (TOKENS, STREAM, {"w0": (16, 20), "s": (20,), "w1": (20, 24), "w2": (24, 20), "w3": (20, 16)},
                 {"w0:1": "residual", "w1:1": "neuron"}),
    "channel": (IMAGE, "a = Conv(x, w1) b = Conv(a, w2) c = Conv(b, w3) d = Add(a, c) y = Conv(d, w4)",
                {"w1": (8, 3, 1, 1), "w2": (6, 8, 1, 1), "w3": (8, 6, 1, 1), "w4": (5, 8, 1, 1)}, {"w1:0": "channel", "w2:0": "channel"}),
    "experts": (TOKENS, EXPERTS, {"w1": (4, 1, 16, 24), "w2": (4, 1, 24, 16), "zero": ints(0)},
                {"w1:0": "expert", "w1:3": "expert-neuron"}),
    "rows": ("int64[2,7] i -> float[2,7,5] y", LOOKED_UP, {"t": (50, 16), "w1": (16, 24), "w2": (24, 5)},
             {"t:0": "vocabulary", "t:1": "neuron", "w1:1": "neuron", "w2:1": "output"}),
    "recurrent": ("float[6,2,4] x -> float[6,2,5] y", "o, h, c = LSTM<hidden_size=8>(x, w, r) s = Squeeze(o, one) y = MatMul(s, w2)",
                  {"w": (1, 32, 4), "r": (1, 32, 8), "one": ints(1), "w2": (8, 5)}, {"w:1#2": "recurrent"}),
}  # fmt: skip


def kinds(model: onnx.ModelProto) -> dict[str, str]:
    return {g.name: g.kind for g in groups_of(model).groups}


@pytest.mark.parametrize("case", CASES)
def test_kinds_of_small_models(case: str) -> None:
    values, body, weights, expected = CASES[case]
    opset = 20 if "Gelu(" in body else 17
    found = kinds(net(values, body, opset, **weights))
    assert {name: found[name] for name in expected} == expected


def test_heads_and_their_widths() -> None:
    assert {n: k for n, k in kinds(attention()).items() if n in ("wq:1", "wq:1#2", "wv:1")} == {
        "wq:1": "qk", "wq:1#2": "head", "wv:1": "vo"}  # fmt: skip


def test_key_value_groups_and_the_queries_in_them() -> None:
    found = kinds(grouped_queries())
    assert [found[n] for n in ("wq:1", "wq:1#2", "wq:1#3", "wv:1")] == ["query", "key-value", "qk", "vo"]


def fused(op: str) -> onnx.ModelProto:
    separate = f"q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) o = {op}(q, k, v) y = MatMul(o, wo)"
    shared = op.startswith("Attention")
    return net(TOKENS, separate, 23 if shared else 17, wq=(16, 24), wk=(16, 12 if shared else 24), wv=(16, 12 if shared else 24),
               wo=(24, 16))  # fmt: skip


@pytest.mark.parametrize("op, expected", [
    ("Attention<q_num_heads=4, kv_num_heads=2>", {"key-value", "query", "qk", "vo"}),
    ("com.microsoft.MultiHeadAttention<num_heads=4>", {"head", "qk", "vo"}),
])  # fmt: skip
def test_fused_operators_say_what_their_dims_are(op: str, expected: set[str]) -> None:
    assert {g.kind for g in groups_of(fused(op)).free()} == expected


def test_a_cache_of_keys_and_values_ties_both_widths() -> None:
    body = "o{} = com.microsoft.Attention<num_heads=4>(x, w, b) y = MatMul(o, wo)"
    weights = {"w": (16, 72), "b": (72,), "wo": (24, 16)}
    assert {g.kind for g in groups_of(net(TOKENS, body.format(""), **weights)).free()} == {"head", "qk", "vo"}
    assert {g.kind for g in groups_of(net(TOKENS, body.format(", cache"), **weights)).free()} == {"head", "head-width"}


ZOO = {
    "gpt2.script": {"residual", "head", "qk", "vo", "neuron"},
    "llama.dynamo": {"residual", "key-value", "query", "qk", "vo", "neuron"},
    "swin.dynamo": {"residual", "head", "head-width", "neuron"},
    "mixer.script": {"residual", "neuron"},
    "resnext.script": {"channel"},
    "unet.dynamo": {"channel"},
}


@pytest.mark.parametrize("name", ZOO)
def test_kinds_of_the_zoo(name: str) -> None:
    found = groups_of(weightless.load(GRAPHS / f"{name}.onnx.xz"))
    assert {g.kind for g in found.free()} == ZOO[name]
    assert all(g.kind in KINDS for g in found.groups)


def test_roles_in_the_table_are_kinds() -> None:
    text = "".join(p.read_text() for p in (ROOT / "spa" / "signatures").glob("*.py"))
    listed = re.findall(r"(?:roles=|ROLES = )\{([^}]*)\}", text)
    named = {role for mapping in listed for role in re.findall(r': "([^"]+)"', mapping)}
    assert named
    assert named <= {*KINDS, *SIDES}


# ---------------------------------------------------------------------- options


def pruned(model: onnx.ModelProto, **options: Any) -> dict[str, int]:
    result = spa.prune(model, 0.5, multiple_of=1, **options)
    return {g.kind: g.size - len(result.plan.groups[g.name]["kept"]) for g in result.analysis.groups.groups if g.name in result.plan.groups}


@pytest.fixture(scope="module")
def gpt2() -> onnx.ModelProto:
    return weightless.load(GRAPHS / "gpt2.script.onnx.xz")


@pytest.mark.parametrize("unit, gone", [("head", 2), ("qk", 6), ("vo", 6), ("neuron", 96), ("residual", 24)])
def test_each_unit_alone_equals_masking(gpt2: onnx.ModelProto, unit: str, gone: int) -> None:
    assert pruned(gpt2, units=[unit]) == {unit: gone}


def test_several_units_and_patterns_of_kinds(gpt2: onnx.ModelProto) -> None:
    assert pruned(gpt2, units=["head", "neuron"]) == {"head": 2, "neuron": 96}
    assert pruned(gpt2, include=["kind:head"]) == {"head": 2}
    assert pruned(gpt2, exclude=["kind:residual", "kind:neuron", "kind:qk", "kind:vo"]) == {"head": 2}
    assert pruned(gpt2, units=["head", "neuron"], ratios={"kind:head": 0.25}) == {"head": 1, "neuron": 96}


def test_a_kind_that_the_model_lacks_is_refused_with_those_it_has(gpt2: onnx.ModelProto) -> None:
    with pytest.raises(BadOption, match="'expert' is no kind of group that may shrink here; the model has: head, qk, vo, neuron, residual"):
        spa.plan(gpt2, units=["expert"])
    with pytest.raises(BadOption, match="'vocabulary' .* all of that kind are frozen"):
        spa.plan(gpt2, units=["vocabulary"])


def test_the_command_line(gpt2: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(gpt2, tmp_path / "m.onnx")
    files = [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "s.onnx")]
    made = CliRunner().invoke(app, ["prune", *files, "--units", "head, neuron", "--no-bench"])
    assert made.exit_code == 0, made.stderr
    assert re.search(r"neuron +192 +→ +96", made.stdout)
    assert not re.search(r"residual +\d", made.stdout)
    for given, says in (("heads", "there is no kind 'heads'; the choice is: head,"), (",", "--units is empty")):
        refused = CliRunner().invoke(app, ["plan", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "p.json"), "--units", given])
        assert refused.exit_code != 0
        assert says in " ".join(refused.stderr.split())


def test_positions_are_no_units() -> None:
    """A table of positions that is added to every row: frozen or not, its rows are no heads."""
    model = net("float[2,7,16] x -> float[2,7,16] y", "p = Add(x, t) h = MatMul(p, w1) y = MatMul(h, w2)", t=np.ones((7, 16), np.float32),
                w1=(16, 24), w2=(24, 16))  # fmt: skip
    assert {g.kind for g in groups_of(model).free()} == {"neuron"}
