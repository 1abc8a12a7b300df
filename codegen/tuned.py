"""Tuning files: schedules that ``moec tune`` measured on a device, as JSON.

::

    {
      "format": 1,
      "device": "NVIDIA H100 80GB HBM3",          as CUDA names it
      "target": "sm_90a",
      "versions": {"moec": "0.1.0", "triton": "3.6.0"},
      "constants": {"latency": 1e-06, ...},       of the analytic model, fitted; null: not fitted
      "problems": [
        {
          "op": "grouped_linear", "problem": {"experts": 256, "columns": 7168, ...},
          "points": [
            {
              "rows": 0.5, "date": "2026-01-31",  rows an expert
              "schedule": "swapped 16x128x64 w4 s6", "seconds": 1e-3,
              "analytic": "swapped 16x128x64 w4 s4", "analytic_seconds": 1.1e-3, "speedup": 1.1,
              "measured": {"swapped 16x128x64 w4 s6": 1e-3, ...},
              "excluded": {"swapped 32x128x64 w4 s4": "its results are wrong"}
            }
          ]
        }
      ]
    }

A build reads ``device``, ``target``, ``versions``, ``constants`` and of each point ``rows``, ``date`` and
``measured``; the rest is for people.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moec.codegen.constants import ASSUMED, SHARES, Constants
from moec.codegen.json_lines import line_of
from moec.codegen.ladders import parse_ladder
from moec.codegen.schedules import Problem, Schedule
from moec.errors import BadTuning, SourceLoc
from moec.ir.devices import GPUS

FORMAT = 1
# Of what is assumed, a constant is at most so many times as much, or so many times less: else it's no
# device's.
BELIEVED = 1000.0
MOST_ROWS = 2.0**31  # an expert; offsets are of 32 bits
SHIPPED = Path(__file__).parent / "tuning"

Warn = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Tuning:
    """What a file says. ``measured``: seconds by problem, rows an expert (ascending) and schedule."""

    path: Path
    device: str
    target: str
    versions: Mapping[str, str]
    constants: Constants | None
    measured: Mapping[Problem, Mapping[float, dict[Schedule, float]]]
    dates: Mapping[Problem, str]  # the last of its points'

    def origin(self, problem: Problem) -> str:
        """Where measurements of ``problem`` come from: ``NVIDIA H100 80GB HBM3, 2026-01-31``."""
        return f"{self.device}, {self.dates[problem]}"


def read_tuning(path: Path, warn: Warn = lambda line: None) -> Tuning:
    """Raises BadTuning, naming file and line, for what is no tuning file.

    ``warn`` hears of schedules that the space hasn't, and of problems as another moec writes them: they are
    left out.
    """
    given = read_json(path)
    reader = _Reader(path, warn)
    if type(given.get("format")) is not int or given["format"] != FORMAT:
        said = f"format {given.get('format')!r}"
        raise reader.wrong("format", f"{path} has {said}; this moec reads {FORMAT}: tune again")
    device, target = reader.text(given, "device"), reader.text(given, "target")
    versions = {k: str(v) for k, v in reader.get(given, "versions", dict).items()}
    if target not in GPUS:
        raise reader.wrong("target", f"target is {target!r}, none of {', '.join(GPUS)}")
    constants = reader.constants(given.get("constants"))
    measured: dict[Problem, dict[float, dict[Schedule, float]]] = {}
    dates: dict[Problem, str] = {}
    for number, entry in enumerate(reader.get(given, "problems", list)):
        where = f"problems[{number}]"
        problem = reader.problem(reader.get(entry, "problem", dict, where), where)
        if problem is None:
            continue
        for at, point in enumerate(reader.get(entry, "points", list, where)):
            rows, date, seconds = reader.point(point, problem, target, f"{where}.points[{at}]")
            if rows in measured.get(problem, {}):
                place = f"{where}.points[{at}]"
                raise reader.wrong(f"{place}.rows", f"{place}.rows is {rows:g}, which another point has too")
            if seconds:
                measured.setdefault(problem, {})[rows] = seconds
                dates[problem] = max(date, dates.get(problem, ""))
    if reader.gone:
        first, others = reader.gone[0], len(reader.gone) - 1
        warn(f"{path}: left out {first}" + (f", and {others} more" if others else ""))
    ordered = {problem: dict(sorted(points.items())) for problem, points in measured.items()}
    return Tuning(path, device, target, versions, constants, ordered, dates)


def read_json(path: Path) -> dict[str, Any]:
    """A file's object. Raises BadTuning with the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadTuning(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        line = (text.splitlines() or [""])[min(error.lineno, len(text.splitlines()) or 1) - 1]
        loc = SourceLoc(str(path), error.lineno, column=error.colno, text=line)
        raise BadTuning(f"no JSON: {error.msg}", loc=loc) from None
    except (RecursionError, ValueError) as error:  # nested too deep, numbers too long
        raise BadTuning(f"{path} is no tuning file: {error}") from None
    if not isinstance(given, dict):
        raise BadTuning("a tuning file is a JSON object", loc=SourceLoc(str(path), 1))
    return given


class _Reader:
    """Checks each part; ``gone`` are schedules that are left out, with reasons."""

    def __init__(self, path: Path, warn: Warn) -> None:
        self.path, self.warn, self.gone = path, warn, list[str]()

    def get(self, given: Any, key: str, kind: type, where: str = "") -> Any:
        value = given.get(key) if isinstance(given, dict) else None
        if not isinstance(value, kind):
            place = f"{where}.{key}".removeprefix(".")
            wanted = {"dict": "an object", "list": "a list", "str": "text"}[kind.__name__]
            raise self.wrong(place, f"{place} is {value!r}, not {wanted}")
        return value

    def wrong(self, place: str, message: str) -> BadTuning:
        """The error about what stands at ``problems[3].points[1]``, with its line."""
        try:
            line = line_of(self.path.read_text(encoding="utf-8"), place)
        except (OSError, ValueError, IndexError):  # the file has changed meanwhile
            line = 0
        return BadTuning(message[:300], loc=SourceLoc(str(self.path), line))

    def text(self, given: Any, key: str, where: str = "") -> str:
        return str(self.get(given, key, str, where))

    def constants(self, given: Any) -> Constants | None:
        """A file of another moec may have others: what it lacks is as assumed."""
        if given is None:
            return None
        known = {f.name for f in fields(Constants)}
        if not isinstance(given, dict) or not all(_positive(v) for v in given.values()):
            raise self.wrong("constants", f"constants is {given!r}, not positive numbers")
        if odd := given.keys() - known:
            self.warn(f"{self.path}: no constant of the model is called {', '.join(sorted(odd))}; left out")
        made = {key: float(value) for key, value in given.items() if key in known}
        for key, value in made.items():
            assumed = getattr(ASSUMED, key)
            low, high = assumed / BELIEVED, 1.0 if key in SHARES else assumed * BELIEVED
            if not low <= value <= high:
                raise self.wrong(f"constants.{key}", f"{key} is {value:g}, not between {low:g} and {high:g}")
        return Constants(**made)

    def problem(self, given: dict[str, Any], where: str) -> Problem | None:
        kinds = {f.name: str(f.type) for f in fields(Problem)}
        python = {"int": int, "str": str, "bool": bool}
        if odd := given.keys() - kinds.keys():
            self.warn(f"{self.path}: {where} has {', '.join(sorted(odd))}, unknown to this moec; left out")
            return None
        wrong = [k for k, v in given.items() if type(v) is not python.get(kinds[k], type(v))]
        wrong += [k for k, v in given.items() if v == "" or (type(v) is int and v < 1)]
        wrong += [k for k in ("itemsize", "result") if given.get(k, 4) not in (1, 2, 4)]
        try:
            made = None if wrong else Problem(**given)
        except TypeError:  # a field is missing
            made = None
        if made is None:
            raise self.wrong(f"{where}.problem", f"{where}.problem is {given!r}: no product")
        return made

    def point(
        self, given: Any, problem: Problem, target: str, where: str
    ) -> tuple[float, str, dict[Schedule, float]]:
        measured, date = self.get(given, "measured", dict, where), self.text(given, "date", where)
        rows = given.get("rows")
        for what, value in (("rows", rows), *((f"measured.{k}", v) for k, v in measured.items())):
            if not _positive(value):
                raise self.wrong(f"{where}.{what}", f"{where}.{what} is {value!r}, not a positive number")
        if rows > MOST_ROWS:
            raise self.wrong(f"{where}.rows", f"{where}.rows is {rows!r}, more than {MOST_ROWS:.0f}")
        found = {}
        for text, seconds in measured.items():
            try:
                rungs = parse_ladder(text, problem, GPUS[target])
            except ValueError as error:
                self.gone.append(str(error))
                continue
            if len(rungs) > 1:
                self.gone.append(f"{text!r}: one schedule has these seconds, not several")
            else:
                found[rungs[0][1]] = float(seconds)
        return float(rows), date, found


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max
