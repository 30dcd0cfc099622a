"""Races spa against Torch-Pruning on the same networks, in one process, turn by turn; and against a plain load and save.

    python -m tools.bench_prune [NETWORK ...] [--rounds 3] [-o bench.json]      needs the extras models and dev, and torch-pruning

For each network: seconds of spa's analysis, plan and rewrite (from the .onnx file, no proof) and of Torch-Pruning's graph
build and prune (from the torch module), medians over interleaved rounds and their ratio; MACs and parameters that each keeps
at 50 % of the channels, both counted by spa on ONNX exports; the ratio of spa's file-to-file time to onnx.load + onnx.save.
    --linear DEPTHS writes the time over depth of a chain of MatMuls as a plot.
    --memory GIGABYTES prunes a model of that size with external data in a child process and prints its peak resident memory.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

import spa
from models.extras import need

SIZE = {"swin_tiny_patch4_window7_224": 224}
TIMM = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
NETWORKS = ("resnet50", "densenet121", *TIMM)


def build(name: str) -> Any:
    """A network with random weights: torchvision's, or timm's where the name says so."""
    torch = need("torch")
    torch.manual_seed(0)
    made = (
        need("timm").create_model(name)
        if "_patch" in name or name.startswith("mixer")
        else getattr(need("torchvision.models"), name)(weights=None)
    )
    for module in made.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return made.eval()


def export(module: Any, path: Path) -> None:
    """ONNX of a torch module by the TorchScript exporter, opset 17."""
    torch = need("torch")
    torch.onnx.export(module, torch.randn(1, 3, 224, 224), str(path), dynamo=False, opset_version=17, input_names=["input"])


def ours(path: Path, out: Path) -> spa.Result:
    """File to file: analysis, plan, rewrite, save; no proof."""
    result = spa.prune(str(path), 0.5, multiple_of=1, check=False)
    result.save(out)
    return result


def theirs(module: Any) -> Any:
    """Torch-Pruning: graph build and prune at 50 % of the channels, classifier kept; heads' widths, as its examples do."""
    torch, tp = need("torch", extra="dev"), need("torch_pruning", extra="dev")
    last = [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1:]
    heads = {m.qkv: m.num_heads for m in module.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    pruner = tp.pruner.BasePruner(
        module,
        torch.randn(1, 3, 224, 224),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=last,
        num_heads=heads,
    )
    pruner.step()
    for m in module.modules():
        if hasattr(m, "qkv") and hasattr(m, "num_heads"):
            m.num_heads = pruner.num_heads[m.qkv]
            m.head_dim = m.qkv.out_features // (3 * m.num_heads)
            m.attn_dim = m.head_dim * m.num_heads
    return module


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def race(name: str, rounds: int, limit: float) -> dict[str, Any]:
    """One network, turn by turn. Torch-Pruning is left out of further rounds once it took longer than `limit`, and said so."""
    import copy

    row: dict[str, Any] = {"network": name}
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "model.onnx", Path(folder) / "small.onnx"
        module = build(name)
        export(module, path)
        spa_times, tp_times, io_times, error = [], [], [], ""
        ours(path, out)  # warm up: imports
        for _ in range(rounds):
            taken, result = seconds(lambda: ours(path, out))
            spa_times.append(taken)
            io_times.append(seconds(lambda: onnx.save(onnx.load(path), Path(folder) / "copy.onnx"))[0])
            if error or (tp_times and tp_times[-1] > limit):
                continue
            twin = copy.deepcopy(module)
            try:
                taken, pruned = seconds(lambda: theirs(twin))  # noqa: B023  called at once
                tp_times.append(taken)
            except Exception as problem:  # its failures are a result
                error = f"{type(problem).__name__}: {problem}"[:80]
        row |= {
            "spa_s": statistics.median(spa_times),
            "load_save_s": statistics.median(io_times),
            "spa_over_load_save": statistics.median(a / b for a, b in zip(spa_times, io_times, strict=True)),
            "spa_macs_kept": result.after.macs / result.before.macs,
            "spa_parameters_kept": result.after.parameters / result.before.parameters,
        }
        if tp_times:
            row |= {"tp_s": statistics.median(tp_times), "tp_over_spa": statistics.median(tp_times) / statistics.median(spa_times)}
        if tp_times and not error:
            try:
                export(pruned, Path(folder) / "theirs.onnx")
                counts = spa.count(spa.analyze(str(Path(folder) / "theirs.onnx")).groups)
                row |= {
                    "tp_macs_kept": counts.macs / result.before.macs,
                    "tp_parameters_kept": counts.parameters / result.before.parameters,
                }
            except Exception as problem:  # a pruned module that does not run is a result too
                error = f"{type(problem).__name__}: {problem}"[:80]
        row["tp_error"] = error
    return row


def chain(depth: int, width: int, path: Path) -> None:
    """A chain of `depth` MatMuls of width × width with external data, written piece by piece."""
    nodes, weights, offset = [], [], 0
    rng = np.random.default_rng(0)
    data = path.with_suffix(".data")
    with data.open("wb") as file:
        block = rng.standard_normal((width, width), dtype=np.float32)
        for i in range(depth):
            nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"h{i}"], name=f"matmul{i}"))
            nodes.append(helper.make_node("Relu", [f"h{i}"], [f"x{i + 1}"], name=f"relu{i}"))
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width], data_location=TensorProto.EXTERNAL)
            for key, value in (("location", data.name), ("offset", str(offset)), ("length", str(block.nbytes))):
                tensor.external_data.add(key=key, value=value)
            weights.append(tensor)
            file.write(np.roll(block, i, axis=0).tobytes())
            offset += block.nbytes
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", 1, ["batch", width])],
        [helper.make_tensor_value_info(f"x{depth}", 1, ["batch", width])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def linear(depths: list[int], output: Path) -> None:
    """Time of analysis, plan and rewrite over depth."""
    need("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = []
    with tempfile.TemporaryDirectory() as folder:
        for depth in depths:
            path = Path(folder) / f"{depth}.onnx"
            chain(depth, 64, path)
            taken = min(seconds(lambda: spa.prune(str(path), 0.5, multiple_of=1, check=False))[0] for _ in range(3))  # noqa: B023
            points.append((depth, taken))
            print(f"depth {depth:5}: {taken:.3f} s, {1000 * taken / depth:.2f} ms a layer")
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.loglog(*zip(*points, strict=True), marker="o", label="spa")
    axes.loglog([d for d, _ in points], [points[0][1] * d / points[0][0] for d, _ in points], "--", color="grey", label="linear")
    axes.set(xlabel="layers", ylabel="seconds", title="analysis, plan and rewrite")
    axes.set_xticks([d for d, _ in points], [str(d) for d, _ in points])
    axes.set_xticks([], minor=True)
    axes.legend()
    figure.savefig(output, dpi=120, bbox_inches="tight")


def memory(gigabytes: float) -> None:
    """Peak resident memory of pruning an external-data model, in a child process."""
    width = int((gigabytes * 2**30 / 4 / 100) ** 0.5) // 16 * 16
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        chain(100, width, path)
        code = (
            "import pathlib, re, sys, spa\n"
            "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
            "before = peak(); spa.prune(sys.argv[1], 0.5, check=False).save(sys.argv[2]); print(before, peak())"
        )
        command = [sys.executable, "-c", code, str(path), str(Path(folder) / "small.onnx")]
        taken, done = seconds(lambda: subprocess.run(command, check=True, capture_output=True, text=True))
        before, peak = map(int, done.stdout.split())
        size = path.with_suffix(".data").stat().st_size
        print(
            f"{size / 2**30:.2f} GiB of weights in 100 MatMuls of {width}: {taken:.1f} s, "
            f"peak resident {peak / 1024:.0f} MiB ({before / 1024:.0f} MiB after imports)"
        )


def main(
    networks: Annotated[list[str] | None, typer.Argument(help=f"default: {', '.join(NETWORKS)}")] = None,
    rounds: Annotated[int, typer.Option()] = 3,
    limit: Annotated[float, typer.Option(help="seconds after which Torch-Pruning gets no further round")] = 30.0,
    output: Annotated[Path | None, typer.Option("-o", help="JSON file")] = None,
    depths: Annotated[str, typer.Option("--linear", help="depths, such as 25,50,100,200,400,800")] = "",
    plot: Annotated[Path, typer.Option(help="where --linear draws")] = Path("linear.png"),
    size: Annotated[float, typer.Option("--memory", help="gigabytes of weights")] = 0.0,
) -> None:
    """Runs what is asked for and prints one table."""
    if depths:
        linear([int(d) for d in depths.split(",")], plot)
    if size:
        memory(size)
    if depths or size:
        return
    rows = []
    for name in networks or NETWORKS:
        rows.append(race(name, rounds, limit))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, file=sys.stderr, flush=True)
    versions = {
        "spa": spa.__version__,
        "torch_pruning": getattr(need("torch_pruning"), "__version__", "?"),
        "torch": need("torch").__version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "torch_threads": need("torch").get_num_threads(),
        "rounds": rounds,
        "seed": 0,
    }
    table = Table(
        "network",
        "spa s",
        "Torch-Pruning s",
        "ratio",
        "spa / load+save",
        "MACs kept",
        "theirs",
        "parameters kept",
        "theirs",
        "their error",
        title=str(versions),
    )
    for row in rows:
        cells = [
            row["network"],
            *(
                f"{row[k]:.3f}" if k in row else "-"
                for k in (
                    "spa_s",
                    "tp_s",
                    "tp_over_spa",
                    "spa_over_load_save",
                    "spa_macs_kept",
                    "tp_macs_kept",
                    "spa_parameters_kept",
                    "tp_parameters_kept",
                )
            ),
        ]
        table.add_row(*cells, row["tp_error"])
    Console(width=200).print(table)
    print(f"peak resident of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    if output is not None:
        output.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
