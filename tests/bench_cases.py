"""Models to race, and engines that run nothing and tell the times that they are given."""

from __future__ import annotations

import io
import platform
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from apart_engine import APART
from rich.console import Console
from test_trace import net

import spa
from spa.engines import ENGINES, Engine, Placement, Settings, engine
from spa.proof.feeds import Feeds

REASON = "only the x86-64 builds of ONNX Runtime lay channels out in blocks"
blocked = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason=REASON)

X = {"x": np.ones((2, 4), np.float32), "unknown": np.ones(1)}


class Fake:
    """Runs nothing. It notes who ran, and tells times as another process would: those that were given for its model."""

    log: ClassVar[list[str]] = []
    loads: ClassVar[list[str]] = []
    seconds: ClassVar[dict[str, Any]] = {}
    open = 0

    def __init__(self, model: spa.Model, settings: Settings) -> None:
        self.name = model.graph.outputs[0].name
        Fake.loads.append(self.name)
        self.number = Fake.loads.count(self.name)
        self.placement = Placement({"Fake": 3, "CPUExecutionProvider": 1}, {"y": "it does not know Relu"})
        Fake.open += 1

    def run(self, feeds: Feeds) -> Feeds:
        return {self.name: feeds["x"]}

    def bound(self, feeds: Feeds) -> Callable[[], None]:
        if Fake.seconds.get(self.name) == "breaks":
            raise RuntimeError("\nout of luck\nat line 3")

        def call() -> None:
            Fake.log.append(f"{self.name}{self.number}")
            told = Fake.seconds.get(f"{self.name}{self.number}", Fake.seconds.get(self.name, 1.0))
            call.seconds = call.thread_seconds = told() if callable(told) else told  # type: ignore[attr-defined]

        call.seconds = call.thread_seconds = 0.0  # type: ignore[attr-defined]
        return call

    def close(self) -> None:
        Fake.open -= 1


@pytest.fixture(autouse=True)
def fakes() -> Iterator[None]:
    Fake.log, Fake.loads, Fake.seconds, Fake.open = [], [], {}, 0
    engine(Engine("fake", "runtime", Fake, lambda: "", lambda: "fake 1", thread_time=True, block=lambda: 32))
    engine(Engine("slow-clock", "provider", Fake, lambda: "", lambda: "fake 1"))
    engine(Engine("simulator", "provider", Fake, lambda: "", lambda: "", timed="it is a simulator's time, not the chip's"))
    engine(APART)
    yield
    for name in ("fake", "slow-clock", "simulator", APART.name):
        del ENGINES[name]
    assert Fake.open == 0  # whatever was opened is closed


def named(name: str) -> spa.Model:
    return spa.load(net(f"float[2,4] x -> float[2,4] {name}", f"{name} = Relu(x)"))


def convnet(width: int, *, group: int = 1) -> onnx.ModelProto:
    body = f"""a = Conv <pads=[1,1,1,1]> (x, w1) r = Relu(a) b = Conv <pads=[1,1,1,1], group={group}> (r, w2) s = Relu(b)
               c = Conv <pads=[1,1,1,1]> (s, w3) t = Relu(c) g = GlobalAveragePool(t) f = Flatten(g) y = MatMul(f, w4)"""
    return net("float[1,3,8,8] x -> float[1,10] y", body, w1=(width, 3, 3, 3), w2=(width, width // group, 3, 3), w3=(width, width, 3, 3),
               w4=(width, 10))


def text(shown: Any, width: int = 140) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(shown)
    return file.getvalue()
