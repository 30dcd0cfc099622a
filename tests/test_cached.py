"""Language models with a cache, as PyTorch exports them: pruned, they still generate the same with it as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import spa
from models.cached import export_cached, generate, tiny_llama
from models.extras import MissingExtra, need
from tools.generate import main as tool

PROMPT = np.array([5, 17, 60, 2, 33])
TOKENS = 24
EXPORTERS = ["script", pytest.param("dynamo", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=EXPORTERS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        need("torch")
        need("transformers")
    except MissingExtra as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("llama") / "model.onnx"
    export_cached(tiny_llama(), path, request.param)
    return path


def session(result: spa.Result) -> ort.InferenceSession:
    return ort.InferenceSession(result.to_proto().SerializeToString(), providers=["CPUExecutionProvider"])


def kinds(analysis: spa.Analysis) -> dict[str, int]:
    """Positions of each kind that may shrink, over all groups."""
    found: dict[str, int] = {}
    for group in analysis.groups.free():
        found[group.kind] = found.get(group.kind, 0) + group.size
    return found


def test_every_unit_of_a_cached_model_is_found(exported: Path) -> None:
    analysis = spa.analyze(exported)
    assert len(analysis.groups.traced.states) == 4
    assert kinds(analysis) == {"key-value": 4, "query": 4, "qk": 6, "vo": 24, "residual": 48, "neuron": 160}
    assert analysis.groups.traced.facts.feeds["attention_mask"] == (2, 32)


@pytest.mark.parametrize(
    "settings",
    [{"include": ["kind:key-value"]}, {"include": ["kind:query"]}, {"include": ["kind:qk", "kind:vo"]}, {"exclude": ["kind:residual"]}, {}],
    ids=["key-value heads", "queries", "widths of heads", "all but the residual", "everything"],
)
def test_generation_with_the_cache_is_the_same_as_without(exported: Path, settings: dict[str, Any]) -> None:
    result = spa.prune(exported, 0.5, multiple_of=1, **settings)
    assert result.check is not None
    assert result.check.passed
    small = session(result)
    found = generate(small, PROMPT, TOKENS)
    assert found == generate(small, PROMPT, TOKENS, cache=False)
    assert len(found) == TOKENS
    assert len(set(found)) > 2  # a network that repeats one token would hide a wrong cache
    shapes = {i.name: i.shape for i in small.get_inputs()}
    outputs = {o.name: o.shape for o in small.get_outputs()}
    for state in result.analysis.groups.traced.states:
        assert [shapes[state.input][a] for a in (1, 3)] == [outputs[state.output][a] for a in (1, 3)]


def test_a_cache_in_the_wrong_place_changes_what_is_generated(exported: Path) -> None:
    """The comparison sees it: the states of two layers swapped."""
    small = session(spa.prune(exported, 0.5, multiple_of=1))

    class Swapped:
        def __getattr__(self, name: str) -> Any:
            return getattr(small, name)

        def run(self, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
            names = ["past_key_values.0.key", "past_key_values.1.key"]
            return list(small.run(outputs, {**feeds, names[0]: feeds[names[1]], names[1]: feeds[names[0]]}))

    assert generate(Swapped(), PROMPT, TOKENS) != generate(small, PROMPT, TOKENS, cache=False)


def test_the_state_can_be_kept(exported: Path) -> None:
    result = spa.prune(exported, 0.5, multiple_of=1, keep_state=True)
    assert not {result.analysis.groups.by_name[g].kind for g in result.plan.groups} & {"key-value", "qk", "vo"}
    small = session(result)
    assert [i.shape for i in small.get_inputs()] == [i.shape for i in ort.InferenceSession(str(exported)).get_inputs()]
    assert generate(small, PROMPT, TOKENS) == generate(small, PROMPT, TOKENS, cache=False)


def test_the_tool_names_a_file_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(["no.onnx", "--prompt", "x", "--tokenizer", str(tmp_path / "tokenizer.json")]) == 2
    assert "there is no file no.onnx" in capsys.readouterr().err
