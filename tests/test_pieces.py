"""Large models run in pieces: with the same results, in the memory of a piece; and limits on memory change no plan and no repair."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues
from typer.testing import CliRunner

import spa
from models.llama import LlamaConfig, llama_graph, write_llama
from passes import Weight, Widened
from spa import api
from spa.cli import app
from spa.errors import CheckFailed
from spa.plans.plan import mask_of
from spa.proof import pieces
from spa.proof.feeds import draw
from spa.statistics import observe, stepper
from spa.sweeps import parallel
from spa.timing import share

PIECE = 50_000  # bytes: a layer of the network below has 146 kB
HALF = LlamaConfig(layers=3, float16=True)


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every model runs in pieces; the bytes of weights of each session that is opened so."""
    opened: list[int] = []
    real = stepper.session

    def session(model: Any, **options: Any) -> Any:
        opened.append(model.nbytes)
        return real(model, **options)

    monkeypatch.setattr(pieces, "WHOLE", 0)
    monkeypatch.setattr(pieces, "PIECE", PIECE)
    monkeypatch.setattr(stepper, "session", session)
    return opened


@pytest.fixture
def unlimited() -> Iterator[None]:
    yield
    share.limit_memory(0)


@pytest.mark.parametrize("config", [LlamaConfig(layers=3), HALF])
def test_the_proof_in_pieces_is_the_proof(in_pieces: list[int], config: LlamaConfig) -> None:
    result = spa.prune(llama_graph(config), 0.5)
    assert result.check is not None
    assert result.check.passed
    assert [d.output for d in result.check.differences] == ["logits"]
    assert len(in_pieces) > 10
    largest = 4 * config.vocab * config.hidden  # the embedding, in float32
    assert max(in_pieces) <= PIECE + largest + 10_000  # masks and shapes


def test_the_proof_in_pieces_fails_for_another_weight(in_pieces: list[int]) -> None:
    model = llama_graph(LlamaConfig(layers=3))
    analysis = spa.analyze(model)
    decided = spa.plan(analysis, 0.5)
    result = spa.apply(analysis, decided, check=False)
    wrong = result.to_proto()
    tensor = next(t for t in wrong.graph.initializer if t.name == "model.layers.1.mlp.up_proj.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.1), tensor.name))
    gone = mask_of(decided, analysis.groups)
    proof = api.prove(analysis.normal.model, analysis.groups, gone, spa.load(wrong))
    assert 1e-3 < proof.worst < 1
    assert not proof.passed


def test_inputs_that_the_model_does_not_run_with_are_refused(in_pieces: list[int]) -> None:
    feeds = {"input_ids": np.full((1, 4), 999), "attention_mask": np.ones((1, 4), np.int64)}
    with pytest.raises(spa.SpaError, match="give sizes that fit with --input"):
        spa.prune(llama_graph(LlamaConfig()), 0.5, feeds=feeds)


def test_statistics_in_pieces_are_those_of_the_whole(in_pieces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = spa.analyze(llama_graph(LlamaConfig(layers=2)))
    traced = analysis.groups.traced
    batches = [draw(traced, seed=seed) for seed in range(3)]
    values = ["attention_mask", "model.layers.0.mlp.mul_output", "model.norm_output", "model.layers.1.self_attn.softmax_output"]

    def gathered() -> dict[tuple[int, str], np.ndarray]:
        found: dict[tuple[int, str], np.ndarray] = {}
        count = observe.stream(analysis.normal.model, traced.facts.types, batches, values,
                               lambda number, made: found.update({(number, n): np.array(v) for n, v in made.items()}))  # fmt: skip
        assert count == 3
        return found

    split = gathered()
    assert len(in_pieces) > 4
    monkeypatch.setattr(pieces, "WHOLE", 1 << 40)
    whole = gathered()
    assert split.keys() == whole.keys() == {(number, value) for number in range(3) for value in values}
    for key, value in whole.items():
        np.testing.assert_allclose(split[key], value, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- limits on memory


def _pruned(criterion: str) -> tuple[spa.Plan, onnx.ModelProto]:
    result = spa.prune(llama_graph(LlamaConfig(layers=3)), 0.5, criterion=criterion, calibration="none", repair="obspa", check=False)
    return result.plan, result.to_proto()


def test_a_limit_changes_no_plan_and_no_repair(unlimited: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = _pruned("obspa")
    together: list[int] = []
    real = observe.passes_of

    def passes_of(*arguments: Any) -> Iterator[list[Any]]:
        for chunk in real(*arguments):
            together.append(len({layer.key for layer in chunk}))
            yield chunk

    monkeypatch.setattr(observe, "passes_of", passes_of)
    share.limit_memory(800_000)  # 200 kB for matrices: that of an MLP's neurons takes 248 kB, and goes alone
    limited_plan, limited = _pruned("obspa")
    assert limited_plan.groups == plan.groups
    assert len(together) > 3
    assert max(together) < 8
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for tensor in limited.graph.initializer:
        np.testing.assert_allclose(numpy_helper.to_array(tensor), tensors[tensor.name], rtol=1e-4, atol=1e-5)


def test_room_is_a_share_of_the_limit(unlimited: None) -> None:
    assert share.room(1000) == 1000
    share.limit_memory(2000)
    assert share.room(1000) == 500
    assert share.room(100) == 100


def test_workers_get_their_part_of_the_limit(unlimited: None) -> None:
    share.limit_memory(900)
    assert share.memory_each(3) == 300
    assert parallel._numbered(7, (1, share.memory_each(3)), lambda common: share.room(1000), None, ()) == (7, 75)
    share.keep_to(0)


@pytest.mark.parametrize("text,words", [
    ("lots", "is no size: give one such as 4GB"), ("4", "is no size"), ("4 apples", "is no size"), ("1kB", "give at least 64MB"),
])  # fmt: skip
def test_limits_that_are_none_are_refused(unlimited: None, tmp_path: Path, text: str, words: str) -> None:
    path = write_llama(LlamaConfig(layers=1), tmp_path)
    done = CliRunner().invoke(app, ["prune", str(path), "-o", str(tmp_path / "small.onnx"), "--memory", text])
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "small.onnx").exists()


def test_a_limit_on_the_command_line_holds_for_that_command(unlimited: None, tmp_path: Path) -> None:
    path = write_llama(LlamaConfig(layers=1), tmp_path)
    command = ["prune", str(path), "--no-bench", "-o"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "one.onnx"), "--memory", "64 MB"]).exit_code == 0
    assert share.memory_each(1) == 64_000_000
    assert CliRunner().invoke(app, [*command, str(tmp_path / "two.onnx")]).exit_code == 0
    assert share.memory_each(1) == 0


# ---------------------------------------------------------------------- float32 on the way


def test_widened_weights_convert_as_they_are_read() -> None:
    values = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float16)
    weight = Widened(Weight.of_array(values)).take([1, 4, 6], 0).take([0, 3], 1)
    expected = values[[1, 4, 6]][:, [0, 3]].astype(np.float32)
    assert isinstance(weight, LazyValues)
    assert weight.dtype == np.float32
    assert weight.shape == (3, 2)
    assert weight.nbytes == 24
    np.testing.assert_array_equal(weight.load(), expected)
    np.testing.assert_array_equal(np.concatenate(list(weight.rows(2))), expected)
    np.testing.assert_array_equal(numpy_helper.to_array(weight.to_tensor()), expected)


def test_a_failed_proof_in_pieces_says_so(in_pieces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckFailed):
        spa.prune(llama_graph(HALF), 0.5, tolerance=-1.0)
