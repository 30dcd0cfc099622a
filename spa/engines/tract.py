"""tract: inference in Rust, for small machines."""

from __future__ import annotations

from spa.engines.pinned import converted
from spa.engines.table import Engine, engine
from spa.engines.worker import python_child, version_of, why_not

_COMMAND = python_child("tract_adapter.py", variable="SPA_TRACT_PYTHON")
_INSTALL = "tract is not here: pip install 'spa-prune[tract]', or name a Python that has it in SPA_TRACT_PYTHON"

TRACT = engine(Engine("tract", "runtime", converted(_COMMAND, label="tract"), lambda: why_not(_COMMAND(), _INSTALL),
                      lambda: version_of(_COMMAND())))  # fmt: skip
