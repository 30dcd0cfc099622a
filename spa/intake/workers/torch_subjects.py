"""What is opened as a torch network: a factory, a checkpoint, an archive, a name of timm's. Stands alone, like all workers.

Pickles are opened here only after the user has trusted them (`spa.intake.converting`); all else is loaded in ways that run no code of the
file's: `TORCH_FORCE_WEIGHTS_ONLY_LOAD` holds torch to that for the pickles that archives of torch.export may hold.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

OBJECTS = re.compile(r"/constants/(custom_obj|opaque_obj)")  # members of a .pt2 archive that are unpickled as they are
WEIGHTS = ("state_dict", "model", "model_state_dict", "net", "ema")  # where training scripts put them
NEED_TORCHVISION = ("torch", "timm", "pickle", "safetensors")  # may import it


def subject(source: Any, wish: dict[str, Any]) -> Any:
    """The network of a source, with its inputs. Raises ValueError, OSError or ImportError, as `serve.py` has it."""
    import torch

    if not wish["trust"]:
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if not isinstance(source, str):
        return of_module(source, wish)
    if wish["framework"] in NEED_TORCHVISION:
        import_torchvision()
    torch.manual_seed(wish.get("seed", 0))  # of weights that are drawn
    return _KINDS[wish["framework"]](source, wish)


def _of_factory(source: str, wish: dict[str, Any]) -> Any:
    """file.py:factory or package.module:factory: a module, what makes one, or what gives (module, inputs)."""
    made = _called(_attribute(source, wish["entry"], wish), wish["entry"])
    return of_module(made, wish)


def _of_timm(source: str, wish: dict[str, Any]) -> Any:
    """timm:NAME has drawn weights, timm:NAME.TAG those that timm fetches; a folder has its own."""
    import timm

    name = source.removeprefix("timm:")
    local = os.path.isdir(source)
    try:
        network = timm.create_model(f"local-dir:{source}" if local else name, pretrained=local or "." in name)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    found = of_module(network, wish, size=network.default_cfg.get("input_size"))
    if not local and "." not in name:
        seed = wish.get("seed", 0)
        found.notes.append(f"The weights are drawn (seed {seed}): give a checkpoint as MODEL and --entry timm:{name} for its own.")
    return found


def _of_state(source: str, wish: dict[str, Any]) -> Any:
    """.safetensors: weights alone, for the network that --entry makes."""
    from safetensors.torch import load_file

    try:
        state = load_file(source)
    except Exception as error:  # safetensors_rust's own class
        raise OSError(str(error)) from error
    return _filled(state, source, wish)


def _of_pickle(source: str, wish: dict[str, Any]) -> Any:
    """What torch.save wrote: a module, or weights."""
    import torch

    _own_modules(wish)
    try:
        found = torch.load(source, map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        raise ValueError(f"the classes that it was pickled from are not here: {error}") from error
    except Exception as error:  # pickle raises whatever it likes
        raise OSError(f"it is damaged ({type(error).__name__}: {_first_line(error)})") from error
    if isinstance(found, torch.nn.Module):
        return of_module(found, wish)
    if isinstance(found, Mapping):
        inner = next((found[k] for k in WEIGHTS if isinstance(found.get(k), Mapping)), found)
        return _filled(dict(inner), source, wish)
    raise ValueError(f"it holds a {type(found).__name__}, neither a network nor its weights")


def _of_torchscript(source: str, wish: dict[str, Any]) -> Any:
    import torch

    try:
        network = torch.jit.load(source, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise OSError(_first_line(error)) from error
    found = of_module(network, wish)
    found.kind = "script"
    return found


def _of_exported(source: str, wish: dict[str, Any]) -> Any:
    """An ExportedProgram: its free sizes are those that it was exported with."""
    import torch

    try:
        with zipfile.ZipFile(source) as opened:
            members = opened.namelist()
    except zipfile.BadZipFile as error:
        raise OSError(f"it is damaged ({error})") from error
    if not wish["trust"] and any(OBJECTS.search(n) for n in members):
        raise ValueError("it holds pickled objects, and loading a pickle runs whatever code lies in it; if you trust where it comes from, "
                         "say so with --trust")  # fmt: skip
    try:
        program = torch.export.load(source)
    except Exception as error:  # torch raises whatever broke first
        writer = _writer(source)
        other = "" if writer == torch.__version__ else (
            f", or torch {writer or 'of another version'} wrote it: convert it with that one, or export it again")  # fmt: skip
        raise OSError(f"torch {torch.__version__} does not load it ({_first_line(error)}): it is damaged{other}") from error
    from torch.utils import _pytree

    tensors = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    names = list(program.graph_signature.user_inputs)
    leaves = _pytree.tree_leaves(program.example_inputs) if program.example_inputs else []
    example = leaves if len(leaves) == len(names) else [torch.zeros([int(s) if isinstance(s, int) else 2 for s in tensors[n].shape],
                                                                   dtype=tensors[n].dtype) for n in names]  # fmt: skip
    axes = {n: {k: str(s) for k, s in enumerate(tensors[n].shape) if not isinstance(s, int)} for n in names}
    return _export().Subject(program, names, tuple(example), {n: a for n, a in axes.items() if a}, kind="exported")


def _writer(source: str) -> str:
    """The version of torch that wrote an archive of torch.export; "" where it does not tell."""
    try:
        with zipfile.ZipFile(source) as opened:
            model = next(n for n in opened.namelist() if n.endswith("/models/model.json"))
            return str(json.loads(opened.read(model))["torch_version"])
    except Exception:  # a damaged archive breaks anywhere
        return ""


def of_module(made: Any, wish: dict[str, Any], *, size: Any = None) -> Any:
    """A module, or (module, inputs). Raises ValueError where nobody says what the inputs are."""
    import torch

    network, example = made if isinstance(made, tuple | list) and len(made) == 2 else (made, None)
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"it is a {type(network).__name__}, and no torch.nn.Module")
    network = network.eval().cpu()
    parameters = _parameters(network)
    if example is None and not wish["inputs"]:
        example = _known(network, size)
    if example is None and not wish["inputs"]:
        listed = ", ".join(p.name for p in parameters if p.default is p.empty) or "x"
        first = listed.split(",")[0]
        raise ValueError(f"it does not say what its inputs are ({listed}): give shapes with --input {first}:1x3x224x224")
    if isinstance(example, Mapping):
        names, tensors = list(example), list(example.values())
    elif example is not None:
        tensors = list(example) if isinstance(example, tuple | list) else [example]
        names = _names(parameters, len(tensors))
    else:
        names, tensors = _drawn(parameters, wish)
    axes = _free(names, tensors, wish)
    own = [p.name for p in parameters]
    keyword = own[: len(names)] != names and set(names) <= set(own)
    return _export().Subject(network, names, tuple(tensors), axes, keyword=keyword)


def _drawn(parameters: list[Any], wish: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Inputs of the shapes that the user gave: names of forward's, or in its order."""
    import torch

    given = wish["inputs"]
    own = _names(parameters, len(given))
    names = [own[k] if name.isdigit() or not name else name for k, name in enumerate(given)]
    known = {p.name for p in parameters}
    foreign = [n for n in names if n not in known]
    if foreign and len(given) > 1 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ValueError(f"it has no input {foreign[0]}; it has: {', '.join(p.name for p in parameters)}")
    drawn = torch.Generator().manual_seed(0)
    tensors = []
    for k, (name, shape) in enumerate(given.items()):
        sizes = [s if isinstance(s, int) else (_export().BATCH if axis == 0 else _export().TRIED) for axis, s in enumerate(shape)]
        kind = getattr(torch, wish["dtypes"].get(name) or wish["dtypes"].get(names[k]) or "float32", None)
        if kind is None:
            raise ValueError(f"torch has no type {wish['dtypes'][name]}")
        tensors.append(torch.randn(sizes, generator=drawn).to(kind) if kind.is_floating_point else torch.ones(sizes, dtype=kind))
    return names, tensors


def _free(names: list[str], tensors: list[Any], wish: dict[str, Any]) -> dict[str, dict[int, str]]:
    """The axes that may be free: the first of each, as the batch, and those that the user has named."""
    axes = {n: {0: "batch"} for n, t in zip(names, tensors, strict=True) if t.ndim}
    for k, (_, shape) in enumerate(wish["inputs"].items()):
        if k < len(names):
            named = {a: (s or f"{names[k]}_{a}") for a, s in enumerate(shape) if not isinstance(s, int)}
            if named:
                axes[names[k]] = named
    return axes


def _parameters(network: Any) -> list[Any]:
    """What forward takes."""
    schema = getattr(getattr(network, "forward", None), "schema", None)
    if schema is not None:  # TorchScript
        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        return [inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else empty)
                for a in schema.arguments if a.name != "self"]  # fmt: skip
    return [p for p in inspect.signature(network.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]


def _names(parameters: list[Any], count: int) -> list[str]:
    plain = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    return [plain[k] if k < len(plain) else f"input_{k}" for k in range(count)]


def _known(network: Any, size: Any) -> Any:
    """Inputs that a network tells of itself: Lightning's, transformers', timm's."""
    import torch

    for name in ("example_input_array", "dummy_inputs"):
        found = getattr(network, name, None)
        if found is not None:
            return found
    size = size or getattr(network, "default_cfg", {}).get("input_size")
    return None if size is None else torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def _filled(state: dict[str, Any], source: str, wish: dict[str, Any]) -> Any:
    """The network of --entry with these weights. Raises ValueError, saying which, where they do not fit."""
    entry = wish["entry"]
    if not entry:
        raise ValueError("it holds weights alone, and no network: say what makes it with --entry file.py:factory, package.module:Class or "
                         "timm:name")  # fmt: skip
    if entry.startswith("timm:"):
        import timm

        made: Any = timm.create_model(entry.removeprefix("timm:"), pretrained=False)
    else:
        place, _, name = entry.rpartition(":")
        if not place:
            raise ValueError(f"--entry {entry} is not of the form file.py:factory or package.module:Class")
        made = _called(_attribute(place, name, wish), name)
    network = made[0] if isinstance(made, tuple | list) else made
    plain = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in state.items()}
    own = network.state_dict()
    missing, foreign = sorted(set(own) - set(plain)), sorted(set(plain) - set(own))
    if missing or foreign:
        what, one = ("lacks", missing) if missing else ("has", foreign)
        raise ValueError(f"it does not fit {entry}: it {what} {one[0]}{f' and {len(one) - 1} more' if len(one) > 1 else ''}, "
                         f"which the network {'has' if missing else 'lacks'}")  # fmt: skip
    for name, value in plain.items():
        if tuple(value.shape) != tuple(own[name].shape):
            raise ValueError(f"it does not fit {entry}: {name} is {tuple(value.shape)}, and {tuple(own[name].shape)} in the network")
    network.load_state_dict(plain)
    return of_module(made, wish)


def _own_modules(wish: dict[str, Any]) -> None:
    """The user's folder is where their modules are."""
    folder = _export().folder_of(wish)
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _attribute(place: str, name: str, wish: dict[str, Any]) -> Any:
    """What a name means in a file or module."""
    _own_modules(wish)
    file = os.path.join(_export().folder_of(wish), place)
    if place.endswith(".py"):
        if not os.path.isfile(file):
            raise OSError(f"there is no file {place}")
        module = _of_file(os.path.abspath(file))
    else:
        module = importlib.import_module(place)
    if not name:
        raise ValueError(f"say which class or function makes the network: {os.path.basename(place)}:NAME")
    for part in name.split("."):
        if not hasattr(module, part):
            raise ValueError(f"{os.path.basename(place)} has no {name}")
        module = getattr(module, part)
    return module


def _of_file(file: str) -> Any:
    """A Python file as the module that its neighbours would import."""
    name = os.path.splitext(os.path.basename(file))[0]
    known = sys.modules.get(name)
    if known is not None and os.path.abspath(getattr(known, "__file__", None) or "") == file:
        return known
    sys.path.insert(0, os.path.dirname(file))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _called(found: Any, name: str) -> Any:
    """A factory's network; a network as it is."""
    import torch

    if isinstance(found, torch.nn.Module | tuple | list) or not callable(found):
        return found
    needed = [p.name for p in inspect.signature(found).parameters.values()
              if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
    if needed:
        raise ValueError(f"{name} can't be called without arguments ({', '.join(needed)}): give a function that takes none")
    return found()


def _first_line(error: BaseException) -> str:
    """The first sentence of the first line; what torch says of damaged archives goes on at length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__


def import_torchvision() -> None:
    """Torchvision where its compiled operators do not fit the installed torch: no classifier calls them, but their names must be there."""
    import torch

    for _ in range(50):  # more than it has
        try:
            importlib.import_module("torchvision")
        except ImportError:
            return  # who needs it will say so
        except RuntimeError as error:
            lacking = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if lacking is None:
                raise
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
            _LIBRARIES[-1].define(f"{lacking[1]}(Tensor any) -> Tensor")
        else:
            return


def _export() -> Any:
    """`torch_export.py`, which `torch_worker.py` has loaded."""
    return sys.modules["spa_intake_torch_export"]


_LIBRARIES: list[Any] = []  # what torch.library declares lives as long as its Library object
_KINDS = {"torch": _of_factory, "timm": _of_timm, "safetensors": _of_state, "pickle": _of_pickle, "torchscript": _of_torchscript,
          "exported": _of_exported}  # fmt: skip
