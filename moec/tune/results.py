"""What was found, as a tuning file (``codegen/tuned.py`` says what it holds): merged, then written aside."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from moec.codegen.tuned import FORMAT, read_json, read_tuning
from moec.errors import BadOption, OutputUnwritable
from moec.tune.refit import Fit
from moec.tune.search import Found, Point

SAME = ("device", "target", "versions")  # only what these agree in is put into one file


def header(device: str, target: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """A file without measurements."""
    about = {"format": FORMAT, "device": device, "target": target, "versions": dict(versions)}
    return about | {"constants": None, "problems": []}


def started(path: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """The file to add to: what ``path`` holds, or ``empty``.

    Raises BadTuning for a damaged one, BadOption for one of another device or other versions.
    """
    if not os.path.lexists(path):
        return empty
    read_tuning(path)
    given = read_json(path)
    for key in SAME:
        if given[key] != empty[key]:
            raise BadOption(f"{path} is of {key} {given[key]!r}, this is {empty[key]!r}: --out another file")
    return given


def merged(file: dict[str, Any], found: Sequence[Found], fit: Fit | None = None) -> dict[str, Any]:
    """``file`` with what was found; a product's rows that were measured again have the newer figures."""
    entries = {json.dumps(e["problem"], sort_keys=True): dict(e) for e in file["problems"]}
    for one in found:
        problem = asdict(one.product.problem)
        fresh = {"op": one.product.op.name, "problem": problem, "points": []}
        entry = entries.setdefault(json.dumps(problem, sort_keys=True), fresh)
        points = {point["rows"]: point for point in entry["points"]}
        points |= {point.rows: _point(point) for point in one.points if point.measured}
        entry["points"] = [points[rows] for rows in sorted(points)]
    file = file | {"problems": [e for e in entries.values() if e["points"]]}
    return file if fit is None else file | {"constants": asdict(fit.constants), "fit": fit.about()}


def _point(point: Point) -> dict[str, Any]:
    best = point.best
    return {
        "rows": point.rows,
        "tokens": point.tokens,
        "date": date.today().isoformat(),
        "schedule": best.text if best else None,
        "seconds": point.measured[best] if best else None,
        "analytic": point.analytic.text,
        "analytic_seconds": point.measured.get(point.analytic),
        "speedup": point.speedup and round(point.speedup, 4),
        "measured": {s.text: seconds for s, seconds in point.measured.items()},
        "excluded": {s.text: why for s, why in point.excluded.items()},
    }


def write(path: Path, file: dict[str, Any]) -> None:
    """Raises OutputUnwritable; then what was there is as it was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(json.dumps(file, indent=1) + "\n")
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside)
            raise
    except OSError as error:
        raise OutputUnwritable(f"can't write {path}: {error.strerror or error}") from None
