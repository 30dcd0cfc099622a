"""Write ``models/zoo``: one small network per family, as PyTorch's two exporters see it, without its weights.

    python -m models.export_zoo [NAME ...] [--out models/zoo] [--exporter script|dynamo]

For every network:  build (seeded)  ->  randomise  ->  export  ->  compare with PyTorch  ->  strip, pack, load, check.

``script`` is the TorchScript exporter at opset 17, ``dynamo`` the torch.export one at opset 20. Randomising gives
BatchNorm non-trivial statistics and makes all one-dimensional parameters differ, since exporters merge equal tensors;
``resnet18_shared`` alone is given equal ones on purpose.
"""

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto

from models import weightless
from models.extras import MissingExtra, need
from models.inputs import example_inputs
from models.networks import DYNAMO, NETWORKS, SCRIPT, TOKENS, VOCABULARY, Network

ZOO = Path(__file__).parent / "zoo"
OPSETS: Mapping[str, int] = {SCRIPT: 17, DYNAMO: 20}

_SEED = 7
_PARITY = 1e-4  # of the largest absolute output
_OTHER_SIZES: Mapping[str, int] = {"batch": 3, "height": 96, "width": 80, "sequence": 9}


class ExportFailed(RuntimeError):
    """An exported graph does not compute what PyTorch computes."""


def randomise(module: Any, *, shared: bool = False) -> None:
    """Give a freshly built module weights that hide nothing, in place.

    One-dimensional and constant parameters get noise of standard deviation 0.1 (so LayerNorm and BatchNorm scales
    stay near one), running means are drawn from N(0, 0.2²), running variances from U(0.5, 1.5).

    Parameters
    ----------
    module
        A ``torch.nn.Module``.
    shared
        Draw the same numbers for tensors of one role (scale, bias, mean, variance) and size, so that exporters merge
        them.
    """
    torch = need("torch")
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if shared:
                generator.manual_seed(zlib.crc32(name.rsplit(".", 1)[-1].encode()))
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            elif isinstance(tensor, torch.nn.Parameter) and (tensor.ndim <= 1 or not tensor.std() > 0):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


def export(name: str, exporter: str) -> ModelProto:
    """Build a network and export it, with its weights.

    Parameters
    ----------
    name
        A key of :data:`models.networks.NETWORKS`.
    exporter
        ``"script"`` or ``"dynamo"``.

    Raises
    ------
    ExportFailed
        ONNX Runtime and PyTorch disagree by more than 1e-4 of the output's scale, at the sizes of the export or,
        where dims are dynamic, at others.
    models.extras.MissingExtra
        A package that builds the network is not installed.
    """
    network = NETWORKS[name]
    torch = need("torch")
    torch.manual_seed(_SEED)
    module = network.build().eval()
    randomise(module, shared=network.shared)
    with torch.no_grad(), _quiet():
        model = (_export_script if exporter == SCRIPT else _export_dynamo)(network, module, _arguments(network, {}))
        for sizes in ({}, _OTHER_SIZES) if network.dynamic else ({},):
            arguments = _arguments(network, sizes)
            expected = module(*arguments).numpy()
            got = run(model, {key: value.numpy() for key, value in zip(network.inputs, arguments, strict=True)})[0]
            error = float(np.abs(got - expected).max() / np.abs(expected).max()) if got.shape == expected.shape else 1.0
            if not error <= _PARITY:
                raise ExportFailed(f"{name}.{exporter} differs from PyTorch by {error:.1e} of the output's scale")
    return model


def run(model: ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    """Outputs of a model in ONNX Runtime on the CPU."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def _arguments(network: Network, sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """Inputs of a network, the dynamic dims of the given sizes where there are any."""
    torch = need("torch")
    generator = torch.Generator().manual_seed(_SEED)
    shape = [sizes.get(network.dynamic.get(axis, ""), size) for axis, size in enumerate(network.shape)]
    if network.inputs == TOKENS:
        return torch.randint(0, VOCABULARY, shape, generator=generator), torch.ones(shape, dtype=torch.int64)
    return (torch.randn(shape, generator=generator),)


def _export_script(network: Network, module: Any, arguments: tuple[Any, ...]) -> ModelProto:
    torch = need("torch")
    modes = torch.onnx.TrainingMode
    buffer = io.BytesIO()
    axes = dict.fromkeys(network.inputs, network.dynamic) | {"output": network.output} if network.dynamic else {}
    torch.onnx.export(
        module, arguments, buffer, dynamo=False, opset_version=OPSETS[SCRIPT], input_names=list(network.inputs),
        output_names=["output"], dynamic_axes=axes, training=modes.PRESERVE if network.unfused else modes.EVAL,
    )  # fmt: skip
    return onnx.load_model_from_string(buffer.getvalue())


def _export_dynamo(network: Network, module: Any, arguments: tuple[Any, ...]) -> ModelProto:
    torch = need("torch")
    dims = dict(network.dynamic)
    program = torch.onnx.export(
        module, arguments, dynamo=True, opset_version=OPSETS[DYNAMO], input_names=list(network.inputs),
        output_names=["output"], dynamic_shapes=tuple(dims for _ in network.inputs) if dims else None,
        external_data=False, verbose=False,
    )  # fmt: skip
    model: ModelProto = program.model_proto
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks off the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def write(name: str, exporter: str, folder: Path) -> Path:
    """Export one network, pack it, and prove that the packed file loads, checks and runs.

    Raises
    ------
    ExportFailed
        The export is wrong, or with drawn weights an output is not finite.
    """
    target = folder / f"{name}.{exporter}.onnx.xz"
    model = export(name, exporter)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
        packed = Path(scratch) / target.name
        weightless.save(model, packed)
        loaded = weightless.load(packed)
        onnx.checker.check_model(loaded, full_check=True)
        if not all(np.isfinite(output).all() for output in run(loaded, example_inputs(loaded))):
            raise ExportFailed(f"{target.name} gives outputs that are not finite")
        packed.replace(target)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models.export_zoo", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"networks (default: all): {', '.join(NETWORKS)}")
    parser.add_argument("--out", type=Path, default=ZOO, metavar="FOLDER", help="where to write (default: models/zoo)")
    parser.add_argument("--exporter", choices=sorted(OPSETS), help="this one only (default: the ones kept in git)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(NETWORKS))
    if unknown:
        parser.error(f"no such network: {', '.join(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for name in options.names or NETWORKS:
        for exporter in (options.exporter,) if options.exporter else NETWORKS[name].exporters:
            try:
                path = write(name, exporter, options.out)
            except MissingExtra as error:
                print(f"export_zoo: {error}", file=sys.stderr)
                return 1
            except Exception as error:  # exporters raise anything; the other networks are still worth having
                failures += 1
                print(f"{name}.{exporter}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            print(f"{path.name}: {path.stat().st_size} bytes", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
