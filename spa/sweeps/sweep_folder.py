"""The folder of a sweep.

    settings.json         what all points have in common, and what the model as it is costs and is worth
    learned/NAME.npz      scores of a criterion, and losses
    plans/NAME.plan.json  the plan of a point
    points/NAME.json      the point: it is there once the point is finished

Every file is written whole or not at all, so whenever a sweep is killed, what is there is right.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from spa.criteria.score import Known, Scores
from spa.errors import BadFile, BadOption
from spa.graph.explain import printable
from spa.storage.files import Pieces, write_files
from spa.sweeps.points import Point, Setting, point_data, point_of
from spa.tables.report import plain

FORMAT, VERSION = "spa-sweep", 1
SETTINGS, POINTS, PLANS, LEARNED, LOCK = "settings.json", "points", "plans", "learned", ".lock"


class Folder:
    """A folder that a sweep keeps its results in; `open_folder` checks that it is the right one."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.dense: dict[str, Any] = {}
        self._lock = FileLock(path / LOCK)

    def open(self) -> None:
        """Looks at what is there, and keeps other sweeps out until `close`.

        Raises BadOption for a folder of something else or one in use, BadFile for one that can't be used.
        """
        if self.path.exists() and not self.path.is_dir():
            raise BadOption(f"--output {self.path} is a file; give the name of a folder.")
        try:
            there = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
        except OSError as error:
            raise BadFile(f"--output {self.path} can't be read: {error.strerror}.") from error
        if SETTINGS not in there:
            begun = {POINTS, PLANS, LEARNED, LOCK}  # by a sweep that was killed before it wrote its settings
            left = [n for n in there if not n.startswith(".spa-") and n not in begun]
            if left:
                raise BadOption(f"--output {self.path} holds no sweep but {printable(left[0])}: give a new or an empty folder.")
            return
        self._hold()
        found = self._json(self.path / SETTINGS)
        if found.get("format") != FORMAT or not isinstance(found.get("settings"), dict) or not isinstance(found.get("dense"), dict):
            raise BadOption(f"--output {self.path}: its {SETTINGS} is not that of a sweep; give another folder.")
        self._compare(found)
        self.dense = found["dense"]

    def _hold(self) -> None:
        """Takes the lock of the folder, which the system gives back if the process is killed."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BadOption(f"--output {self.path} is in use by another sweep: wait for it, or give another folder.") from error
        except OSError as error:
            raise BadFile(f"--output {self.path} can't be written: {error.strerror}; choose another place.") from error

    def close(self) -> None:
        """Lets other sweeps in."""
        self._lock.release()

    def _compare(self, found: Mapping[str, Any]) -> None:
        there, here = found["settings"], json.loads(json.dumps(plain(self.settings)))
        if found.get("version") != VERSION:
            raise BadOption(f"--output {self.path} holds a sweep of another version of spa: give another folder.")
        if there.get("model_sha256") != here["model_sha256"]:
            raise BadOption(f"--output {self.path} holds a sweep of another model: give another folder.")
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                what = _difference(name, there.get(name), here.get(name))
                raise BadOption(f"--output {self.path} holds a sweep with other settings ({what}): give another folder, or the same ones.")

    def begin(self, dense: Mapping[str, Any]) -> None:
        """Writes what all points have in common, and what is known of the model as it is. Raises BadFile."""
        if self.dense:
            return
        try:
            for name in ("", POINTS, PLANS, LEARNED):
                (self.path / name).mkdir(parents=not name, exist_ok=True)
        except OSError as error:
            raise BadFile(f"--output {self.path} can't be made: {error.strerror}; choose another place.") from error
        self._hold()
        self.dense = dict(dense)
        data = {"format": FORMAT, "version": VERSION, "settings": self.settings, "dense": self.dense}
        write_files([(self.path / SETTINGS, _text(data))])

    # ------------------------------------------------------------------ points

    def has(self, setting: Setting) -> bool:
        """Whether a point is finished, well or badly."""
        return self._place(setting).is_file()

    def read(self, setting: Setting) -> Point:
        """A finished point. Raises BadFile for one that is damaged."""
        return self._point(self._place(setting))

    def points(self) -> list[Point]:
        """All that are finished, by name."""
        return [self._point(p) for p in sorted((self.path / POINTS).glob("*.json"))]

    def write(self, point: Point, plan: str = "") -> None:
        """Writes a finished point, its plan first. Raises BadFile; nothing is left of it then."""
        writes: list[tuple[Path, Pieces]] = [(self._place(point.setting), _text(point_data(point)))]
        if plan:
            writes.insert(0, (self.path / PLANS / f"{point.name}.plan.json", [plan.encode()]))
        write_files(writes)

    def plan_name(self, setting: Setting) -> str:
        """Path of a point's plan, from where the folder is."""
        return (Path(PLANS) / f"{setting.name}.plan.json").as_posix()

    def _place(self, setting: Setting) -> Path:
        return self.path / POINTS / f"{setting.name}.json"

    def _point(self, path: Path) -> Point:
        try:
            return point_of(self._json(path))
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(f"{path} is damaged: delete it, and the point is made again.") from error

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BadFile(f"{path} can't be read ({' '.join(str(error).split())}): delete it, and what it held is made again.") from error
        if not isinstance(found, dict):
            raise BadFile(f"{path} is damaged: delete it, and what it held is made again.")
        return found

    # ------------------------------------------------------------------ scores and losses

    def known(self, name: str) -> Known | None:
        """Scores, and losses if they are there too; None if nothing is, or nothing that can be read."""
        try:
            with np.load(self.path / LEARNED / f"{name}.npz", allow_pickle=False) as data:
                stay = data["held"] if len(data["held"]) else None
                found = Scores(str(data["criterion"]), data["values"], tuple(str(x) for x in data["instead"]), stay,
                               dict(json.loads(str(data["notes"]))))  # fmt: skip
                count = int(data["rungs"])
                return Known(found, None if count < 0 else [data[f"losses{i}"] for i in range(count)], int(data["measured"]))
        except Exception:  # zipfile, zlib and numpy raise classes of their own; what can't be read is worked out again
            return None

    def keep(self, name: str, known: Known) -> None:
        """Writes scores and losses. Raises BadFile."""
        arrays: dict[str, Any] = {f"losses{i}": x for i, x in enumerate(known.losses or ())}
        held = io.BytesIO()
        scores, count = known.scores, -1 if known.losses is None else len(known.losses)
        np.savez(held, criterion=np.array(scores.criterion), values=scores.values, instead=np.array(scores.instead, str),
                 held=np.zeros(0, bool) if scores.held is None else scores.held, notes=np.array(json.dumps(dict(scores.notes))),
                 measured=np.array(known.measured), rungs=np.array(count), **arrays)  # fmt: skip
        write_files([(self.path / LEARNED / f"{name}.npz", [held.getvalue()])])


def _text(data: Mapping[str, Any]) -> Iterable[bytes]:
    return [(json.dumps(plain(data), indent=1, ensure_ascii=False) + "\n").encode()]


def _difference(name: str, there: Any, here: Any) -> str:
    """One setting that differs, as the command line has it."""
    option = f"--{name.replace('_', '-')}"
    if name in ("calibration", "evaluate"):
        return f"{option}: other data"
    if name in ("spa", "onnxruntime", "numpy"):
        return f"{name} {there} there, {here} here"
    return f"{option} {_shown(there)} there, {_shown(here)} here"


def _shown(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:59]}…"
