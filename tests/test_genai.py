"""Pruned language models in onnxruntime-genai: it reads the rewritten configuration, and generates token for token what ONNX Runtime does.

It is no dependency: in an environment of its own,

    python3 -m venv genai && genai/bin/pip install onnxruntime-genai && export SPA_GENAI_PYTHON=$PWD/genai/bin/python
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from test_cli import run
from test_companions import RUNTIME, decoder

from spa.plans.companions import GENAI

pytestmark = pytest.mark.engines
TOKENS = 12
PROMPT = [3, 17, 8, 25]
GENERATE = """
import json, sys, numpy, onnxruntime_genai as genai
folder, prompt, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = genai.Model(folder)
parameters = genai.GeneratorParams(model)
parameters.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
generator = genai.Generator(model, parameters)
generator.append_tokens(numpy.array([prompt], numpy.int32))
found = []
while not generator.is_done():
    generator.generate_next_token()
    found.append(int(generator.get_next_tokens()[0]))
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def python() -> str:
    """A Python that has onnxruntime-genai."""
    found = os.environ.get("SPA_GENAI_PYTHON")
    if not found or shutil.which(found) is None:
        pytest.skip("SPA_GENAI_PYTHON names no Python with onnxruntime-genai")
    return found


def there(python: str, folder: Path) -> list[int]:
    """What onnxruntime-genai generates after the prompt."""
    asked = [python, "-c", GENERATE, str(folder), json.dumps(PROMPT), str(TOKENS)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout))


def here(path: Path) -> list[int]:
    """What ONNX Runtime generates, the greatest logit each time, each step's states handed to the next."""
    session = onnxruntime.InferenceSession(str(path))
    shapes = {i.name: i.shape for i in session.get_inputs()}
    past = {n: np.zeros((1, s[1], 0, s[3]), np.float32) for n, s in shapes.items() if n.startswith("past")}
    new, found = PROMPT, []
    for _ in range(TOKENS):
        names = ["logits", *(n.replace("past", "present") for n in past)]
        logits, *present = session.run(names, {"ids": np.array([new], np.int64), **past})
        new, past = [int(np.argmax(logits[0, -1]))], dict(zip(past, present, strict=True))
        found += new
    return found


def config() -> dict[str, object]:
    """As onnxruntime-genai wants it, token 0 apart, which ends a text."""
    made = json.loads(json.dumps(RUNTIME))
    made["model"] |= {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    inputs = {"input_ids": "ids", "past_key_names": "past_%d_k", "past_value_names": "past_%d_v"}
    outputs = {"logits": "logits", "present_key_names": "present_%d_k", "present_value_names": "present_%d_v"}
    made["model"]["decoder"] |= {"inputs": inputs, "outputs": outputs, "session_options": {"provider_options": []}}
    made["search"] |= {"past_present_share_buffer": False, "num_beams": 1}
    return dict(made)


def never_ending(model: onnx.ModelProto) -> onnx.ModelProto:
    """The token that ends a text is never the likeliest."""
    for tensor in model.graph.initializer:
        if tensor.name == "head":
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[:, 0] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, "head"))
    return model


@pytest.mark.parametrize("wish", [
    ("--ratio", "0.5", "--include", "kind:key-value"),
    ("--ratio", "0.5", "--units", "neuron,residual"),
    ("--drop-layers", "oo1,d1"),
])  # fmt: skip
def test_a_pruned_model_generates_the_same_in_genai(tmp_path: Path, python: str, wish: tuple[str, ...]) -> None:
    dense, small = tmp_path / "dense", tmp_path / "small"
    dense.mkdir()
    small.mkdir()
    onnx.save(never_ending(decoder()), dense / "model.onnx")
    (dense / GENAI).write_text(json.dumps(config()))
    assert there(python, dense) == here(dense / "model.onnx")
    done = run("prune", dense / "model.onnx", "-o", small / "model.onnx", "--multiple-of", "1", "--no-bench", *wish)
    assert done.exit_code == 0, done.output
    assert there(python, small) == here(small / "model.onnx")
