"""Language models with a key-value cache: exporting them as PyTorch's two exporters see them, and generating with them.

    export_cached(network, path, exporter)     input_ids, attention_mask, position_ids, past_key_values.N.key|value -> logits, present.N.…
    smollm2_cached(exporter)                   SmolLM2-135M-Instruct so, in a folder with its configuration and tokenizer
    generate(session, ids, tokens)             greedy generation, with the cache or without

`python -m models.cached script|dynamo` builds SmolLM2 into the cache folder.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from models.extras import need
from models.language import quiet, smollm2_in_torch
from models.networks import DYNAMO, SCRIPT
from models.packages import Unavailable, cache_folder

Ids = NDArray[np.int64]
Exporter = Literal["script", "dynamo"]

_OPSETS = {SCRIPT: 17, DYNAMO: 20}
_PARITY = 5e-5  # of an output's largest absolute value


def tiny_llama() -> Any:
    """A random network of Llama's shape: two layers, four query heads on two key-value heads, 96 tokens."""
    torch, transformers = need("torch"), need("transformers", extra="language")
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def export_cached(network: Any, path: Path, exporter: Exporter) -> None:
    """Writes a causal language model of transformers with its cache as inputs and outputs, and compares it with PyTorch.

    Axes: ids and positions (batch, length), mask (batch, total), past (batch, heads, past, width), present (batch, heads, total, width).
    Raises Unavailable if the export differs from PyTorch by more than 5e-5 of an output's scale.
    """
    torch = need("torch")
    module, config = _with_cache(network), network.config
    layers = config.num_hidden_layers
    kinds = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{k}" for k in kinds)]
    outputs = ["logits", *(f"present.{k}" for k in kinds)]
    row, total, past = {0: "batch", 1: "length"}, {0: "batch", 1: "total"}, {0: "batch", 2: "past"}
    example = _example(module, config, 2, 5, 7)
    with torch.no_grad(), quiet():
        if exporter == SCRIPT:
            axes = dict(zip(inputs, (row, total, row, *[past] * (2 * layers)), strict=True))
            axes |= {"logits": row, **{n: {0: "batch", 2: "total"} for n in outputs[1:]}}
            torch.onnx.export(module, example, str(path), dynamo=False, opset_version=_OPSETS[SCRIPT], input_names=inputs,
                              output_names=outputs, dynamic_axes=axes)  # fmt: skip
        else:
            shapes = (row, total, row, tuple([past] * (2 * layers)))
            program = torch.onnx.export(module, example, dynamo=True, opset_version=_OPSETS[DYNAMO], input_names=inputs,
                                        output_names=outputs, dynamic_shapes=shapes, external_data=False, verbose=False)  # fmt: skip
            onnx.save_model(program.model_proto, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for sizes in ((2, 5, 7), (1, 1, 9), (3, 4, 0)):
        given = _example(module, config, *sizes)
        with torch.no_grad():
            expected = [t.numpy() for t in module(*given)]
        found = session.run(outputs, {n: t.numpy() for n, t in zip(inputs, given, strict=True)})
        pairs = zip(expected, found, strict=True)
        error = max(float(np.abs(a - b).max() / np.abs(a).max()) if a.shape == b.shape else 1.0 for a, b in pairs)
        if not error <= _PARITY:
            raise Unavailable(f"the export {path.name} differs from PyTorch by {error:.1e} of an output's scale")


def _with_cache(network: Any) -> Any:
    """The network as a module of plain tensors."""
    torch, transformers = need("torch"), need("transformers", extra="language")
    called = "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"  # the latter before 5.24

    class Cached(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
            cache = transformers.DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)])
            found = self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=True,
                               **{called: cache})  # fmt: skip
            return found.logits, *(t for layer in found[called].layers for t in (layer.keys, layer.values))

    return Cached().eval()


def _example(module: Any, config: Any, batch: int, length: int, past: int) -> tuple[Any, ...]:
    """Inputs after so many tokens of past: their cache is what the network makes of them, since noise is no cache that it ever sees."""
    torch = need("torch")
    drawn = torch.Generator().manual_seed(length)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ids = torch.randint(0, config.vocab_size, (batch, past + length), generator=drawn)
    places = torch.arange(past + length)[None].repeat(batch, 1)
    cache = [torch.zeros(batch, config.num_key_value_heads, 0, width) for _ in range(2 * config.num_hidden_layers)]
    if past:
        with torch.no_grad():
            cache = [t.contiguous() for t in module(ids[:, :past], torch.ones_like(ids[:, :past]), places[:, :past], *cache)[1:]]
    return ids[:, past:].contiguous(), torch.ones_like(ids), places[:, past:].contiguous(), *cache


def smollm2_cached(exporter: Exporter = "dynamo") -> Path:
    """SmolLM2-135M-Instruct in float32 with its cache, in a folder with config.json, generation_config.json and tokenizer.json.

    Raises Unavailable if a package cannot be had or the export differs from PyTorch, MissingExtra without transformers.
    """
    folder = cache_folder() / f"smollm2_cached.{exporter}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            network = smollm2_in_torch(made / "tokenizer.json")
            export_cached(network, made / "model.onnx", exporter)
            network.config.to_json_file(made / "config.json", use_diff=False)
            network.generation_config.to_json_file(made / "generation_config.json")
            os.replace(made, folder)
    return folder / "model.onnx"


def generate(session: Any, ids: Ids, tokens: int, *, cache: bool = True, stop: int | None = None) -> list[int]:
    """Greedy generation after the tokens `ids` (length,), until `stop` or so many tokens.

    session: of ONNX Runtime, of a model that `export_cached` wrote or one that was pruned from it. cache: hand each step's states to the
    next and give it the new token alone; else read all tokens again in each step, with an empty past.
    """
    inputs = {i.name: i.shape for i in session.get_inputs()}
    states = [name for name in inputs if name.startswith("past_key_values.")]
    empty = {name: np.zeros((1, inputs[name][1], 0, inputs[name][3]), np.float32) for name in states}
    past, seen, new = empty, [int(i) for i in ids], list(map(int, ids))
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in states)]
    for _ in range(tokens):
        length = len(seen) if cache else len(new)
        place = np.arange(length - len(new), length)[None]
        fed = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, length), np.int64), "position_ids": place}
        logits, *present = session.run(outputs, {k: v for k, v in {**fed, **past}.items() if k in inputs})
        token = int(np.argmax(logits[0, -1]))
        seen.append(token)
        past, new = (dict(zip(states, present, strict=True)), [token]) if cache else (empty, seen)
        if token == stop:
            break
    return seen[len(ids) :]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build SmolLM2 with its cache; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models.cached", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("exporter", choices=[SCRIPT, DYNAMO])
    path = smollm2_cached(parser.parse_args(arguments).exporter)
    print(path, path.stat().st_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
