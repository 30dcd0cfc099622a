"""NVIDIA's GPUs: ONNX Runtime's CUDA and TensorRT providers, of onnxruntime-gpu. Inputs and outputs lie on the GPU while it is timed."""

from __future__ import annotations

from functools import partial

from spa.engines.children.ort import devices, version_of
from spa.engines.providers import here
from spa.engines.table import Engine, engine
from spa.plans.align import block_of

_INSTALL = ("ONNX Runtime's {} provider is not here: in an environment of its own, pip uninstall onnxruntime and "
            "pip install 'onnxruntime-gpu[cuda,cudnn]'{}, on a machine with an NVIDIA GPU ({}).")  # fmt: skip


def missing(label: str, provider: str, more: str = "") -> str:
    """"" if onnxruntime was built with the provider. Whether it starts is seen only when a model is loaded, and then said."""
    try:
        devices(provider)
    except ImportError as error:
        return _INSTALL.format(label, more, error)
    return ""


# TensorFloat-32 keeps ten bits of a float32, and the fastest algorithm of a convolution is only found by trying all of them
EXACT = {"use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"}
CUDA = engine(Engine("cuda", "provider",
                     here("CUDAExecutionProvider", "CUDA", device="cuda", defaults=EXACT),
                     partial(missing, "CUDA", "CUDAExecutionProvider"), partial(version_of, "CUDAExecutionProvider"),
                     block=lambda: block_of("cuda")))  # fmt: skip
TENSORRT = engine(Engine("tensorrt", "provider",
                         here("TensorrtExecutionProvider", "TensorRT", device="cuda", defaults={"trt_fp16_enable": "0"}),
                         partial(missing, "TensorRT", "TensorrtExecutionProvider", " tensorrt"),
                         partial(version_of, "TensorrtExecutionProvider"), block=lambda: block_of("tensorrt")))  # fmt: skip
