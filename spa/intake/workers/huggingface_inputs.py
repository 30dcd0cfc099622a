"""What a network of transformers takes, found by its signature and its configuration and by running it. Stands alone, like all workers.

Inputs are known by the names that all of transformers shares (`SHAPES`), whatever the architecture is called. A language model gets its
cache as `past_key_values.N.key` and `.value` beside `position_ids`, and gives `present.N.key` and `.value`; it is taken only if two runs
with it in between give what one run over all tokens gives.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch_export

SHAPES: dict[str, tuple[int | str, ...]] = {
    "input_ids": ("batch", "length"), "attention_mask": ("batch", "length"), "token_type_ids": ("batch", "length"),
    "pixel_values": ("batch", "channels", "height", "width"), "input_features": ("batch", "bins", "frames"),
    "input_values": ("batch", "samples"), "decoder_input_ids": ("batch", "decoded"),
}  # fmt: skip
"""Inputs of transformers' networks, in the order of ONNX's inputs."""
MAIN = ("input_ids", "pixel_values", "input_features", "input_values")
FREE = ("batch", "length", "past", "total", "decoded", "samples")
SIZES = (
    {"batch": 2, "length": 5, "past": 7, "decoded": 4, "samples": 16000},
    {"batch": 1, "length": 1, "past": 9, "decoded": 3, "samples": 12000},
    {"batch": 3, "length": 4, "past": 0, "decoded": 6, "samples": 16400},
)  # fmt: skip
"""Sizes that are tried: exported with the first, compared with all."""
FACTORY = "convert it as file.py:factory, which gives the module and its inputs"
SAME = 1e-3  # of the largest logit: with the cache and without
CACHE = ("key", "value")
CACHES = ("cache", "past_key_values")
"""What transformers calls the parameter and the result that hold the cache: since 5.24, and before."""
Sizes = dict[str, int]
Shapes = dict[str, tuple[int | str, ...]]


def subject(network: Any, folder: Path, wish: Mapping[str, Any], notes: list[str]) -> tuple[Any, list[dict[str, Any]]]:
    """The network with what it takes, and examples of that. Raises ValueError, NotImplementedError."""
    shapes, fixed = known_shapes(network, folder)
    made = None
    if wish["cache"] and generates_text(network):
        made, why = with_cache(network, shapes, fixed)
        if made is None:
            notes.append(f"It has no key-value cache that could be inputs and outputs ({why}): it reads all tokens anew in each step.")
    elif "decoder_input_ids" in shapes:
        notes.append("Encoder and decoder are one graph without a cache: it reads all tokens anew in each step.")
    made = made or Plain(network, shapes, fixed)
    left = [name for name in MAIN if name in parameters(network) and name not in made.shapes]
    notes += [f"Its input {name} is left out, as it runs without." for name in left]
    names, sizes = settled(made.shapes, fixed, wish)
    axes = {n: {k: names[str(s)] for k, s in enumerate(shape) if s in names} for n, shape in made.shapes.items()}
    examples = [made.draw({**given, **sizes}, seed) for seed, given in enumerate(SIZES)]
    return torch_export.Subject(made, list(examples[0]), tuple(examples[0].values()), {n: a for n, a in axes.items() if a}, made.results,
                                loose=True, notes=notes), examples  # fmt: skip


def known_shapes(network: Any, folder: Path) -> tuple[Shapes, Sizes]:
    """The inputs that it needs, by running it, and those sizes that its configuration fixes. Raises NotImplementedError."""
    accepted = parameters(network)
    main = getattr(network, "main_input_name", MAIN[0])
    if main not in MAIN:
        raise NotImplementedError(f"its main input is {main}, which spa does not know: {FACTORY}")
    fixed = configured(network.config, folder)
    needed = {main, "attention_mask" if main == "input_ids" else "", "decoder_input_ids", segments(network, folder)}
    others = [name for name in MAIN if name in accepted and name != main]
    failure: BaseException | None = None
    for more in ([], *([name] for name in others), others):
        chosen = {n: s for n, s in SHAPES.items() if n in accepted and n in {*needed, *more}}
        try:
            Plain(network, chosen, fixed)
        except Exception as error:  # whatever it raises for want of an input
            failure = failure or error
            continue
        return chosen, fixed
    assert failure is not None
    tried = ", ".join(n for n in SHAPES if n in needed and n in accepted)
    raise NotImplementedError(f"it does not run on {tried}: {FACTORY} ({torch_export.cause(failure)})") from failure


def parameters(network: Any) -> Mapping[str, Any]:
    """What its forward takes."""
    return inspect.signature(network.forward).parameters


def segments(network: Any, folder: Path) -> str:
    """token_type_ids, where the tokenizer gives them, or there is more than one type."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("model_input_names")
    except (OSError, ValueError, AttributeError):
        named = None
    wanted = "token_type_ids" in named if named else (getattr(network.config, "type_vocab_size", 0) or 0) > 1
    return "token_type_ids" if wanted else ""


def configured(config: Any, folder: Path) -> Sizes:
    """Sizes of pictures and of sound, as configurations give them; 3 channels of 224 x 224 where they do not."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or preprocessed(folder)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    frames = 2 * (getattr(config, "max_source_positions", 0) or 0)
    return {"channels": getattr(vision, "num_channels", None) or 3, "height": int(height), "width": int(width),
            "bins": getattr(config, "num_mel_bins", None) or 80, "frames": frames or 100}  # fmt: skip


def preprocessed(folder: Path) -> int:
    """The size of pictures that the preprocessor makes."""
    try:
        told = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        found = told.get("crop_size") or told["size"]
        return int(found if isinstance(found, int) else found.get("height") or found["shortest_edge"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 224


def settled(shapes: Shapes, fixed: Sizes, wish: Mapping[str, Any]) -> tuple[dict[str, str], Sizes]:
    """The sizes that stay free, with their names, and the numbers of those that do not. Raises ValueError."""
    names, sizes = told(shapes, wish["inputs"])
    if {"total", "length"} <= set(sizes):
        sizes["past"] = sizes["total"] - sizes["length"]
        if sizes["past"] < 0:
            raise ValueError("its attention_mask is over the past and the new tokens: it can't be shorter than input_ids")
    stay = {"keep": set(names) - set(sizes), "batch": {"batch"}, "none": set()}[wish["dynamic"]]
    sizes = {"batch": 1, **fixed, **sizes} if "batch" not in stay else {**fixed, **{s: n for s, n in sizes.items() if s != "batch"}}
    unknown = [s for s in names if s not in {*stay, *sizes, "past"}]
    if unknown:
        name = next(n for n, shape in shapes.items() if unknown[0] in shape)
        given = "x".join(str(s if isinstance(s, int) else sizes.get(s, 1 if s == "batch" else 16)) for s in shapes[name])
        raise ValueError(f"its sizes are fixed if they are given: say how many with --input {name}:{given}, or keep "
                         "them free with --dynamic keep")  # fmt: skip
    return {s: name for s, name in names.items() if s in stay}, sizes


def told(shapes: Shapes, inputs: Mapping[str, Any]) -> tuple[dict[str, str], Sizes]:
    """Names of all free sizes, and those numbers that the user gives. Raises ValueError for shapes of other inputs."""
    names = {s: s for shape in shapes.values() for s in shape if isinstance(s, str) and s in FREE}
    sizes: Sizes = {}
    for asked, shape in inputs.items():
        name = list(shapes)[int(asked)] if asked.isdigit() and int(asked) < len(shapes) else asked
        if name not in shapes:
            raise ValueError(f"it has no input {name}; it has: {', '.join(shapes)}")
        if len(shape) != len(shapes[name]):
            raise ValueError(f"its input {name} has {len(shapes[name])} axes, but --input gives {len(shape)} sizes")
        for symbol, size in zip(shapes[name], shape, strict=True):
            if isinstance(symbol, str) and isinstance(size, int):
                sizes[symbol] = size
            elif symbol in names:
                names[str(symbol)] = str(size or symbol)
    return names, sizes


class Plain(torch.nn.Module):  # type: ignore[misc]
    """A network of transformers that takes tensors in order and gives those of its results that are tensors."""

    def __init__(self, network: Any, shapes: Shapes, fixed: Sizes) -> None:
        super().__init__()
        self.network, self.shapes = network, dict(shapes)
        self.config = network.config
        own = parameters(network)
        self.more = {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in own}
        self.results: list[str] = []
        with torch.no_grad():
            found = network(**drawn(self.shapes, {**SIZES[0], **fixed}, self.config, 0), **self.more)
        self.results = [name for name, value in found.items() if isinstance(value, torch.Tensor)]

    def forward(self, *tensors: Any) -> Any:
        """Tensors in the order of `shapes` -> those of `results`."""
        found = self.network(**dict(zip(self.shapes, tensors, strict=True)), **self.more)
        return tuple(found[name] for name in self.results)

    def draw(self, sizes: Sizes, seed: int) -> dict[str, Any]:
        """Inputs of these sizes."""
        return drawn(self.shapes, sizes, self.config, seed)


class Cached(Plain):
    """The same of a language model, with its cache."""

    def __init__(self, network: Any, shapes: Shapes, fixed: Sizes) -> None:
        super().__init__(network, shapes, fixed)
        import transformers

        self.called = next((name for name in CACHES if name in parameters(network)), "")
        if not self.called:
            raise ValueError(f"it takes no {' or '.join(CACHES)}")
        self.cache, self.more = transformers.DynamicCache, {**self.more, "use_cache": True}
        self.plain = {**shapes, **({"position_ids": ("batch", "length")} if "position_ids" in parameters(network) else {})}
        ids = drawn(self.plain, {**SIZES[0], **fixed}, self.config, 0)
        with torch.no_grad():
            states = network(**ids, **{self.called: self.cache()}, **self.more)[self.called].layers
        self.shapes = {name: ("batch", "total") if name == "attention_mask" else shape for name, shape in self.plain.items()}
        for k, layer in enumerate(states):
            for what, state in zip(CACHE, (layer.keys, layer.values), strict=True):
                batch, heads, length, width = state.shape
                if (batch, length) != (SIZES[0]["batch"], SIZES[0]["length"]):
                    raise ValueError(f"layer {k} keeps {tuple(state.shape)} of {SIZES[0]['length']} tokens")
                self.shapes[f"past_key_values.{k}.{what}"] = ("batch", heads, "past", width)
        self.results = ["logits", *(f"present.{k}.{what}" for k in range(len(states)) for what in CACHE)]

    def forward(self, *tensors: Any) -> Any:
        """Tensors in the order of `shapes` -> logits, and the cache after these tokens."""
        past = tensors[len(self.plain) :]
        cache = self.cache([(past[k], past[k + 1]) for k in range(0, len(past), 2)])
        found = self.network(**dict(zip(self.plain, tensors, strict=False)), **{self.called: cache}, **self.more)
        return found.logits, *(state for layer in found[self.called].layers for state in (layer.keys, layer.values))

    def draw(self, sizes: Sizes, seed: int) -> dict[str, Any]:
        """New tokens after so many others, with the cache that these leave: noise is none that it ever meets."""
        past, length = sizes["past"], sizes["length"]
        states = [torch.zeros(sizes["batch"], int(s[1]), 0, int(s[3])) for n, s in self.shapes.items() if n not in self.plain]
        whole = drawn(self.plain, {**sizes, "length": past + length}, self.config, seed)
        if past:
            with torch.no_grad():
                states = [t.contiguous() for t in self(*(t[:, :past].contiguous() for t in whole.values()), *states)[1:]]
        new = {name: t if name == "attention_mask" else t[:, past:].contiguous() for name, t in whole.items()}
        return {**new, **dict(zip(list(self.shapes)[len(self.plain) :], states, strict=True))}


def generates_text(network: Any) -> bool:
    """Whether it generates text token by token, in one graph: its cache is wanted, or the reason why it has none."""
    generates = getattr(network, "can_generate", lambda: False)()
    return generates and "input_ids" in parameters(network) and not network.config.is_encoder_decoder


def with_cache(network: Any, shapes: Shapes, fixed: Sizes) -> tuple[Cached | None, str]:
    """The network with its cache, or why it has none that works."""
    try:
        made = Cached(network, shapes, fixed)
        given = made.draw({**SIZES[0], **fixed}, 0)
        whole = drawn(made.plain, {**SIZES[0], **fixed, "length": SIZES[0]["past"] + SIZES[0]["length"]}, made.config, 0)
        with torch.no_grad():
            found = made(*given.values())[0]
            expected = network(**whole, use_cache=False).logits[:, SIZES[0]["past"] :]
    except Exception as error:  # states of other kinds fail in ways of their own
        return None, torch_export.cause(error)
    off = float((found - expected).abs().max() / expected.abs().max())
    return (made, "") if off <= SAME else (None, f"with it logits differ by {off:.1e} of their scale")


def drawn(shapes: Shapes, sizes: Sizes, config: Any, seed: int) -> dict[str, Any]:
    """Inputs of these shapes: ids of the vocabulary, masks with padding behind the last row's tokens, positions, one segment, noise."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        size = [s if isinstance(s, int) else sizes[s] for s in shape]
        if name.endswith("input_ids"):
            made[name] = torch.randint(0, config.get_text_config().vocab_size, size, generator=generator)
        elif name == "attention_mask":
            made[name] = torch.ones(size, dtype=torch.int64)
            if not sizes["past"] and size[0] > 1:
                made[name][-1, (size[1] + 1) // 2 :] = 0
        elif name == "position_ids":
            made[name] = torch.arange(size[1])[None].repeat(size[0], 1)
        elif name == "token_type_ids":
            made[name] = torch.zeros(size, dtype=torch.int64)
        else:
            made[name] = torch.randn(size, generator=generator)
    return made
