"""How long calibration and repair take: `python -m tools.bench_repair MODEL.onnx --samples 256`.

Beside it what they cannot do without, measured in the same process: ONNX Runtime on the calibration batches (dense), and LAPACK's
factorisations of matrices of the layers' sizes.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from pathlib import Path

import numpy as np
import onnxruntime

import spa
from spa import api
from spa.data.evidence import Evidence
from spa.graph.linear import find_layers
from spa.proof.check import session
from spa.proof.feeds import draw
from spa.repairs.repair import RepairOptions


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_repair", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--inputs", default="pruned", help="pruned or dense, as --repair-inputs")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    analysis = api.analyze(given.model)
    traced = analysis.groups.traced
    shapes = {t.name: (given.batch, *(traced.facts.shapes[t.name] or ())[1:]) for t in traced.graph.inputs}
    batches = [draw(traced, seed=given.seed + i, shapes=shapes) for i in range(given.samples // given.batch)]
    opened = session(analysis.normal.model)
    began = time.perf_counter()
    for batch in batches:
        opened.run(None, dict(batch))
    running = time.perf_counter() - began
    began = time.perf_counter()
    for layer in find_layers(analysis.groups):
        size = round(layer.columns * (1 - given.ratio))
        for _ in range(layer.parts):
            np.linalg.cholesky(np.eye(size) + 0.5)
    factoring = time.perf_counter() - began
    evidence = Evidence("noise", batches, analysis.normal.model, False)
    plan = api.plan(analysis, given.ratio)
    began = time.perf_counter()
    api.apply(analysis, plan, check=False, repair=RepairOptions("obspa", inputs=given.inputs), calibration=evidence)
    repairing = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"spa {spa.__version__}, onnxruntime {onnxruntime.__version__}, numpy {np.__version__}, {platform.machine()}, default threads")
    print(f"{given.samples} samples: ONNX Runtime {running:.1f} s, LAPACK {factoring:.1f} s, calibration and repair {repairing:.1f} s, "
          f"{repairing / (running + factoring):.1f} times both; {peak:.1f} GiB resident at most")  # fmt: skip


if __name__ == "__main__":
    main()
