"""Where models run: ONNX Runtime's execution providers and other runtimes, each one entry of a table."""

from spa.engines.table import ENGINES, Engine, Opened, Placement, Settings, engine, find

__all__ = ["ENGINES", "Engine", "Opened", "Placement", "Settings", "engine", "find"]
