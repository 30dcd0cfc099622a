"""What ONNX Runtime's execution providers have in common: `children/ort.py`, in this process or in another one.

Providers that are plugins, or that have an onnxruntime of their own, run in a process of their own: a plugin changes how every session of
its process chooses providers, and two builds of onnxruntime can't share an environment. Sizes are fixed to those of the feeds, so that
onnxruntime folds what computes shapes away, instead of leaving it to the CPU.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spa.engines.children import ort as runtime
from spa.engines.pinned import Converted
from spa.engines.table import Opened, Placement, Settings
from spa.engines.worker import Remote, python_child
from spa.errors import UnsupportedModel
from spa.proof.check import IN_MEMORY
from spa.proof.feeds import Feeds
from spa.storage.store import Model, save, to_bytes


class Here:
    """A session in this process. Raises UnsupportedModel with the runtime's own words."""

    def __init__(self, model: Model, settings: Settings, *, provider: str, label: str = "", device: str = "") -> None:
        self.label, self.device = label, device
        with tempfile.TemporaryDirectory() as folder, self._named("load"):
            path = Path(folder) / "model.onnx"
            if model.nbytes >= IN_MEMORY:
                save(model, path, external=True)
            source = os.fspath(path) if model.nbytes >= IN_MEMORY else to_bytes(model)
            self.session = runtime.Session(source, provider, settings.threads, _options(settings))
        nodes = self.session.nodes or {provider: len(model.graph.nodes)}  # which an old onnxruntime does not record
        self.placement = Placement(nodes, self.session.fell_back, self.session.proven or provider == runtime.CPU)
        self.figures: Mapping[str, float] = self.session.figures

    def run(self, feeds: Feeds) -> Feeds:
        """All outputs by name."""
        with self._named("run"):
            return self.session.run(feeds)

    def bound(self, feeds: Feeds) -> Callable[[], None]:
        """A call that runs once, with inputs and outputs where the provider wants them."""
        with self._named("run"):
            return self.session.bind(feeds, self.device)

    def close(self) -> None:
        """Writes the profile, if one was asked for."""
        self.session.close()

    @contextmanager
    def _named(self, what: str) -> Any:
        try:
            yield
        except Exception as error:  # onnxruntime raises classes of its own for each status
            text = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UnsupportedModel(f"{self.label} does not {what} the model: {text}" if self.label else text) from error


class Sized(Converted):
    """A model whose sizes are fixed when it first sees feeds; `figures` are those of the session behind it."""

    @property
    def figures(self) -> Mapping[str, float]:
        """Numbers that the provider tells of the model."""
        return getattr(self._now[2], "figures", {}) if self._now else {}


def here(provider: str, label: str, *, defaults: Mapping[str, str], device: str = "") -> Callable[[Model, Settings], Opened]:
    """How a provider of this process loads a model."""
    def load(model: Model, settings: Settings) -> Opened:
        return Sized(model, with_defaults(settings, defaults),
                     lambda m, s: Here(m, s, provider=provider, device=device), label=label)  # fmt: skip

    return load


def elsewhere(
    command: Callable[[], Sequence[str]], label: str, *, defaults: Mapping[str, str], environment: Callable[[], Mapping[str, str]] = dict
) -> Callable[[Model, Settings], Opened]:
    """How a provider of another process loads a model."""
    def load(model: Model, settings: Settings) -> Opened:
        def start(sized: Model, given: Settings) -> Opened:
            return Remote(command(), sized, Settings(given.threads, _options(given)), environment=environment())

        return Sized(model, with_defaults(settings, defaults), start, label=label)

    return load


def provider_child(provider: str, *, variable: str) -> Callable[[], tuple[str, ...]]:
    """The command of a child for one provider: in the Python that an environment variable names, or this one."""
    start = python_child("ort.py", variable=variable)
    return lambda: (*start(), provider)


def with_defaults(settings: Settings, defaults: Mapping[str, str]) -> Settings:
    """The settings, with options where they are silent."""
    return Settings(settings.threads, {**defaults, **settings.options}, settings.profile)


def _options(settings: Settings) -> dict[str, str]:
    """Options for `children/ort.py`."""
    given = {k: v for k, v in settings.options.items() if k != "interface"}  # which only converters want
    return given | ({"profile": os.path.abspath(settings.profile)} if settings.profile else {})
