"""tract, which reads ONNX by itself."""

from __future__ import annotations

import json
from typing import Any

KINDS = {"bool": "bool"}


def version() -> str:
    """That of tract."""
    import tract

    return f"tract {tract.version()}"


class Opened:
    """A model that is ready. tract does not say how many nodes it made of it."""

    def __init__(self, path: str, options: dict[str, str]) -> None:
        import tract

        interface = json.loads(options["interface"])
        model = tract.onnx().load(path)
        inputs = {name: (kind, shape) for name, kind, shape in interface["inputs"]}
        self.order = [model.input_name(k) for k in range(model.input_count())]
        for k, name in enumerate(self.order):
            kind, shape = inputs[name]
            model.set_input_fact(k, ",".join([*map(str, shape), KINDS.get(kind, _short(kind))]))
        for k in range(model.output_count()):
            model.set_output_fact(k, None)  # what the file says of them may be less than what follows from the inputs
        self.names = [name for name, _, _ in interface["outputs"]]
        self.tensor = tract.Tensor
        try:
            self.model = model.into_model().into_runnable()
        except tract.TractError as error:
            raise RuntimeError(_causes(str(error))) from error
        self.meta = {"proven": False}

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name."""
        found = self.model.run([self.tensor.from_numpy(feeds[n]) for n in self.order])
        return {name: value.to_numpy() for name, value in zip(self.names, found, strict=True)}

    def bind(self, feeds: dict[str, Any]) -> Any:
        """A call that runs once."""
        given = [self.tensor.from_numpy(feeds[n]) for n in self.order]
        return lambda: self.model.run(given)


def _short(kind: str) -> str:
    """float32 -> f32, int64 -> i64, uint8 -> u8."""
    name = kind.rstrip("0123456789")
    return f"{name[0]}{kind[len(name):]}"


def _causes(text: str) -> str:
    """Cause after cause, without the trace of the stack."""
    return " ".join(line.strip() for line in text.split("Stack backtrace")[0].splitlines() if line.strip() not in ("", "Caused by:"))


def load(path: str, threads: int, options: dict[str, str]) -> Opened:
    """A model, ready. It runs on one thread."""
    return Opened(path, options)
