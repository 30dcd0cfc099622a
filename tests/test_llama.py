"""The Llama of any size: every way of writing it computes the same, with and without cache, in one file or streamed."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from models.llama import LlamaConfig, llama_graph, main, parameters, write_llama

IDS = np.random.default_rng(0).integers(0, 256, (2, 7))


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _logits(config: LlamaConfig) -> np.ndarray:
    """Without cache in one go, with it in pieces of three, one, one, … tokens."""
    opened = _session(llama_graph(config))
    if not (config.cache or config.fused):
        return opened.run(["logits"], {"input_ids": IDS, "attention_mask": np.ones((2, 7), np.int64)})[0]
    names = [o.name for o in opened.get_outputs()]
    empty = np.zeros((2, config.kv_heads, 0, config.width), np.float16 if config.float16 else np.float32)
    past = {i.name: empty for i in opened.get_inputs() if i.name.startswith("past")}
    found = []
    for start, stop in [(0, 3), *((i, i + 1) for i in range(3, 7))]:
        results = opened.run(None, {"input_ids": IDS[:, start:stop], "attention_mask": np.ones((2, stop), np.int64), **past})
        past = {n.replace("present", "past_key_values"): v for n, v in zip(names, results, strict=True) if n != "logits"}
        found.append(results[0])
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("config,tolerance", [
    (LlamaConfig(cache=True), 1e-5), (LlamaConfig(fused=True), 1e-5), (LlamaConfig(float16=True, cache=True), 1e-2),
])  # fmt: skip
def test_every_way_of_writing_it_computes_the_same(config: LlamaConfig, tolerance: float) -> None:
    expected = _logits(LlamaConfig())
    assert expected.std() > 0.5
    assert np.abs(_logits(config) - expected).max() < tolerance


def test_standard_operators_pass_the_checker() -> None:
    onnx.checker.check_model(llama_graph(LlamaConfig(cache=True, float16=True)), full_check=True)


def test_streamed_weights_are_those_of_the_graph(tmp_path) -> None:
    config = LlamaConfig(float16=True, vocab=300_000)  # more values in a matrix than in the block that it repeats
    path = write_llama(config, tmp_path)
    whole = llama_graph(config)
    streamed = onnx.load(path)
    assert {t.name: t.raw_data for t in streamed.graph.initializer} == {t.name: t.raw_data for t in whole.graph.initializer}
    assert streamed.graph.node == whole.graph.node
    assert sum(np.prod(t.dims) for t in whole.graph.initializer if t.name.endswith("weight")) == parameters(config)


def test_sizes_that_make_no_llama_are_refused(tmp_path, capsys) -> None:
    assert main(["-o", str(tmp_path / "no"), "--heads", "4", "--kv-heads", "3"]) == 2
    assert "evenly" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_published_8b_sizes() -> None:
    assert parameters(LlamaConfig(32, 4096, 32, 8, 14336, 128256)) == 8_030_261_248
