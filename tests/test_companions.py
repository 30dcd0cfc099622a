"""Files beside a language model: what is written beside the pruned one, and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from test_cli import refused
from test_cli import run as command
from test_state import cached
from test_trace import ints, net

import spa
from spa.errors import BadFile, BadOption, UnsupportedModel
from spa.graph.numbers import numbers_of
from spa.plans.companions import CONFIG, GENAI, find_companions
from spa.plans.plan import mask_of

WIDTH, HEADS, SHARED, DEPTH, NEURONS, TOKENS = 16, 4, 2, 6, 20, 30


def decoder(layers: int = 2) -> onnx.ModelProto:
    """Layers of attention (four heads on two key-value heads, with a cache) and an MLP on one residual stream, without norms' biases."""
    body, weights = ["h0 = Gather(table, ids)"], {"table": (TOKENS, WIDTH)}
    past, present = [], []
    for i in range(layers):
        kv = SHARED * DEPTH
        weights |= {f"wq{i}": (WIDTH, HEADS * DEPTH), f"wk{i}": (WIDTH, kv), f"wv{i}": (WIDTH, kv), f"wo{i}": (HEADS * DEPTH, WIDTH)}
        weights |= {f"up{i}": (WIDTH, NEURONS), f"down{i}": (NEURONS, WIDTH), f"s{i}": (WIDTH,), f"t{i}": (WIDTH,)}
        past += [f"float[n,{SHARED},p,{DEPTH}] past_{i}_{k}" for k in "kv"]
        present += [f"float[n,{SHARED},u,{DEPTH}] present_{i}_{k}" for k in "kv"]
        body.append(f"""a{i} = LayerNormalization(h{i}, s{i})
            q0{i} = MatMul(a{i}, wq{i}) q1{i} = Reshape(q0{i}, queries) q{i} = Transpose<perm=[0,2,1,3]>(q1{i})
            k0{i} = MatMul(a{i}, wk{i}) k1{i} = Reshape(k0{i}, shared) k{i} = Transpose<perm=[0,2,1,3]>(k1{i})
            v0{i} = MatMul(a{i}, wv{i}) v1{i} = Reshape(v0{i}, shared) v{i} = Transpose<perm=[0,2,1,3]>(v1{i})
            present_{i}_k = Concat<axis=2>(past_{i}_k, k{i}) present_{i}_v = Concat<axis=2>(past_{i}_v, v{i})
            ku{i} = Unsqueeze(present_{i}_k, two) ke{i} = Expand(ku{i}, twice) kr{i} = Reshape(ke{i}, whole)
            vu{i} = Unsqueeze(present_{i}_v, two) ve{i} = Expand(vu{i}, twice) vr{i} = Reshape(ve{i}, whole)
            kt{i} = Transpose<perm=[0,1,3,2]>(kr{i}) w{i} = MatMul(q{i}, kt{i}) p{i} = Softmax(w{i}) o{i} = MatMul(p{i}, vr{i})
            ot{i} = Transpose<perm=[0,2,1,3]>(o{i})
            oc{i} = Reshape(ot{i}, flat) oo{i} = MatMul(oc{i}, wo{i}) g{i} = Add(h{i}, oo{i})
            b{i} = LayerNormalization(g{i}, t{i}) m{i} = MatMul(b{i}, up{i}) r{i} = Relu(m{i}) d{i} = MatMul(r{i}, down{i})
            h{i + 1} = Add(g{i}, d{i})""")
    body.append(f"logits = MatMul(h{layers}, head)")
    return net(f"int64[n,s] ids, {', '.join(past)} -> float[n,s,{TOKENS}] logits, {', '.join(present)}", " ".join(body),
               head=(WIDTH, TOKENS), queries=ints(0, 0, HEADS, DEPTH), twice=ints(1, 1, HEADS // SHARED, 1, 1),
               whole=ints(0, HEADS, -1, DEPTH), shared=ints(0, 0, SHARED, DEPTH), two=ints(2), flat=ints(0, 0, -1), **weights)  # fmt: skip


HUGGING_FACE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "head_dim": DEPTH, "intermediate_size": NEURONS,
    "num_attention_heads": HEADS, "num_key_value_heads": SHARED, "num_hidden_layers": 2, "vocab_size": TOKENS, "rope_theta": 1e4,
}  # fmt: skip
RUNTIME = {
    "model": {
        "type": "llama", "vocab_size": TOKENS, "context_length": 64,
        "decoder": {
            "filename": "model.onnx", "hidden_size": WIDTH, "head_size": DEPTH, "num_attention_heads": HEADS,
            "num_key_value_heads": SHARED, "num_hidden_layers": 2,
            "inputs": {"past_key_names": "past_%d_k", "past_value_names": "past_%d_v"},
        },
    },
    "search": {"max_length": 64},
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with the model and its companions, and an empty one for the result; gives the model, and where the result goes."""
    dense, small = tmp_path / "dense", tmp_path / "small"
    dense.mkdir()
    small.mkdir()
    onnx.save(decoder(), dense / "model.onnx")
    (dense / CONFIG).write_text(json.dumps(HUGGING_FACE))
    (dense / GENAI).write_text(json.dumps(RUNTIME))
    (dense / "tokenizer.json").write_bytes(b'{"not": "looked at"} ')
    return dense / "model.onnx", small / "half.onnx"


def prune(model: Path, output: Path, *args: Any) -> Any:
    return command("prune", model, "-o", output, "--multiple-of", "1", "--no-bench", "--json", *args)


def written(output: Path, name: str) -> Any:
    return json.loads((output.parent / name).read_text())


def test_numbers_of_a_decoder() -> None:
    analysis = spa.analyze(decoder())
    found = numbers_of(analysis.groups, analysis.groups, mask_of(spa.plan(analysis, 0.5, multiple_of=1), analysis.groups))
    before = {name: number.before for name, number in found.items()}
    assert before["heads"] == (HEADS, HEADS)
    assert before["key-value heads"] == (SHARED, SHARED)
    assert before["width of keys"] == before["width of values"] == (DEPTH, DEPTH)
    assert (before["hidden width"], before["neurons"], before["layers"], before["tokens"]) == ((WIDTH,), (NEURONS,) * 2, (2,), (TOKENS,))
    assert found["neurons"].after == (NEURONS // 2,) * 2
    assert found["layers"].after == (2,)


def test_both_files_are_written_anew_and_the_rest_is_copied(folders: tuple[Path, Path]) -> None:
    model, output = folders
    made = prune(model, output, "--ratio", "0.5", "--exclude", "kind:qk", "--exclude", "kind:vo")
    assert made.exit_code == 0, made.output
    sizes = {"hidden_size": 8, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config, runtime = written(output, CONFIG), written(output, GENAI)
    heads = config["num_attention_heads"]
    assert heads in (1, 2)
    assert config == {**HUGGING_FACE, **sizes, "num_attention_heads": heads, "intermediate_size": 10}
    assert runtime["model"]["decoder"] == {
        **RUNTIME["model"]["decoder"], **sizes, "num_attention_heads": heads, "filename": "half.onnx",  # type: ignore[dict-item]
    }  # fmt: skip
    assert runtime["search"] == RUNTIME["search"]
    assert (output.parent / "tokenizer.json").read_bytes() == b'{"not": "looked at"} '
    assert json.loads(made.stdout)["companions"]["notes"] == []
    inputs = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(output).graph.input}
    assert inputs["past_0_k"][1] == config["num_key_value_heads"]
    assert inputs["past_1_v"][3] == config["head_dim"]


def test_widths_of_heads(folders: tuple[Path, Path]) -> None:
    model, output = folders
    assert prune(model, output, "--include", "kind:qk", "--include", "kind:vo").exit_code == 0
    assert written(output, CONFIG) == {**HUGGING_FACE, "head_dim": 3}
    assert written(output, GENAI)["model"]["decoder"]["head_size"] == 3


def test_a_width_that_was_worked_out_is_written_down(folders: tuple[Path, Path]) -> None:
    model, output = folders
    whole = {k: v for k, v in HUGGING_FACE.items() if k != "head_dim"}
    (model.parent / CONFIG).write_text(json.dumps({**whole, "num_attention_heads": HEADS}))
    assert prune(model, output, "--include", "kind:residual").exit_code == 0
    assert "head_dim" not in written(output, CONFIG)  # 16 are not 4 heads of 6: it was never worked out from these


def test_layers_that_differ_are_a_list_for_one_and_refused_for_the_other(folders: tuple[Path, Path]) -> None:
    model, output = folders
    refused(model.parents[1], *("prune", model, "-o", output, "--multiple-of", "1", "--no-bench", "--include", "wq0:1", "--no-check"),
            says="has one num_attention_heads for all layers, but they would differ")  # fmt: skip
    (model.parent / GENAI).unlink()
    made = prune(model, output, "--include", "wq0:1")
    assert made.exit_code == 0, made.output
    assert written(output, CONFIG)["num_key_value_heads"] == [1, 2]
    assert any("differs from layer to layer (1, 2)" in note for note in json.loads(made.stdout)["companions"]["notes"])


def test_keys_and_values_that_differ_in_width(folders: tuple[Path, Path]) -> None:
    model, output = folders
    refused(model.parents[1], "prune", model, "-o", output, "--multiple-of", "1", "--no-bench", "--include", "kind:vo",
            says="one head_size for keys and values, which are 6 and 3 wide now")  # fmt: skip
    (model.parent / GENAI).unlink()
    assert prune(model, output, "--include", "kind:vo").exit_code == 0
    assert written(output, CONFIG) == {**HUGGING_FACE, "v_head_dim": 3}


def test_a_repair_and_steps(folders: tuple[Path, Path]) -> None:
    model, output = folders
    assert prune(model, output, "--include", "kind:neuron", "--calibration", "none", "--samples", "8", "--steps", "2").exit_code == 0
    assert written(output, CONFIG) == {**HUGGING_FACE, "intermediate_size": 10}


def test_none_are_wanted(folders: tuple[Path, Path]) -> None:
    model, output = folders
    assert prune(model, output, "--include", "wq0:1", "--companions", "none").exit_code == 0
    assert sorted(p.name for p in output.parent.iterdir()) == ["half.onnx", "half.plan.json"]


def test_beside_the_model_they_stay(folders: tuple[Path, Path]) -> None:
    model, _ = folders
    made = prune(model, model.with_name("half.onnx"))
    assert made.exit_code == 0
    assert json.loads(made.stdout)["companions"] == {
        "files": [],
        "notes": ["not written: config.json and genai_config.json, as the result is in the model's own folder; write it to another."],
    }
    assert json.loads((model.parent / CONFIG).read_text()) == HUGGING_FACE


def test_layers_are_counted_anew(folders: tuple[Path, Path]) -> None:
    model, output = folders
    assert prune(model, output, "--drop-layers", "oo1,d1").exit_code == 0
    assert written(output, CONFIG) == {**HUGGING_FACE, "num_hidden_layers": 1}
    assert written(output, GENAI)["model"]["decoder"]["num_hidden_layers"] == 1


def test_caches_that_a_runtime_would_miss_are_refused(folders: tuple[Path, Path]) -> None:
    model, output = folders
    refused(model.parents[1], "prune", model, "-o", output, "--no-bench", "--drop-layers", "oo0,d0",
            says="numbers caches from 0 to 0, but the model without the dropped layers has no input 'past_0_k'")
    (model.parent / GENAI).unlink()
    assert prune(model, output, "--drop-layers", "oo0,d0").exit_code == 0
    assert written(output, CONFIG)["num_hidden_layers"] == 1


@pytest.mark.parametrize(("text", "says"), [("{", "read as JSON"), ("[]", "holds no JSON object"), ("\xff", "read as JSON")])
def test_files_that_are_no_configuration(folders: tuple[Path, Path], text: str, says: str) -> None:
    model, output = folders
    (model.parent / CONFIG).write_bytes(text.encode("latin1"))
    refused(model.parents[1], "prune", model, "-o", output, says=says)


def test_a_runtime_configuration_without_a_decoder(folders: tuple[Path, Path]) -> None:
    model, output = folders
    (model.parent / GENAI).write_text('{"model": 3}')
    refused(model.parents[1], "prune", model, "-o", output, "--no-bench", says="has no model.decoder")


def test_what_another_model_needs_is_not_written_over(folders: tuple[Path, Path]) -> None:
    model, output = folders
    (output.parent / CONFIG).write_text('{"model_type": "bert"}')
    refused(model.parents[1], "prune", model, "-o", output, says="belongs to another model")
    (output.parent / CONFIG).write_text('{"model_type": "llama"}')
    assert find_companions(model, output) is not None


def test_folders_that_do_not_serve(folders: tuple[Path, Path]) -> None:
    model, output = folders
    with pytest.raises(BadOption, match="neither config.json nor"):
        find_companions(model, output, str(output.parent))
    with pytest.raises(BadOption, match="goes to the same folder"):
        find_companions(model, model.with_name("half.onnx"), str(model.parent))
    found = find_companions(model, model.with_name("half.onnx"))
    assert found is not None
    assert not found.names
    assert issubclass(BadFile, spa.SpaError)
    assert issubclass(UnsupportedModel, spa.SpaError)


def test_numbers_that_the_graph_does_not_show_stay(tmp_path: Path) -> None:
    """A configuration of other sizes is not ours to correct."""
    dense, small = tmp_path / "a", tmp_path / "b"
    dense.mkdir()
    small.mkdir()
    onnx.save(cached(), dense / "model.onnx")
    (dense / CONFIG).write_text(json.dumps({"num_attention_heads": 12, "hidden_size": 768}))
    assert prune(dense / "model.onnx", small / "model.onnx", "--include", "wq:1").exit_code == 0
    assert json.loads((small / CONFIG).read_text()) == {"num_attention_heads": 12, "hidden_size": 768}
