"""Fuzzes the loader and the tracer: damaged models must give a pruned model or one SpaError, never anything else.

    python -m tools.fuzz [--minutes 5] [--seed 0] [--crashes DIR] [MODEL ...]

Takes small graphs (by default models/zoo), damages them (attributes, shapes, wiring, types, opset, whole bytes), and runs the
whole line without the proof. A crash is written to DIR with the error's name; the seed and count say how to get it again.
"""

from __future__ import annotations

import random
import signal
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer

import spa
from models import weightless

ZOO = Path(__file__).parent.parent / "models" / "zoo"
SECONDS = 60  # one input must not take longer


def damage(model: onnx.ModelProto, rng: random.Random) -> str:
    """Damages a model in one to four places; says how."""
    done = []
    for _ in range(rng.randint(1, 4)):
        way = rng.choice([_attribute, _dims, _input, _drop, _opset, _type, _output, _operator, _values])
        way(model.graph if way is not _opset else model, rng)
        done.append(way.__name__.strip("_"))
    return ", ".join(done)


def _node(graph: Any, rng: random.Random) -> Any:
    return rng.choice(graph.node) if graph.node else onnx.NodeProto()


def _attribute(graph: Any, rng: random.Random) -> None:
    node = _node(graph, rng)
    if not node.attribute:
        node.attribute.append(onnx.helper.make_attribute(rng.choice(["axis", "group", "perm", "axes", "keepdims"]), rng.randint(-3, 9)))
        return
    attribute = rng.choice(node.attribute)
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice([-1, 0, 1, 2, 7, 1 << 40, -(1 << 40)])
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice([-7, -1, 0, 1, 2, 3, 5, 64, 1 << 40])
    elif rng.random() < 0.5:
        node.attribute.remove(attribute)
    else:
        attribute.type = rng.choice([1, 2, 3, 6, 7])


def _dims(graph: Any, rng: random.Random) -> None:
    value = rng.choice([*graph.input, *graph.output, *graph.value_info])
    dims = value.type.tensor_type.shape.dim
    if dims and rng.random() < 0.7:
        dim = rng.choice(dims)
        dim.Clear()
        if rng.random() < 0.7:
            dim.dim_value = rng.choice([0, 1, 2, 3, 5, 8, 17, -1, 1 << 40])
        elif rng.random() < 0.5:
            dim.dim_param = "n"
    elif dims and rng.random() < 0.5:
        del dims[-1]
    else:
        dims.add().dim_value = 3


def _input(graph: Any, rng: random.Random) -> None:
    node = _node(graph, rng)
    if node.input:
        names = [i.name for i in graph.initializer] + [o for n in graph.node for o in n.output] + [""]
        node.input[rng.randrange(len(node.input))] = rng.choice(names)


def _drop(graph: Any, rng: random.Random) -> None:
    if graph.node:
        del graph.node[rng.randrange(len(graph.node))]


def _opset(model: Any, rng: random.Random) -> None:
    model.opset_import[0].version = rng.choice([0, 1, 6, 7, 9, 11, 13, 17, 18, 20, 23, 99])


def _type(graph: Any, rng: random.Random) -> None:
    if graph.initializer:
        rng.choice(graph.initializer).data_type = rng.choice([1, 6, 7, 8, 9, 10, 16, 0, 99])


def _output(graph: Any, rng: random.Random) -> None:
    node = _node(graph, rng)
    if node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(["", "x", node.output[0]])


def _operator(graph: Any, rng: random.Random) -> None:
    node = _node(graph, rng)
    node.op_type = rng.choice(sorted({o for d, o in spa.signatures.operators() if not d}))


def _values(graph: Any, rng: random.Random) -> None:
    small = [i for i in graph.initializer if i.data_type == 7 and len(i.raw_data) == 8 * max(1, int(np.prod(i.dims)))]
    if small:
        tensor = rng.choice(small)
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.size:
            values.flat[rng.randrange(values.size)] = rng.choice([-1, 0, 1, 2, 64, 1 << 40])
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def attempt(data: bytes, seed: int) -> str:
    """Runs the line on a model; returns the outcome. Anything but a SpaError goes through."""
    try:
        spa.prune(data, 0.5, multiple_of=1, criterion="random", check=False, seed=seed).to_proto()
    except spa.SpaError as error:
        return type(error).__name__
    return "pruned"


def main(
    models: Annotated[list[Path] | None, typer.Argument()] = None,
    minutes: Annotated[float, typer.Option()] = 5.0,
    seed: Annotated[int, typer.Option()] = 0,
    crashes: Annotated[Path, typer.Option()] = Path("crashes"),
) -> None:
    """Fuzzes for a while and prints outcomes."""
    paths = models or sorted(ZOO.glob("*.xz"), key=lambda p: p.stat().st_size)[:12]
    sources = [(weightless.load(p) if p.name.endswith(".xz") else onnx.load(p)).SerializeToString() for p in paths]
    sources = [s for s in sources if len(s) < 8 << 20]
    outcomes: dict[str, int] = {}
    deadline = time.monotonic() + 60 * minutes
    count = 0
    signal.signal(signal.SIGALRM, _too_long)
    while time.monotonic() < deadline:
        rng = random.Random(seed * 1_000_000 + count)
        model = onnx.load_from_string(rng.choice(sources))
        how = damage(model, rng)
        data = model.SerializeToString()
        signal.alarm(SECONDS)
        try:
            outcome = attempt(data, count)
        except Exception as error:  # that is what it looks for
            outcome = f"CRASH {type(error).__name__}"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).stem}-{frame.lineno}"
            crashes.mkdir(parents=True, exist_ok=True)
            path = crashes / f"{type(error).__name__}-{place}.onnx"
            if not path.exists():
                path.write_bytes(data)
                print(f"{path}: {how}: {str(error)[:200]}", flush=True)
        finally:
            signal.alarm(0)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        count += 1
    print(f"{count} models, seed {seed}: {outcomes}")
    if any(o.startswith("CRASH") for o in outcomes):
        raise typer.Exit(1)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"one model took more than {SECONDS} s")


if __name__ == "__main__":
    typer.run(main)
