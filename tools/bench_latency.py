"""Is the pruned network faster? Latency over MACs at half of the channels, with and without alignment.

    python -m tools.bench_latency [NETWORK ...] [--ratio 0.5] [--rounds 30] [--threads 1]        needs the extra models

Dense, aligned (`--multiple-of auto`) and unaligned (`--multiple-of 1`) variants of each network race in one process, rounds
interleaved; ratios are medians of round-by-round ratios to the dense one, of CPU time with one thread, else of wall time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import spa
from spa.plans.align import block_of
from tools.bench_prune import build, export


def main(
    networks: Annotated[list[str] | None, typer.Argument(help="torchvision or timm names")] = None,
    rounds: Annotated[int, typer.Option()] = 30,
    threads: Annotated[int, typer.Option()] = 1,
    ratio: Annotated[float, typer.Option(help="0.47 shows what odd widths cost")] = 0.5,
    seconds: Annotated[float, typer.Option(help="at most, for each network")] = 60.0,
) -> None:
    """Races and prints."""
    rows = []
    version = clock = ""
    for name in networks or ["resnet50", "mobilenet_v2"]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export(build(name), path)
            models, macs = {"dense": spa.load(str(path))}, {"dense": 1.0}
            for multiple in ("auto", 1):
                result = spa.prune(str(path), ratio, multiple_of=multiple, check=False)
                models[str(multiple)], macs[str(multiple)] = result.model, result.after.macs / result.before.macs
            feed = {"input": np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)}
            race = spa.race(models, feed, rounds=rounds, seconds=seconds, threads=threads)
        version, clock = race.version, race.primary
        for lap in race.laps:
            rows.append(
                (
                    name,
                    lap.name,
                    f"{macs[lap.name]:.3f}",
                    f"{1000 * lap.median:.1f}",
                    f"{lap.ratio:.3f}",
                    f"{lap.ratio / macs[lap.name]:.2f}",
                )
            )
    table = Table(
        "network",
        "multiple of",
        "MACs",
        "ms",
        "latency",
        "latency / MACs",
        title=f"CPU provider, {version}, {threads} thread(s), {clock} time, block {block_of('cpu')}, ratio {ratio}, {rounds} rounds, "
        "seed 0",
    )
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
