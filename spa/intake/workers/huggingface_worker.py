"""Hugging Face: a folder with the config.json and the safetensors of transformers. `serve.py` says what a worker is.

The network is the one that the configuration names, or --entry; `huggingface_inputs.py` finds what it takes, and PyTorch's exporters do the
rest (`torch_export.py`). Nothing is fetched, and code that lies in the folder runs only if the user trusts it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import huggingface_inputs as taken
import torch_export
import torch_subjects

CONFIG = "config.json"
BESIDE = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")  # one of them makes a tokenizer
EXPORTED = {"experts_implementation": "batched_mm"}  # the fastest one for torch, which is the default, is nothing that ONNX has
TRUST = "if you trust where it comes from, say so with --trust"
PICKLE = f"its weights are pickles ({{}}), and loading a pickle runs whatever code lies in it; {TRUST}"
CODE = f"its network is code that lies with it ({{}}), which would be run; {TRUST}"


def inputs(source: str, wish: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, dtype and shape of each input."""
    found: list[dict[str, Any]] = torch_export.described(opened(source, wish)[0], wish)
    return found


def convert(source: str, target: str, wish: dict[str, Any]) -> list[str]:
    """Writes ONNX by torch.onnx."""
    return [*torch_export.export(opened(source, wish)[0], target, wish), *beside(source)]


def examples(source: str, wish: dict[str, Any]) -> list[dict[str, Any]]:
    """Inputs as the network meets them: ids of its vocabulary, padding, and the cache that earlier tokens leave."""
    return [{name: torch_export.array(t) for name, t in drawn.items()} for drawn in opened(source, wish)[1]]


def outputs(source: str, feeds: dict[str, Any], wish: dict[str, Any]) -> list[Any]:
    """What transformers gives."""
    return list(torch_export.run(opened(source, wish)[0], feeds))


def layers(source: str, feeds: dict[str, Any], wish: dict[str, Any]) -> dict[str, Any]:
    """What each module gives, in the order in which they end."""
    return dict(torch_export.listen(opened(source, wish)[0], feeds))


def opened(source: str, wish: dict[str, Any]) -> Any:
    """(subject, examples); read once."""
    return _opened(source, json.dumps(wish))


@functools.lru_cache(maxsize=1)
def _opened(source: str, wish: str) -> Any:
    asked = json.loads(wish)
    network, notes = loaded(Path(source), asked)
    return taken.subject(network, Path(source), asked, notes)


def loaded(folder: Path, wish: dict[str, Any]) -> tuple[Any, list[str]]:
    """The network in float32, and what the user should know of its weights. Raises ValueError, OSError, NotImplementedError."""
    torch_subjects.import_torchvision()
    import torch

    config = read(folder / CONFIG)
    safe = check_weights(folder, config, wish["trust"])
    kind = class_of(folder, config, wish)
    torch.manual_seed(wish.get("seed", 0))  # of weights that are drawn
    try:
        network, told = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=safe,
                                             ignore_mismatched_sizes=True, output_loading_info=True, **EXPORTED)  # fmt: skip
    except (ImportError, ValueError):
        raise
    except Exception as error:  # safetensors and transformers raise classes of their own
        raise OSError(f"its weights can't be read: {torch_export.cause(error)}") from error
    lacking = check_fit(network, told)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    notes = [] if stored == "float32" else [f"The weights are {stored} in the folder, and float32 in the ONNX file."]
    return network.eval(), notes + lacking


def read(path: Path) -> dict[str, Any]:
    """A configuration. Raises OSError."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise OSError(f"its {path.name} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise OSError(f"its {path.name} holds no JSON object")
    return found


def check_weights(folder: Path, config: dict[str, Any], trust: bool) -> bool:
    """Whether weights are in safetensors. Raises ValueError for pickles, NotImplementedError for quantised ones, OSError without any."""
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "by an unknown method")
        raise NotImplementedError(f"its weights are quantised ({method}): convert the model that it was quantised from")
    if any(folder.glob("*.safetensors")):
        return True
    pickles = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise OSError("there are no weights in it (model.safetensors)")
    if not trust:
        raise ValueError(PICKLE.format(pickles[0]))
    return False


def class_of(folder: Path, config: dict[str, Any], wish: dict[str, Any]) -> Any:
    """The class of the network: that of --entry, or the first of the configuration's architectures; the bare network without either.

    Raises ValueError where it would run code of the folder's, or is not there.
    """
    import transformers

    name = wish["entry"] or next(iter(config.get("architectures") or ()), "AutoModel")
    own = [ref for ref in (config.get("auto_map") or {}).values() if isinstance(ref, str) and ref.rpartition(".")[2] == name]
    found = getattr(transformers, name, None)
    if found is not None and hasattr(found, "from_pretrained"):
        return found
    if own and not wish["trust"]:
        raise ValueError(CODE.format(own[0]))
    if own:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(own[0], folder, local_files_only=True)
    own_version = f"transformers {transformers.__version__}"
    if wish["entry"]:
        raise ValueError(f"--entry {name}: {own_version} has no such class")
    raise NotImplementedError(f"{own_version} has no {name}; a newer one may, else say which class to use with --entry")


def check_fit(network: Any, told: dict[str, Any]) -> list[str]:
    """A note on weights that the folder lacks. Raises OSError where they are not this network's."""
    title = type(network).__name__
    if told["mismatched_keys"]:
        name, stored, wanted = (*sorted(told["mismatched_keys"], key=str)[0], None, None)[:3]
        raise OSError(f"it does not fit its {CONFIG}: {name} is {tuple(stored or ())}, and {tuple(wanted or ())} in {title}")
    missing = sorted(told["missing_keys"])
    if not missing:
        return []
    if len(missing) >= len(network.state_dict()):
        raise OSError(f"none of its weights is one of {title}")
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return [f"{missing[0]}{more} of {title} are not in the folder: their weights are drawn."]


def beside(source: str) -> list[str]:
    """How to go on with the files that lie beside the weights."""
    tokenizer = f"text is read with --tokenizer {source}, and " if any(Path(source, name).is_file() for name in BESIDE) else ""
    return [f"For spa prune: {tokenizer}--companions {source} writes {CONFIG} anew beside the result."]
