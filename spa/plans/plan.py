"""Plans: the portable result. JSON that says what goes, under the names of the model as given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa.errors import BadPlan
from spa.graph.demands import check_demands
from spa.graph.groups import Groups
from spa.graph.trace import constant_values
from spa.plans.edits import read_edits
from spa.plans.rewrite import removed_positions
from spa.storage.files import write_files
from spa.storage.store import Model

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What is removed from one model.

    model_sha256, graph_sha256: of the file's bytes, and of its graph without the weights' values.
    groups: name -> {"size": n, "kept": [coordinates]} for every group that shrinks.
    removed: value -> axis -> [positions], for every value of the model that loses any.
    copies: constant that several nodes share -> the copies that it is split into, as {copy: original}.
    shapes: of the stored tensors that lose any, as they were.
    options: how it was made; `trace` holds what is needed to find the same groups again, the edits (`spa.plans.edits`) among it.
    """

    model_sha256: str
    graph_sha256: str
    groups: Mapping[str, Mapping[str, Any]]
    removed: Mapping[str, Mapping[str, list[int]]]
    trace: Mapping[str, Any]
    copies: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, list[int]] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        """The plan as text; the same plan gives the same text."""
        fields = {
            "format": "spa-plan",
            "version": self.version,
            "model_sha256": self.model_sha256,
            "graph_sha256": self.graph_sha256,
            "options": dict(self.options),
            "trace": dict(self.trace),
            "groups": {k: dict(v) for k, v in self.groups.items()},
            "notes": dict(self.notes),
            "copies": dict(self.copies),
            "shapes": dict(self.shapes),
            "removed": {k: dict(v) for k, v in self.removed.items()},
        }
        return (
            json.dumps(fields, indent=None, separators=(",", ":")).replace('"groups":', '\n"groups":').replace('"removed":', '\n"removed":')
            + "\n"
        )

    def save(self, path: str | Path) -> None:
        """Writes the plan, whole or not at all. Raises BadFile."""
        write_files([(Path(path), [self.to_json().encode()])])


def make_plan(
    model: Model,
    groups: Groups,
    gone: NDArray[np.bool_],
    *,
    copies: Mapping[str, str],
    options: Mapping[str, Any],
    trace: Mapping[str, Any],
    notes: Mapping[str, str],
) -> Plan:
    """A plan from a mask over all coordinates. `model` is the model as given, before normalising."""
    chosen = {}
    for group in groups.groups:
        here = gone[group.coordinates]
        if here.any():
            chosen[group.name] = {"size": group.size, "kept": np.flatnonzero(~here).tolist()}
    removed = {
        value: {str(axis): positions.tolist() for axis, positions in sorted(axes.items())}
        for value, axes in removed_positions(groups, gone).items()
    }
    used = {c: o for c, o in copies.items() if removed.get(c) != removed.get(o)}
    removed = {v: axes for v, axes in removed.items() if v not in copies or v in used}
    known = groups.traced.facts.shapes
    shapes = {v: [int(n) for n in known.get(v) or ()] for v in removed if v in groups.traced.constants and v not in used}
    return Plan(model.sha256, graph_sha256(model.graph), chosen, removed, trace, used, options, notes, shapes)


def load_plan(path: str | Path | Plan | Mapping[str, Any]) -> Plan:
    """Reads a plan. Raises BadPlan with a sentence for whatever is wrong with it."""
    if isinstance(path, Plan):
        return path
    if isinstance(path, Mapping):
        return _from_fields(path, "the plan")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadPlan(f"There is no plan file {path}; `spa plan MODEL -o {path}` makes one.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadPlan(f"The plan file {path} can't be read: {error}.") from error
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadPlan(f"{path} is not a plan: it is no JSON ({error}).") from error
    return _from_fields(fields, str(path))


def _from_fields(fields: Any, label: str) -> Plan:
    if not isinstance(fields, Mapping) or fields.get("format") != "spa-plan":
        raise BadPlan(f'{label} is not a plan of spa: it lacks "format": "spa-plan".')
    if fields.get("version") != VERSION:
        raise BadPlan(f"{label} is a plan of version {fields.get('version')}, this spa reads version {VERSION}: make it again.")
    try:
        groups = {str(k): {"size": int(v["size"]), "kept": [int(i) for i in v["kept"]]} for k, v in fields["groups"].items()}
        removed = {str(v): {str(int(a)): [int(i) for i in p] for a, p in axes.items()} for v, axes in fields["removed"].items()}
        inputs = {str(n): [int(k) for k in s] for n, s in (fields["trace"].get("inputs") or {}).items()}
        fields = {**fields, "trace": {**fields["trace"], "inputs": inputs}}
        read_edits(fields["trace"].get("edits", ()), label)
        return Plan(
            str(fields["model_sha256"]),
            str(fields["graph_sha256"]),
            groups,
            removed,
            dict(fields["trace"]),
            dict(fields.get("copies", {})),
            dict(fields.get("options", {})),
            dict(fields.get("notes", {})),
            {str(v): [int(n) for n in shape] for v, shape in fields.get("shapes", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadPlan(f"{label} is damaged: {type(error).__name__} {error}.") from error


def mask_of(plan: Plan, groups: Groups) -> NDArray[np.bool_]:
    """The plan as a mask over all coordinates. Raises BadPlan where it does not fit the groups, or a kernel would refuse."""
    gone = np.zeros(groups.total, bool)
    for name, entry in plan.groups.items():
        group = groups.by_name.get(name)
        if group is None or group.size != entry["size"]:
            raise BadPlan(f"The plan's group {name!r} of {entry['size']} channels is not in this model.")
        if group.frozen is not None:
            raise BadPlan(f"The plan shrinks group {name!r}, which must stay: {group.frozen}.")
        kept = np.asarray(entry["kept"], np.int64)
        if not len(kept) or kept.min() < 0 or kept.max() >= group.size or len(np.unique(kept)) != len(kept):
            raise BadPlan(f"The plan's channels of group {name!r} are not a part of 0 … {group.size - 1}.")
        here = np.ones(group.size, bool)
        here[kept] = False
        gone[group.coordinates] = here
    check_demands(groups, gone)
    return gone


def check_belongs(plan: Plan, model: Model, *, other_weights: bool = False) -> None:
    """Raises BadPlan unless the plan was made for this model, or for one of the same graph and `other_weights` is set."""
    if plan.model_sha256 == model.sha256:
        return
    if plan.graph_sha256 != graph_sha256(model.graph):
        raise BadPlan(f"The plan was made for another model: {_difference(plan, model)}. Make a plan of this one with `spa plan`.")
    if not other_weights:
        raise BadPlan("The plan was made for a model of the same graph with other weights: --other-weights applies it all the same.")


def _difference(plan: Plan, model: Model) -> str:
    """What differs between a plan's model and another one, as far as the plan knows it."""
    stored = constant_values(model.graph)
    for name, shape in plan.shapes.items():
        if name not in stored:
            return f"there is no tensor {name!r} in this one"
        if tuple(stored[name].shape) != tuple(shape):
            return f"its tensor {name!r} has the shape {tuple(shape)}, that of this model is {tuple(stored[name].shape)}"
    return "the graphs differ"


def graph_sha256(graph: gs.Graph) -> str:
    """Hash of a graph without its weights' values: nodes, names, attributes, shapes, types, and small whole numbers."""
    digest = hashlib.sha256()

    def add(*items: object) -> None:
        digest.update(repr(items).encode())

    def tensor(constant: gs.Constant) -> None:
        add(constant.name, tuple(constant.shape), str(constant.dtype))
        if np.dtype(constant.dtype).kind in "iub" and int(np.prod(constant.shape)) <= 64:
            values = constant._values if isinstance(constant._values, np.ndarray) else constant._values.load()
            add(np.asarray(values).tolist())

    add([(t.name, list(t.shape or ()), str(t.dtype)) for t in graph.inputs], [t.name for t in graph.outputs])
    for node in graph.nodes:
        add(node.domain or "", node.op, [t.name for t in node.inputs], [t.name for t in node.outputs])
        for key in sorted(node.attrs):
            value = node.attrs[key]
            if isinstance(value, gs.Constant):
                tensor(value)
            elif isinstance(value, gs.Graph):
                add(graph_sha256(value))
            else:
                add(key, value)
        for given in node.inputs:
            if isinstance(given, gs.Constant):
                tensor(given)
    return digest.hexdigest()
