"""Prunes models and proves each on engines, as a Markdown table: `python -m tools.provider_report MODEL... --engine NAME...`.

Each model is pruned at one ratio without rounding, so that widths are irregular; its result on an engine, in its own element type, is
compared with the masked original on the CPU provider in float32. An engine may be followed by options: `openvino:precision=bf16`.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import numpy as np

import spa
from models import weightless
from spa.engines import Settings, find
from spa.errors import BadOption, SpaError
from spa.plans.plan import mask_of
from spa.proof.feeds import Feeds, one_sample
from spa.proof.prove import reference_of
from spa.timing.trial import expected, try_on


def processor() -> str:
    """The processor's name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def drawn(analysis: spa.api.Analysis, seed: int, whole: bool) -> Feeds:
    """Inputs; one sample where the batch is free, unless `whole`."""
    traced = analysis.groups.traced
    feeds = spa.api.runnable(analysis.normal.model, traced, seed=seed)
    return feeds if whole else one_sample(traced, feeds)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--engine", nargs="+", default=["cpu"], metavar="NAME[:OPTION=VALUE]")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--as-is", action="store_true", help="do not prune: they are already")
    parser.add_argument("--batch", action="store_true", help="two samples, where the batch is free")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{processor()}, Python {platform.python_version()}, spa {spa.__version__}, ratio {options.ratio}, seed {options.seed}\n")
    print("| engine | version | model | placement | difference | allowed | |\n|---|---|---|---|---|---|---|")
    for path in options.models:
        source = weightless.load(path) if path.suffix == ".xz" else spa.load(path)
        analysis = spa.analyze(source)
        gone = np.zeros(analysis.groups.total, bool)
        model = source
        if not options.as_is:
            result = spa.prune(source, options.ratio, multiple_of=1, check=False, seed=options.seed)
            analysis, model = result.analysis, result.model
            gone = mask_of(result.plan, analysis.groups)
        feeds = drawn(analysis, options.seed, options.batch)
        reference = reference_of(analysis.normal.model, analysis.groups, gone, feeds=feeds)
        gives = expected(reference.model, reference.feeds)
        for text in options.engine:
            name, _, listed = text.partition(":")
            settings = Settings(1, dict(pair.split("=", 1) for pair in listed.split(",") if pair))
            try:
                engine = find(name)
                trial = try_on(engine, model, feeds, gives, settings=settings, kept=reference.kept)
            except BadOption as error:
                print(f"| {text} | | {path.name} | not here: {error} | | | |")
                continue
            except SpaError as error:
                print(f"| {text} | {engine.version()} | {path.name} | {error} | | | |", flush=True)
                continue
            placed = ", ".join(f"{n} {p.removesuffix('ExecutionProvider')}" for p, n in trial.placement.nodes.items())
            fell = "; ".join(f"{node}: {why}" for node, why in list(trial.placement.fell_back.items())[:4])
            figures = ", ".join(f"{k} {v}" for k, v in trial.figures.items())
            worst = trial.check.worst if np.isfinite(trial.check.worst) else "inf"
            print(f"| {text} | {trial.version} | {path.name} | {placed} | {worst:.1e} | {trial.check.tolerance:.0e} | "
                  f"{'' if trial.check.passed else '**DIFFERS** '}{figures} {fell} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
