"""`python -m models.cifar.pack FOLDER/NAME.onnx`: a trained network as it is kept in git, models/cifar/NAME.onnx.xz and its log.

Matrices are rounded to 11 bits of fraction (float16) and stay float32: half of the bytes of the compressed file, and no accuracy.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

HERE = Path(__file__).parent


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every matrix at float16's precision, in float32."""
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16).astype(np.float32), tensor.name))
    return model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.cifar.pack", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", type=Path, metavar="NAME.onnx")
    path = parser.parse_args().network
    packed = lzma.compress(rounded(onnx.load(path)).SerializeToString(), preset=9 | lzma.PRESET_EXTREME)
    (HERE / f"{path.name}.xz").write_bytes(packed)
    shutil.copyfile(path.with_suffix(".csv"), HERE / f"{path.stem}.csv")
    print(f"{path.name}.xz: {len(packed)} bytes")


if __name__ == "__main__":
    main()
