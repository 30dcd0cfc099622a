"""OpenVINO's IR (NAME.xml with NAME.bin), by openvino2onnx."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

DTYPES = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32", "i16": "int16",
          "i8": "int8", "u8": "uint8", "boolean": "bool"}  # fmt: skip


def inputs(source: str, wish: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, dtype and shape of each input."""
    return [{"name": port.any_name, "dtype": DTYPES.get(port.element_type.to_string(), "float32"),
             "shape": [None if n.is_dynamic else n.get_length() for n in port.partial_shape]} for port in _read(source).inputs]  # fmt: skip


def convert(source: str, target: str, wish: Mapping[str, Any]) -> None:
    """Writes the ONNX file."""
    import onnx
    from openvino2onnx import convert_graph

    _read(source)
    opset = wish.get("opset") or None
    proto = convert_graph(source, print_passes=False, target_opset=opset).model
    onnx.save(proto, target, save_as_external_data=proto.ByteSize() > 1 << 30)


def outputs(source: str, feeds: Mapping[str, Any], wish: Mapping[str, Any]) -> list[Any]:
    """All outputs in order."""
    found = _compiled(source)(dict(feeds))
    return [found[port] for port in _compiled(source).outputs]


@functools.lru_cache(maxsize=1)
def _read(source: str) -> Any:
    import openvino

    try:
        return openvino.Core().read_model(source)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise OSError(f"OpenVINO can't load it ({lines[-1] if lines else 'it says no reason'})") from error


@functools.lru_cache(maxsize=1)
def _compiled(source: str) -> Any:
    import openvino

    return openvino.Core().compile_model(_read(source), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
