"""Models of every framework, in: what is not ONNX becomes ONNX, proven against the framework's own outputs.

    converted = spa.convert("net.pt2")             # or a live torch module, with inputs={"x": (1, 3, 224, 224)}
    converted.save("net.onnx")

`frameworks` is the table of what is read and by whom, `workers/` reads it in a process of its own, `parity` compares, `bisect` finds where
results part.
"""

from spa.intake.converting import Converted, convert
from spa.intake.parity import Parity

__all__ = ["Converted", "Parity", "convert"]
