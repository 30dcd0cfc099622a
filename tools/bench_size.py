"""``python -m tools.bench_size -o docs/size.md``: time and memory of analysing, pruning and proving a model of 16 GB, against a copy.

Writes a float16 Llama of 8 G parameters with random weights (`models.llama`), and measures each command as a process of its own: seconds
of the clock and of the processor, and the largest resident set, which counts mapped pages of the model too. Before each, the model's
pages leave the page cache (``posix_fadvise``), so that every command reads from the disk; a copy ends when it is on the disk (``fsync``),
as pruning does. The commands take turns, so that what else the machine does meets them alike. Needs twice the model's size on the disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from models.llama import LlamaConfig, parameters, write_llama

EIGHT = LlamaConfig(32, 4096, 32, 8, 14336, 128256, cache=True, float16=True)
SMALL = LlamaConfig(8, 1024, 16, 4, 3584, 32000, cache=True, float16=True)
_COPY = "import os, shutil, sys; shutil.copyfile(*sys.argv[1:]); f = os.open(sys.argv[2], os.O_RDONLY); os.fsync(f)"


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds of the clock, seconds of the processor, bytes of the largest resident set."""

    seconds: float
    processor: float
    resident: int

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.processor:.1f} s of the processor, {self.resident / 1e6:.0f} MB"


def measured(command: Sequence[str], *, cold: Sequence[Path] = ()) -> Cost:
    """Runs a command to its end. Raises RuntimeError, with what it said, if it fails."""
    for path in cold:
        evict(path)
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {said.read().decode()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def evict(path: Path) -> None:
    """Takes a file's pages out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def commands(model: Path, target: Path, *, proof: bool) -> dict[str, list[str]]:
    """What is measured: name -> command."""
    spa = [sys.executable, "-m", "spa"]
    prune = [*spa, "prune", str(model), "-o", str(target / "small.onnx"), "--criterion", "l2", "--ratio", "0.25", "--no-bench"]
    data = model.with_name(f"{model.name}.data")
    found = {
        "copy the file": [sys.executable, "-c", _COPY, str(data), str(target / "copy.data")],
        "spa inspect": [*spa, "inspect", str(model)],
        "spa prune --no-check": [*prune, "--no-check"],
    }
    return {**found, "spa prune, with its proof": prune} if proof else found


def run(config: LlamaConfig, folder: Path, *, rounds: int, proof: bool, keep: bool = False) -> tuple[int, dict[str, list[Cost]]]:
    """Bytes of the model, and what each command cost in each round; the proof is run once."""
    model = folder / "model" / "model.onnx"
    if not model.exists():
        write_llama(config, model.parent)
    data = model.with_name(f"{model.name}.data")
    found: dict[str, list[Cost]] = {}
    try:
        for number in range(rounds):
            for name, command in commands(model, folder / "out", proof=proof and number == 0).items():
                (folder / "out").mkdir()
                found.setdefault(name, []).append(measured(command, cold=[data]))
                shutil.rmtree(folder / "out")
                print(f"{name}: {found[name][-1]}", file=sys.stderr)
        return data.stat().st_size + model.stat().st_size, found
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)
        if not keep:
            shutil.rmtree(model.parent, ignore_errors=True)


def page(config: LlamaConfig, size: int, found: dict[str, list[Cost]], *, load: float) -> str:
    """The measurements for people."""
    copy = statistics.median(c.seconds for c in found["copy the file"])
    rows = []
    for name, costs in found.items():
        seconds, processor = (statistics.median(getattr(c, key) for c in costs) for key in ("seconds", "processor"))
        resident = max(c.resident for c in costs)
        rows.append(f"| {name} | {seconds:.1f} | {seconds / copy:.2f} | {processor:.1f} | {resident / 1e6:.0f} MB | {len(costs)} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnx", "onnxruntime", "numpy"))
    return "\n".join([
        "# At its real size",
        "",
        f"A float16 Llama of {parameters(config) / 1e9:.2f} G parameters ({config.layers} layers, hidden {config.hidden}, "
        f"{config.heads} heads, {config.kv_heads} key-value heads, MLP {config.mlp}, vocabulary {config.vocab}, with cache; random "
        f"weights), {size / 1e9:.2f} GB as external data.",
        "",
        "| | seconds | of a copy | processor seconds | peak resident | runs |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "Medians of the times, the largest resident set. Each is a process of its own, with the model's pages out of the page cache; a "
        "copy ends when it is on the disk. Resident sets count the mapped pages of the model. Pruning is `--criterion l2 --ratio 0.25`.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} of other work when it began; Python {platform.python_version()}, "
        f"{versions}. To run it: `python -m tools.bench_size -o docs/size.md` (needs {2 * size / 1e9:.0f} GB of disk).",
        "",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_size", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "spa-size", help="where the models lie meanwhile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a network of 0.4 GB, to try this out")
    parser.add_argument("--no-proof", action="store_true", help="leave out the run with the proof, which takes minutes")
    parser.add_argument("--keep", action="store_true", help="keep the model for the next time")
    options = parser.parse_args(arguments)
    config = SMALL if options.small else EIGHT
    load = os.getloadavg()[0]
    size, found = run(config, options.folder, rounds=options.rounds, proof=not options.no_proof, keep=options.keep)
    options.output.write_text(page(config, size, found, load=load))
    return 0


if __name__ == "__main__":
    sys.exit(main())
