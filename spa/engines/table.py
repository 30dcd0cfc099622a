"""The table of engines: what runs a model, told apart by name (`--provider cpu`, `--runtime ncnn`).

An engine is one small adapter in a module of this package. Everything else (the proof, the timing, latency tables, the command line)
asks the table and knows no engine by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from spa.errors import BadOption
from spa.graph.explain import near
from spa.proof.feeds import Feeds
from spa.storage.store import Model

TOLERANCES: Mapping[str, float] = MappingProxyType({"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2, "int8": 5e-2})
"""Of an output's scale, by element type; int8 stands for all that is quantised. Rounding to 2^-11 (float16) or 2^-9 (bfloat16) adds up over
a hundred layers to ten times that, and a quantised network may land a step of 1/255 off in each. docs/providers.md: half that at most."""


@dataclass(frozen=True)
class Settings:
    """How a model is run.

    threads: 0 for the engine's own choice. options: the engine's own, by name, and `precision`: what it computes float32 in (f32, bf16,
    f16). profile: where ONNX Runtime's providers write what each node took, as PROFILE_….json when the model is closed ("" for nowhere);
    what is no provider ignores it.
    """

    threads: int = 0
    options: Mapping[str, str] = field(default_factory=dict)
    profile: str = ""


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a loaded model run.

    nodes: what took them -> how many (fused nodes count as the runtime counts them). fell_back: node -> why it is not on the engine that
    was asked for. `proven` is False where the runtime does not say, which is no claim that it ran elsewhere.
    """

    nodes: Mapping[str, int]
    fell_back: Mapping[str, str] = field(default_factory=dict)
    proven: bool = True


class Opened(Protocol):
    """A model that is loaded and ready to run.

    It may have `figures`, numbers by name that the engine tells of the model (`context_bytes` of an NPU's binary).
    """

    placement: Placement

    def run(self, feeds: Feeds) -> Feeds:
        """All outputs by name; feeds that are no inputs are ignored. Raises UnsupportedModel if the engine fails."""

    def bound(self, feeds: Feeds) -> Callable[[], None]:
        """A call that runs once on inputs and outputs that already lie where the engine wants them: what is timed.

        Where it runs in another process, the call has `seconds` and `thread_seconds`: what that process measured of the last one.
        """

    def close(self) -> None:
        """Gives back what it holds."""


@dataclass(frozen=True)
class Engine:
    """One thing that runs models.

    name: as the command line spells it. kind: "provider" (of ONNX Runtime) or "runtime". load: a model that is ready; raises
    UnsupportedModel with the engine's own words. missing: "" if it can be used here, else one sentence that says what to install.
    version: of the runtime and of what it stands on. tolerances: ONNX element type -> what the proof allows, over an output's scale.
    timed: "" if its times mean something, else why they must not be reported (an emulator, a simulator). apart: whether each model wants a
    process of its own, which whoever loads it must start (engines that start one themselves, through `worker.Remote`, don't).
    thread_time: whether one thread does all the work, so that its CPU time is exact. block: channels in a block.
    """

    name: str
    kind: str
    load: Callable[[Model, Settings], Opened]
    missing: Callable[[], str]
    version: Callable[[], str]
    tolerances: Mapping[str, float] = field(default_factory=lambda: TOLERANCES)
    timed: str = ""
    apart: bool = False
    thread_time: bool = False
    block: Callable[[], int] = lambda: 16


ENGINES: dict[str, Engine] = {}
_MODULES = ("cpu", "cuda", "openvino", "qnn", "webgpu", "arm64", "litert", "mnn", "ncnn", "node", "openvino_native", "tract")


def engine(entry: Engine) -> Engine:
    """Adds an engine to the table."""
    ENGINES[entry.name] = entry
    return entry


def find(name: str, kind: str | None = None) -> Engine:
    """The engine of that name, ready to be used. Raises BadOption, with the way out, if there is none or it is not installed."""
    for module in _MODULES:
        importlib.import_module(f"spa.engines.{module}")
    names = [n for n, e in ENGINES.items() if kind in (None, e.kind)]
    if name not in names:
        raise BadOption(f"There is no {kind or 'engine'} {name!r}{near(name, names)}; the choice is: {', '.join(names)}.")
    missing = ENGINES[name].missing()
    if missing:
        raise BadOption(missing)
    return ENGINES[name]
