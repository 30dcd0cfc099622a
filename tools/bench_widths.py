"""Which widths does an engine like? The measurement behind `--multiple-of auto`: `taskset -c 1 python -m tools.bench_widths`.

Two small networks over widths around multiples of the block: three 3x3 convolutions of C channels behind one that reads a picture, and a
feed-forward layer 256 -> F -> 256 on 64 tokens. The widths of a group race in one process, rounds interleaved, one thread; ratios are
medians of paired ratios to the width that the group is named after, of CPU time where the engine allows it. Beside the clock stand the
proxies: padded MACs and convolutions in blocks. Writes docs/widths.csv, .md and .png (extra dev: matplotlib).
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

import spa
from models.extras import need
from spa.budgets.layout_proxy import proxy
from spa.engines import Engine, find
from spa.storage.store import load

KINDS = {"conv": "three 3x3 convolutions of C channels, 28x28", "ffn": "feed-forward layer 256 -> F -> 256, 64 tokens"}
OFFSETS = (-16, -12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Row:
    """One width: seconds of one run, ratios to the group's own width."""

    kind: str
    group: int
    width: int
    seconds: float
    quartile: float
    ratio: float
    low: float
    high: float
    macs: float
    padded: float
    blocked: int
    convolutions: int


def network(kind: str, width: int) -> onnx.ModelProto:
    """A small network of that width, with weights drawn from it."""
    rng = np.random.default_rng(width)
    nodes, weights = [], []

    def weight(*shape: int) -> str:
        name = f"w{len(weights)}"
        values = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        weights.append(numpy_helper.from_array(values, name))
        return name

    def add(op: str, inputs: Sequence[str], **attributes: object) -> str:
        nodes.append(helper.make_node(op, [*inputs], [f"h{len(nodes)}"], name=f"{op}{len(nodes)}", **attributes))
        return str(nodes[-1].output[0])

    if kind == "conv":
        shape, value = [1, 3, 28, 28], "x"
        for read in (3, width, width, width):
            value = add("Relu", [add("Conv", [value, weight(width, read, 3, 3)], pads=[1, 1, 1, 1])])
        value = add("ReduceMean", [value], axes=[2, 3], keepdims=0)
    else:
        shape = [64, 256]
        value = add("MatMul", [add("Relu", [add("MatMul", ["x", weight(256, width)])]), weight(width, 256)])
    result = helper.make_tensor_value_info(value, 1, None)
    graph = helper.make_graph(nodes, kind, [helper.make_tensor_value_info("x", 1, shape)], [result], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def measure(kind: str, center: int, engine: Engine, *, rounds: int, seconds: float, seed: int) -> tuple[list[Row], spa.timing.bench.Race]:
    """One group of widths, raced."""
    widths = [center, *(center + o for o in OFFSETS if o)]  # the first is what the others are compared with
    models = {str(w): load(network(kind, w)) for w in widths}
    size = (1, 3, 28, 28) if kind == "conv" else (64, 256)
    feeds = {"x": np.random.default_rng(seed).standard_normal(size).astype(np.float32)}
    race = spa.race(models, feeds, rounds=rounds, seconds=seconds, seed=seed, engine=engine)
    layout = "CPUExecutionProvider" in (race.laps[0].placement.nodes if race.laps[0].placement else {})
    proxies = {n: proxy(m, spa.analyze(m).groups, engine.block(), layout=layout) for n, m in models.items()}
    own = proxies[str(center)]
    rows = []
    for lap in race.laps:
        p = proxies[lap.name]
        blocks = (p.layout.blocked_convolutions, p.layout.convolutions) if p.layout else (0, 0)
        rows.append(Row(kind, center, int(lap.name), lap.median, lap.low, lap.ratio, lap.ratio_low, lap.ratio_high, p.macs / own.macs,
                        p.padded_macs / own.padded_macs, *blocks))  # fmt: skip
    return sorted(rows, key=lambda r: r.width), race


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def markdown(rows: Sequence[Row], about: str) -> str:
    """Tables, a group each."""
    lines = ["# Widths that an engine likes", "", about, "", "![time over width](widths.png)", ""]
    lines += ["time: one run over one run of the width that the group is named after, median of paired ratios with its 95 % interval. "
              "padded MACs: the same ratio of multiply-accumulates, widths rounded up to the block.", ""]  # fmt: skip
    whole = [abs(r.ratio / r.padded - 1) for r in rows if r.convolutions and r.blocked == r.convolutions]
    odd = [r.ratio / r.padded - 1 for r in rows if r.blocked < r.convolutions and r.width < r.group]
    if whole and odd:
        lines += [f"Where all convolutions are in blocks, time is off padded MACs by at most {100 * max(whole):.1f} %. Just below a block, "
                  f"widths that 4 does not divide take {100 * min(odd):.0f} to {100 * max(odd):.0f} % more than that.", ""]  # fmt: skip
    for kind, center in dict.fromkeys((r.kind, r.group) for r in rows):
        found = [r for r in rows if (r.kind, r.group) == (kind, center)]
        lines += [f"## {KINDS[kind]}: around {center}", "", "| width | ms | time | 95 % | MACs | padded MACs | Conv in blocks |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for r in found:
            blocks = f"{r.blocked} of {r.convolutions}" if r.convolutions else "–"
            mark = "**" if r.width == center else ""
            lines.append(f"| {mark}{r.width}{mark} | {1000 * r.seconds:.3f} | {r.ratio:.2f} | {r.low:.2f} – {r.high:.2f} | {r.macs:.2f} | "
                         f"{r.padded:.2f} | {blocks} |")  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, about: str, block: int) -> None:
    """Time over width, a panel a group, with MACs and padded MACs."""
    mpl = need("matplotlib", extra="dev")
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(r.kind for r in rows))
    groups = {k: list(dict.fromkeys(r.group for r in rows if r.kind == k)) for k in kinds}
    figure, axes = plt.subplots(len(kinds), max(map(len, groups.values())), figsize=(12.5, 3.6 * len(kinds)), squeeze=False,
                                sharey="row")  # fmt: skip
    for line, kind in zip(axes, kinds, strict=True):
        for panel, center in zip(line, groups[kind], strict=False):
            found = [r for r in rows if (r.kind, r.group) == (kind, center)]
            x = [r.width for r in found]
            panel.plot(x, [r.macs for r in found], ":", color="gray", label="MACs")
            label = f"MACs, widths rounded up to {block}"
            panel.plot(x, [r.padded for r in found], color="tab:orange", drawstyle="steps-pre", label=label)
            for whole, style, color in ((True, "o", "tab:blue"), (False, "x", "tab:red")):
                some = [r for r in found if (r.width % 4 == 0) == whole]
                spread = [[r.ratio - r.low for r in some], [r.high - r.ratio for r in some]]
                label = f"time, width {'' if whole else 'not '}divisible by 4"
                panel.errorbar([r.width for r in some], [r.ratio for r in some], spread, fmt=style, color=color, label=label, capsize=2)
            for edge in range(x[0] // block * block, x[-1] + block, block):
                panel.axvline(edge, color="lightgray", linewidth=0.7, zorder=0)
            panel.set(title=f"{kind} around {center}", xlabel="width", ylabel=f"ratio to width {center}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=9)
    figure.suptitle(about, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_widths", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="cpu", help="a provider or runtime of spa's")
    parser.add_argument("--kinds", default="conv,ffn")
    parser.add_argument("--centers", default="64,128,256")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each group, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what else to say of the machine")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/widths.csv"))
    given = parser.parse_args()
    engine, rows, races = find(given.engine), [], []
    for kind in given.kinds.split(","):
        for center in map(int, given.centers.split(",")):
            found, race = measure(kind, center, engine, rounds=given.rounds, seconds=given.seconds, seed=given.seed)
            rows += found
            races.append(race)
            itself = race.itself
            against = f"{itself.middle:.3f} ({itself.low:.3f} – {itself.high:.3f})" if itself else "–"
            print(f"{kind} {center}: {race.rounds} rounds, width {center} against itself {against}", file=sys.stderr, flush=True)
    clock = "CPU time of the thread that runs it" if races[0].primary == "cpu" else "wall time"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pinned = f", pinned to core {cores[0]} of {os.cpu_count()}" if len(cores) == 1 else ""
    about = (f"{engine.kind} {engine.name} ({races[0].version}), block {engine.block()}, {processor()}, one thread{pinned}, {clock}, "
             f"{' to '.join(map(str, sorted({min(r.rounds for r in races), max(r.rounds for r in races)})))} interleaved rounds, "
             f"seed {given.seed}")  # fmt: skip
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows({k: round(v, 7) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows)
    worst = max((abs(r.itself.middle - 1) for r in races if r.itself), default=0.0)
    text = f"`python -m tools.bench_widths` on {about}. A width against itself, loaded twice, came to within {100 * worst:.1f} % of 1."
    if hasattr(os, "getloadavg"):
        text += f" The load average was {os.getloadavg()[0]:.1f}: other programs ran, whose time CPU time leaves out."
    text += f" {given.note}" if given.note else ""
    given.output.with_suffix(".md").write_text(markdown(rows, text), encoding="utf-8")
    plot(rows, given.output.with_suffix(".png"), about, engine.block())


if __name__ == "__main__":
    main()
