"""OpenVINO itself, in float32 unless told otherwise (its CPU plugin would take bf16 where the machine has it)."""

from __future__ import annotations

from collections import Counter
from typing import Any


def version() -> str:
    """OpenVINO's."""
    import openvino

    return f"openvino {openvino.__version__.split('-')[0]}"


class Opened:
    """A compiled model; `meta` counts the operators of the graph that runs."""

    def __init__(self, path: str, threads: int, options: dict[str, str]) -> None:
        import openvino

        options.pop("interface", "")
        device = options.pop("device", "CPU")
        precision = options.pop("precision", "f32")
        settings = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"} | options
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(path), device, settings)
        devices = ", ".join(compiled.get_property("EXECUTION_DEVICES"))
        operators = [o for o in compiled.get_runtime_model().get_ops() if o.get_type_name() != "Const"]
        kinds = Counter(_noted(o, "layerType") for o in operators)
        inner = sum(n for kind, n in kinds.items() if kind not in ("Input", "Output", "Const"))
        precisions = Counter(_noted(o, "runtimePrecision") for o in operators)
        self.meta = {"nodes": {f"OpenVINO {devices}": inner}, "proven": True, "precisions": dict(precisions)}
        self.request = compiled.create_infer_request()
        self.tensor = openvino.Tensor
        self.names = [o.get_any_name() for o in compiled.outputs]

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name."""
        self.bind(feeds)()
        return {name: self.request.get_output_tensor(k).data for k, name in enumerate(self.names)}

    def bind(self, feeds: dict[str, Any]) -> Any:
        """A call that runs once."""
        for name, array in feeds.items():
            self.request.set_tensor(name, self.tensor(array))
        return self.request.infer


def _noted(operator: Any, key: str) -> str:
    notes = operator.get_rt_info()
    return str(notes[key].astype(str)) if key in notes else ""


def load(path: str, threads: int, options: dict[str, str]) -> Opened:
    """A model, compiled. Options: `device`, `precision` (f32, bf16, f16), and OpenVINO's own properties."""
    return Opened(path, threads, options)
