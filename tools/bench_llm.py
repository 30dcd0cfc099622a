"""What SmolLM2-135M keeps when parts of it go: `python -m tools.bench_llm -o docs/llm.csv` (a page and a plot go beside it).

The model has its key-value cache, as it is deployed. Each series removes one kind of unit, or several, until a share of the parameters is
left; no weight is trained. Of what is left: perplexity on text that decided nothing, parameters, MACs of a prefill, the time of a prefill
and of one more token over the dense model's, by turns, and what it generates, with the cache and without. Rows that are in the file already
stay.
"""

from __future__ import annotations

import argparse
import atexit
import csv
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

import spa
from models import language
from models.cached import generate, smollm2_cached
from models.extras import need
from models.tasks import TASKS
from spa.budgets.latency import paired_seconds
from spa.data.calibration import calibration
from spa.data.evidence import Evidence, gather
from spa.engines import find
from spa.graph.analysis import Analysis, moved
from spa.graph.kinds import kinds_of
from spa.layers.depth import Depth, Dropped, choose_layers, without_layers
from spa.proof.check import session
from spa.storage.store import Model

SHARES = (0.9, 0.8, 0.7)
PROMPT = "The capital of France is"
PREFILL = PAST = 256


@dataclass(frozen=True)
class Row:
    """One model that is left."""

    series: str
    share: float  # of the parameters, asked
    parameters: float  # shares of the dense model's
    macs: float
    perplexity: float
    dense: float
    prefill: float  # times over the dense model's
    decode: float
    cached: str  # whether it generates the same with the cache as without
    seconds: float  # to choose, remove, repair and prove
    went: str
    text: str


@dataclass(frozen=True, eq=False)
class Subject:
    """The model, and what is known of it. short: fewer tokens, for methods that run the model hundreds of times."""

    analysis: Analysis
    evidence: Evidence
    short: Evidence
    limit: int
    seed: int
    path: Path
    windows: int

    @property
    def parameters(self) -> int:
        """Of the dense model."""
        return spa.count(self.analysis.groups).parameters


@dataclass(frozen=True)
class Left:
    """What a series leaves."""

    model: Model
    parameters: int
    macs: int
    went: str
    tokenizer: Path | None = None  # where ids went, the one for those that are left


Series = Callable[[Subject, float], Left]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_llm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("llm.csv"))
    parser.add_argument("--exporter", choices=["dynamo", "script"], default="dynamo")
    parser.add_argument("--series", default=",".join(SERIES))
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the parameters that stay")
    parser.add_argument("--windows", type=int, default=64, help=f"stretches of {language.CONTEXT} tokens to choose and repair on")
    parser.add_argument("--limit", type=int, default=4096, help="tokens that are evaluated")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    rows = read(given.output)
    analysis = spa.analyze(str(smollm2_cached(given.exporter)))
    subject = Subject(analysis, evidence_of(analysis, given.windows, language.CONTEXT, given.seed),
                      evidence_of(analysis, 4, 64, given.seed), given.limit, given.seed, smollm2_cached(given.exporter),
                      given.windows)  # fmt: skip
    dense = perplexity(analysis.normal.model, given.limit)
    for series in given.series.split(","):
        for share in map(float, given.shares.split(",")):
            if any((r.series, r.share) == (series, share) for r in rows):
                continue
            began = time.perf_counter()
            try:
                left = SERIES[series](subject, share)
            except spa.SpaError as error:
                print(f"{series} at {share:g}: {error}")
                continue
            rows.append(measured(subject, left, series, share, dense, time.perf_counter() - began))
            print(rows[-1], flush=True)
            write(given.output, rows, given)
    write(given.output, rows, given)


def evidence_of(analysis: Analysis, windows: int, length: int, seed: int) -> Evidence:
    """Stretches of the text to calibrate on, with an empty past."""
    found = TASKS["smollm2"].calibration(windows)
    return gathered(analysis, [feeds_of(analysis.normal.model, b["input_ids"][:, :length]) for b in found], seed)


def gathered(analysis: Analysis, batches: Sequence[dict[str, NDArray[Any]]], seed: int) -> Evidence:
    """Batches as methods take them."""
    return gather(analysis.normal.model, analysis.groups, calibration(batches, analysis.groups.traced, samples=len(batches)), seed=seed)


def feeds_of(model: Model, ids: NDArray[np.int64], past: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs for tokens (batch, length) after a past of so many positions, which is zeros."""
    batch, length = ids.shape
    fed: dict[str, NDArray[Any]] = {
        "input_ids": ids, "attention_mask": np.ones((batch, past + length), np.int64),
        "position_ids": np.arange(past, past + length)[None].repeat(batch, 0),
    }  # fmt: skip
    for tensor in model.graph.inputs:
        if tensor.name.startswith("past_key_values."):
            fed[tensor.name] = np.zeros((batch, int(tensor.shape[1]), past, int(tensor.shape[3])), np.float32)
    names = {t.name for t in model.graph.inputs}
    return {n: v for n, v in fed.items() if n in names}


def perplexity(model: Model, limit: int, tokenizer: Path | None = None) -> float:
    """On the task's text, for each of the dense model's tokens: with another tokenizer the text's loss is spread over those."""
    opened = session(model, threads=1)
    tokens = language.encode_text(language.anarchism_text("evaluation"))[: limit + 1]
    own = tokens
    if tokenizer is not None:
        own = np.array(read_vocabulary(tokenizer).encode(read_vocabulary(smollm2_tokenizer()).decode(tokens)).ids, np.int64)
    found = language.perplexity(lambda ids: np.asarray(opened.run(["logits"], feeds_of(model, ids))[0]), own, limit=len(own) - 1)
    return float(found ** ((len(own) - 1) / (len(tokens) - 1)))


def smollm2_tokenizer() -> Path:
    """The dense model's."""
    return smollm2_cached().with_name("tokenizer.json")


@cache
def read_vocabulary(path: Path) -> Any:
    """A tokenizer."""
    return need("tokenizers", extra="language").Tokenizer.from_file(str(path))


# ---------------------------------------------------------------------- series


def fitted(
    analysis: Analysis, evidence: Evidence, parameters: float, kinds: str, criterion: str, allocation: str = "uniform", multiple: int = 8
) -> Left:
    """Units of some kinds go until so many parameters are left, and the layers behind them are fitted again."""
    budget = spa.Budget((f"params={int(parameters)}",), allocation=allocation, time_limit=600)
    plan = spa.plan(analysis, target=budget, units=kinds.split(","), criterion=criterion, multiple_of=multiple, calibration=evidence)
    done = spa.apply(analysis, plan, repair="obspa", calibration=evidence)
    kept: dict[str, list[float]] = {}
    for group, kind in zip(analysis.groups.groups, kinds_of(analysis.groups), strict=True):
        if group.name in plan.groups:
            kept.setdefault(kind, []).append(len(plan.groups[group.name]["kept"]) / group.size)
    went = "; ".join(f"{kind} {min(shares):.0%}–{max(shares):.0%} of {len(shares)} groups" for kind, shares in kept.items())
    return Left(done.model, done.after.parameters, done.after.macs, f"kept {went}")


def channels(kinds: str, criterion: str, allocation: str = "uniform", multiple: int = 8) -> Series:
    """Units of some kinds of the model as it is."""
    return lambda subject, share: fitted(
        subject.analysis, subject.evidence, share * subject.parameters, kinds, criterion, allocation, multiple)  # fmt: skip


def narrow(subject: Subject, share: float) -> Left:
    """The residual stream is turned onto its principal directions, then the weakest go (SliceGPT, with one rotation for all blocks)."""
    analysis, evidence = turned(subject)
    return fitted(analysis, evidence, share * subject.parameters, "residual", "position")


@cache
def turned(subject: Subject) -> tuple[Analysis, Evidence]:
    """The rotated model, proven on text (noise as a cache magnifies the rounding), and the data for it."""
    analysis = spa.analyze(spa.rotated(subject.analysis, subject.evidence, feeds=subject.evidence.batches[0]).model)
    return analysis, moved(subject.evidence, analysis)


def fewer_ids(subject: Subject, share: float) -> Left:
    """Ids go, the rarest of the text to calibrate on first; so many that they alone are what goes."""
    path = without_ids(subject, share)
    small = spa.analyze(str(path))
    whole = spa.count(small.groups)
    ids = read_vocabulary(path.with_name("m.tokenizer.json")).get_vocab_size()
    return Left(small.normal.model, whole.parameters, whole.macs, f"kept {ids} ids", path.with_name("m.tokenizer.json"))


@cache
def without_ids(subject: Subject, share: float) -> Path:
    """The file without so many ids that this share of the parameters is left, m.tokenizer.json beside it."""
    config = json.loads(subject.path.with_name("config.json").read_text(encoding="utf-8"))
    keep = config["vocab_size"] - int((1 - share) * subject.parameters / config["hidden_size"])
    if keep < config["vocab_size"] // 5:
        raise spa.SpaError(f"All {config['vocab_size']} ids are too few parameters for {share:.0%}.")
    folder = Path(tempfile.mkdtemp(prefix="spa-ids-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = folder / "text.txt"
    text.write_text(language.anarchism_text("calibration"), encoding="utf-8")
    command = ["prune", str(subject.path), "-o", str(folder / "m.onnx"), "--vocab", str(keep), "--calibration", str(text), "--tokenizer",
               str(smollm2_tokenizer()), "--samples", "4000", "--no-bench"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "spa", *command], check=True, capture_output=True)
    found = next(folder.glob("*tokenizer.json"))
    return found.rename(folder / "m.tokenizer.json").with_name("m.onnx")


def joint(subject: Subject, share: float) -> Left:
    """Half of what goes are ids, half neurons."""
    path = without_ids(subject, (1 + share) / 2)
    tokenizer = path.with_name("m.tokenizer.json")
    small = spa.analyze(str(path))
    words = read_vocabulary(tokenizer).encode(language.anarchism_text("calibration")[: len(subject.evidence.batches) * 8192]).ids
    rows = [words[i : i + language.CONTEXT] for i in range(0, len(words) - language.CONTEXT, language.CONTEXT)]
    chosen = np.random.default_rng(subject.seed).permutation(len(rows))[: subject.windows]
    evidence = gathered(small, [feeds_of(small.normal.model, np.array([rows[i]], np.int64)) for i in chosen], subject.seed)
    left = fitted(small, evidence, share * subject.parameters, "neuron", "obspa-greedy")
    ids = read_vocabulary(tokenizer).get_vocab_size()
    return Left(left.model, left.parameters, left.macs, f"kept {ids} ids; {left.went}", tokenizer)


@cache
def searched(subject: Subject, method: str, kind: str, most: int) -> Any:
    """A greedy search for the largest number of layers; smaller numbers are the first of it."""
    return choose_layers(subject.analysis, Depth(most, method, kind), subject.short, seed=subject.seed)


def layers(method: str, kind: str, most: int) -> Series:
    """Layers go until few enough parameters are left."""

    def carry_out(subject: Subject, share: float) -> Left:
        found = searched(subject, method, kind, most)
        limit, count, left = share * subject.parameters, 0, float(subject.parameters)
        size = {c: sum(s.parameters for s in found.layers if c in (s.name, f"block {s.block}")) for c in found.order}
        while left > limit and count < len(found.order):
            left -= size[found.order[count]]
            count += 1
        if left > limit:
            raise spa.SpaError(f"{most} layers are too few for {share:.0%} of the parameters.")
        if method == "replaceme":  # its maps belong to the number that goes
            small, _, dropped = without_layers(subject.analysis, Depth(count, method, kind), subject.evidence, seed=subject.seed)
        else:
            chosen = found.order[:count]
            names = [s.branch for s in found.layers if s.name in chosen or f"block {s.block}" in chosen]
            small, _, dropped = without_layers(subject.analysis, Depth(names, method, kind), None)
        whole = spa.count(small.groups)
        return Left(small.normal.model, whole.parameters, whole.macs, shown(dropped))

    return carry_out


def shown(dropped: Dropped) -> str:
    """a: attention, m: MLP, with the number of the block."""
    return "dropped " + " ".join(f"{s.kind[0]}{s.block}" for s in dropped.layers)


SERIES: dict[str, Series] = {
    "neurons": channels("neuron", "obspa-greedy"),
    "neurons by l2": channels("neuron", "l2"),
    "ids": fewer_ids,
    "heads": channels("key-value", "obspa-greedy", "global", 1),  # of three a block
    "rotated width": narrow,
    "layers by FinerCut": layers("finercut", "any", 22),
    "layers by LLM-Drop": layers("llm-drop", "any", 30),
    "layers by ReplaceMe": layers("replaceme", "block", 13),
    "ids and neurons": joint,
}

# ---------------------------------------------------------------------- measuring


def measured(subject: Subject, left: Left, series: str, share: float, dense: float, seconds: float) -> Row:
    """The row of what a series left."""
    model, whole = subject.analysis.normal.model, spa.count(subject.analysis.groups)
    rng = np.random.default_rng(subject.seed)
    vocabulary = read_vocabulary(left.tokenizer or smollm2_tokenizer())
    ids = rng.integers(0, 4096, (1, PREFILL))  # that all have
    both = (feeds_of(model, ids), feeds_of(model, ids[:, :1], PAST))
    prefill, decode = (now / was for was, now in (paired_seconds(find("cpu"), model, left.model, fed, threads=1) for fed in both))
    opened = session(left.model, threads=1)
    prompt = np.array(vocabulary.encode(PROMPT).ids, np.int64)
    found = generate(opened, prompt, 24)
    same = found == generate(opened, prompt, 24, cache=False)
    return Row(
        series, share, round(left.parameters / whole.parameters, 4), round(left.macs / whole.macs, 4),
        round(perplexity(left.model, subject.limit, left.tokenizer), 3), round(dense, 3), round(prefill, 4), round(decode, 4),
        "same" if same else "differs", round(seconds, 1), left.went, vocabulary.decode(found),
    )  # fmt: skip


# ---------------------------------------------------------------------- pages


def read(path: Path) -> list[Row]:
    """Rows of an earlier run, which stay."""
    if not path.is_file():
        return []
    kinds = {f.name: {"str": str, "float": float}[str(f.type)] for f in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{k: kinds[k](v) for k, v in row.items()}) for row in csv.DictReader(file)]


def write(path: Path, rows: Sequence[Row], given: argparse.Namespace) -> None:
    """The rows as CSV, as a page and as a plot beside it."""
    order = {s: i for i, s in enumerate(SERIES)}
    rows = sorted(rows, key=lambda r: (-r.share, order.get(r.series, 99)))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [
        f"# SmolLM2-135M, smaller\n\n`python -m tools.bench_llm --windows {given.windows} --limit {given.limit}`, spa {spa.__version__}, "
        f"onnxruntime {onnxruntime.__version__}, CPU provider, {platform.machine()}, one thread, seed {given.seed}. The {given.exporter} "
        f"export with its cache; no weight was trained. Perplexity on {given.limit} tokens that decided nothing; chosen and repaired on "
        f"{given.windows} other stretches of {language.CONTEXT} tokens (searches for layers look at 256, ids are counted in 2 million). "
        "Where ids go, the loss of the text is spread over the dense model's tokens. Shares are of the dense "
        f"model: MACs of a prefill, time of a prefill of {PREFILL} tokens and of one token after {PAST}, by turns with the dense model.\n",
        f"![Perplexity against parameters and time]({path.stem}.png)\n",
        "| what goes | parameters | MACs | perplexity | of dense | prefill | time saved / MACs saved | a token | with cache | made in |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    lines += [
        f"| {r.series} | {r.parameters:.1%} | {r.macs:.1%} | {r.perplexity:.2f} | {r.perplexity / r.dense:.2f}× | {r.prefill:.3f} | "
        f"{(1 - r.prefill) / (1 - r.macs):.2f} | {r.decode:.3f} | {r.cached} | {r.seconds:.0f} s |"
        for r in rows
    ]
    lines += ["\n## What went, and what is said after it\n", f"Greedy, 24 tokens after *{PROMPT}*:\n"]
    lines += [f"* {r.series}, {r.parameters:.0%}: {r.went}. “{' '.join(r.text.split())}”" for r in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(path.with_suffix(".png"), rows)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Perplexity over the dense model's against parameters, prefill and decoding, a line a series."""
    figure = need("matplotlib.figure", extra="plot").Figure(figsize=(13, 4.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    costs = {"parameters": "parameters", "prefill": "time of a prefill", "decode": "time of a token"}
    for ax, (name, title) in zip(axes, costs.items(), strict=True):
        for series in dict.fromkeys(r.series for r in rows):
            points = sorted((getattr(r, name), r.perplexity / r.dense) for r in rows if r.series == series)
            ax.plot(*zip(*points, strict=True), marker="o", markersize=4, label=series)
        ax.set_xlabel(f"{title}, of dense")
        ax.set_yscale("log")
        ax.set_yticks(ticks := [1, 1.35, 2, 3, 5, 10, 20, 50], map(str, ticks))
        ax.minorticks_off()
        ax.axhline(1.35, color="grey", linewidth=0.8, linestyle=":")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity, of dense")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
