"""Folders of Hugging Face's transformers: encoders, decoders with their cache, pictures, encoder-decoders; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import refused, run

import spa
from spa.intake import converting
from spa.proof.check import run as outputs_of

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'spa-prune[huggingface]')")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install 'spa-prune[huggingface]')")
pytest.importorskip("transformers", reason="transformers is not installed (pip install 'spa-prune[huggingface]')")
Near = pytest.importorskip("test_intake_torch").Near

COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "initializer_range": 0.3}
TOKENS = 40


def network(name: str) -> Any:
    """A random network of a family."""
    from spa.intake.workers import torch_subjects

    torch_subjects.import_torchvision()
    import transformers as t

    torch.manual_seed(0)
    ids = {"vocab_size": TOKENS, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    if name == "encoder":
        return t.BertForSequenceClassification(t.BertConfig(vocab_size=TOKENS, max_position_embeddings=32, num_labels=3, **COMMON))
    if name == "decoder":
        return t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=2, **ids, **COMMON))
    if name == "pictures":
        return t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=8, num_labels=3, **COMMON))
    if name == "states":
        return t.MambaForCausalLM(t.MambaConfig(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=1, state_size=4))
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    return t.T5ForConditionalGeneration(t.T5Config(vocab_size=TOKENS, decoder_start_token_id=0, **sizes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of transformers for each family."""
    made = tmp_path_factory.mktemp("huggingface")
    for name in ("encoder", "decoder", "pictures", "states", "both"):
        network(name).eval().save_pretrained(made / name)
    return made


@pytest.fixture
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, without other processes."""
    monkeypatch.setattr(converting, "Remote", type("Near", (Near,), {"close": lambda self: None}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shapes(model: spa.Model) -> dict[str, list[Any]]:
    return {t.name: list(t.shape) for t in (*model.graph.inputs, *model.graph.outputs)}


def halved(model: spa.Model) -> spa.Result:
    result = spa.prune(model, 0.5, multiple_of=1)
    assert result.check is not None
    assert result.check.passed
    assert result.after.macs < 0.6 * result.before.macs
    return result


def test_an_encoder_with_its_head(near: Path, folders: Path) -> None:
    found = spa.convert(folders / "encoder")
    assert found.framework.name == "huggingface"
    assert found.parity is not None
    assert found.parity.check.worst < 1e-5
    assert len({s["input_ids"] for s in found.parity.draws}) == 3  # batches and lengths of its own examples
    row = ["batch", "length"]
    assert shapes(found.model) == {"input_ids": row, "attention_mask": row, "token_type_ids": row, "logits": ["batch", 3]}
    halved(found.model)


def test_a_decoder_goes_on_from_its_cache(near: Path, folders: Path) -> None:
    found = spa.convert(folders / "decoder")
    past = ["batch", 2, "past", 4]
    states = [f"past_key_values.{i}.{kind}" for i in (0, 1) for kind in ("key", "value")]
    sizes = shapes(found.model)
    assert sizes["attention_mask"] == ["batch", "total"]
    assert [sizes[name] for name in states] == [past] * 4
    assert list(sizes)[3:] == [*states, "logits", *(s.replace("past_key_values", "present") for s in states)]
    result = halved(found.model)
    heads = {t.name: t.shape for t in result.model.graph.inputs}["past_key_values.0.key"]
    for model, shape in ((found.model, past), (result.model, heads)):
        ids = np.array([[3, 9, 4, 7, 2, 8]])
        empty = {name: np.zeros((1, int(shape[1]), 0, int(shape[3])), np.float32) for name in states}
        whole = outputs_of(model, fed(ids, 0, empty))
        first = outputs_of(model, fed(ids[:, :4], 0, empty))
        then = outputs_of(model, fed(ids[:, 4:], 4, {s: first[s.replace("past_key_values", "present")] for s in states}))
        np.testing.assert_allclose(then["logits"], whole["logits"][:, 4:], atol=1e-4)


def fed(ids: Any, past: int, states: dict[str, Any]) -> dict[str, Any]:
    """What a decoder takes for new ids."""
    total = past + ids.shape[1]
    return {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), "position_ids": np.arange(past, total)[None], **states}


@pytest.mark.parametrize(("options", "wanted"), [
    ({"cache": False}, {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"], "logits": ["batch", "length", TOKENS]}),
    ({"cache": False, "inputs": {"input_ids": ("n", "tokens")}},
     {"input_ids": ["n", "tokens"], "attention_mask": ["n", "tokens"], "logits": ["n", "tokens", TOKENS]}),
    ({"dynamic": "none", "inputs": [(1, 1), (1, 8)]},
     {"input_ids": [1, 1], "attention_mask": [1, 8], "past_key_values.0.key": [1, 2, 7, 4], "present.1.value": [1, 2, 8, 4]}),
])  # fmt: skip
def test_sizes_and_the_cache_are_as_asked(near: Path, folders: Path, options: Any, wanted: dict[str, Any]) -> None:
    sizes = shapes(spa.convert(folders / "decoder", **options).model)
    assert {name: sizes[name] for name in wanted} == wanted
    assert options.get("cache", True) == ("position_ids" in sizes)


def test_pictures_and_an_encoder_with_a_decoder(near: Path, folders: Path) -> None:
    pictures = spa.convert(folders / "pictures")
    assert shapes(pictures.model) == {"pixel_values": ["batch", 3, 16, 16], "logits": ["batch", 3]}
    halved(pictures.model)
    both = spa.convert(folders / "both")
    assert shapes(both.model)["decoder_input_ids"] == ["batch", "decoded"]
    assert both.notes[0].startswith("Encoder and decoder are one graph without a cache")


def test_states_that_are_no_keys_and_values(near: Path, folders: Path) -> None:
    refused(near, "convert", folders / "states", "-o", "o.onnx", says="its sizes can't be left free: fix them, such as --input input_ids:")


def test_the_command_says_how_to_go_on(tmp_path: Path, folders: Path) -> None:
    shutil.copytree(folders / "encoder", tmp_path / "net")
    (tmp_path / "net" / "tokenizer.json").write_text("{}")
    result = run("convert", tmp_path / "net", "-o", tmp_path / "net.onnx", "--entry", "BertModel")
    assert result.exit_code == 0, result.output
    said = "".join(result.output.split())  # lines are broken anywhere
    assert "last_hidden_statebatchxlengthx16,pooler_outputbatchx16" in said
    assert "thesameasHuggingFacegives" in said
    assert f"textisreadwith--tokenizer{tmp_path / 'net'}" in said


def changed(folder: Path, near: Path, **fields: Any) -> Path:
    """A copy of a folder with other fields in its configuration."""
    copy = near / "net"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    told = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**told, **fields}))
    return copy


def test_code_that_lies_in_the_folder_runs_only_if_trusted(near: Path, folders: Path) -> None:
    net = changed(folders / "encoder", near, architectures=["Own"], auto_map={"AutoModel": "own.Own", "AutoConfig": "own.Settings"})
    (net / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import BertConfig as Settings, BertForSequenceClassification\n"
        f"Path({str(near / 'sprung')!r}).touch()\n\nclass Own(BertForSequenceClassification):\n    pass\n")  # fmt: skip
    refused(near, "convert", net, "-o", "o.onnx", says="its network is code that lies with it (own.Own), which would be run")
    assert not (near / "sprung").exists()
    assert spa.convert(net, trust=True).parity is not None
    assert (near / "sprung").exists()


def test_pickles_stay_closed(near: Path, folders: Path) -> None:
    net = changed(folders / "encoder", near)
    torch.save(network("encoder").state_dict(), net / "pytorch_model.bin")
    (net / "model.safetensors").unlink()
    refused(near, "convert", net, "-o", "o.onnx", says="its weights are pickles (pytorch_model.bin)")
    assert spa.convert(net, trust=True).parity is not None


def test_what_is_refused(near: Path, folders: Path) -> None:
    encoder, made = folders / "encoder", ("-o", "o.onnx")
    quantised = changed(encoder, near, quantization_config={"quant_method": "gptq"})
    refused(near, "convert", quantised, *made, says="its weights are quantised (gptq)")
    refused(near, "convert", changed(encoder, near, hidden_size=32), *made, says="and (32,) in BertForSequenceClassification")
    refused(near, "convert", changed(encoder, near, architectures=["Newer"]), *made, says="has no Newer; a newer one may")
    net = changed(encoder, near)
    refused(near, "convert", net, *made, "--entry", "Newer", says="--entry Newer: transformers")
    refused(near, "convert", net, *made, "--entry", "ViTModel", says="none of its weights is one of ViTModel")
    refused(near, "convert", net, *made, "--input", "ids:1x4", says="it has no input ids; it has: input_ids")
    refused(near, "convert", net, *made, "--input", "4", says="its input input_ids has 2 axes, but --input gives 1 sizes")
    refused(near, "convert", net, *made, "--dynamic", "none", says="say how many with --input input_ids:1x16")
    (net / "model.safetensors").write_bytes(b"\0" * 64)
    refused(near, "convert", net, *made, says="its weights can't be read")
    (net / "model.safetensors").unlink()
    refused(near, "convert", net, *made, says="there are no weights in it")


def test_a_head_without_weights_is_said(near: Path, folders: Path) -> None:
    found = spa.convert(folders / "encoder", entry="BertForMaskedLM", check=False)
    assert re.fullmatch(r"cls\.predictions\.bias and \d more of BertForMaskedLM are not in the folder: .*drawn\.", found.notes[0])
