"""The IR dumps of a package: which pass left which, and what a name or number means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moec.errors import BadOption, NotAPackage, nearest


def is_package(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def dumps(package: Path) -> list[Path]:
    """The dumps in the order of their passes, the naive one first. Raises NotAPackage."""
    found = sorted((package / "ir").glob("*.moec"))
    if not found:
        raise NotAPackage(f"{package} holds no dumps (ir/*.moec)")
    return found


def number_of(dump: Path) -> int:
    """The pass's number in the pipeline, from 1; 0 for the naive IR."""
    number = dump.stem.partition("_")[0]
    return int(number) if number.isdigit() else 0


def name_of(dump: Path) -> str:
    return dump.stem.partition("_")[2]


def passes_run(package: Path) -> list[tuple[int, str]]:
    """Number and text (name and options) of each pass that the package's build ran."""
    return [(row["number"], row["pass"]) for row in events(package) if row.get("event") == "pass"]


def events(package: Path) -> list[dict[str, Any]]:
    """The rows of events.jsonl; none where it isn't there, as somebody may have cleaned up."""
    try:
        lines = (package / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError):
        return []


def dump_before(package: Path, number: int) -> Path:
    """The IR that pass ``number`` was given."""
    earlier = [d for d in dumps(package) if number_of(d) < number]
    return earlier[-1] if earlier else dumps(package)[0]


def find_dump(package: Path, which: str | None) -> tuple[Path, str]:
    """The dump after pass ``which``, and what is to be said of the choice.

    By number (``2``, ``002``) or by name, the last of that name; without ``which`` the last of all. A pass
    that changed nothing has no dump: it's the one before. Raises BadOption where there is no such pass.
    """
    all_dumps = dumps(package)
    if which is None:
        return all_dumps[-1], ""
    for dump in reversed(all_dumps):
        if which in (name_of(dump), dump.stem) or (which.isdigit() and int(which) == number_of(dump)):
            return dump, ""
    for number, text in reversed(passes_run(package)):
        name = text.partition("{")[0]
        if which in (name, text) or (which.isdigit() and int(which) == number):
            before = dump_before(package, number)
            return before, f"pass {number}, {name}, changed nothing: this is {before.stem}"
    known = ", ".join(d.stem for d in all_dumps)
    hint = nearest(which, [name_of(d) for d in all_dumps])
    raise BadOption(f"{package} has no dump {which!r}{hint}; there are {known}")
