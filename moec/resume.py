"""A build that goes on from a dump, as it was written or as somebody has edited it since."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec import passes
from moec.codegen.parameters import manifest_tensors
from moec.errors import BadOption, IRError, MoecError, SourceLoc, nearest
from moec.ir import CacheType, Function, Module, parse_module, verify
from moec.ir.graph import ENTRIES
from moec.ir.text import split_top
from moec.ir.weights import WEIGHTS
from moec.runtime.checkpoint import expand

_NAME = re.compile(r"(\d+)_([a-z][\w-]*)")


@dataclass(frozen=True)
class Resumed:
    """The dump, the passes that are to run over it, and what the manifest says of it."""

    module: Module
    passes: list[passes.Pass]
    record: dict[str, Any]


def read_dump(file: Path, naive: Module, whole: list[passes.Pass], given: str | None) -> Resumed:
    """The dump in ``file``, which must be one of the spec whose naive IR is ``naive``.

    What runs over it is ``given``; or what its header says is yet to run; or, where it has no header but a
    dump's name (``002_expert-grouping.moec``), what follows that pass in ``whole``.

    Raises the parser's and the verifier's errors at their line, and BadOption where the dump doesn't say
    which pass it's from, or fits another spec or target.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise BadOption(f"can't read {file}: {reason}") from None
    module = parse_module(text, str(file))
    verify(module)
    to_run = _to_run(file, module, whole, given)
    try:
        _check(module, naive)
    except MoecError as error:
        raise error.at(SourceLoc(str(file), 0)) from None
    record = {
        "file": file.name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "ran": module.ran,
        "passes": passes.print_pipeline(to_run),
    }
    return Resumed(module, to_run, record)


def _to_run(file: Path, module: Module, whole: list[passes.Pass], given: str | None) -> list[passes.Pass]:
    named = _NAME.fullmatch(file.stem)
    has_header = bool(module.ran or module.to_run)
    if not has_header and named is not None:
        number, name = int(named[1]), named[2]
        before = whole[:number]
        if number > len(whole) or (number and before[-1].name != name):
            if given is None:
                have = ", ".join(f"{i}: {p}" for i, p in enumerate(whole, start=1))
                raise BadOption(f"{file}: pass {number} is no {name} of this pipeline ({have})")
        else:
            module.ran, module.to_run = passes.print_pipeline(before), passes.print_pipeline(whole[number:])
    if given is not None:
        chosen = passes.parse_pipeline(given)
        module.to_run = ""  # what the header says is not what comes
        return chosen
    if not has_header and named is None:
        raise BadOption(
            f"{file} doesn't say which pass it's from: keep its first line (; ran=[..] to_run=[..]) or its "
            "name (002_expert-grouping.moec), or say with -p what is to run"
        )
    return passes.parse_pipeline(module.to_run)


def _check(module: Module, naive: Module) -> None:
    """Raises unless the dump has the entries and, of the tensors, none but those of ``naive``."""
    if module.target != naive.target:
        raise BadOption(
            f"the dump is for {module.target or 'no target'}, the build for {naive.target}: "
            f"--target {module.target}"
        )
    for name in ENTRIES:
        if name in naive and name != WEIGHTS:
            if name not in module:
                raise IRError(f"@{name} is gone: a package of {naive.name} needs it")
            _check_entry(module[name], naive[name])
    _check_tensors(module, naive)


def _check_entry(have: Function, want: Function) -> None:
    """Arguments and results are the callers' business, but for what a cache holds."""
    for what, ours, theirs in (("takes", have.args, want.args), ("returns", have.outputs, want.outputs)):
        shown = [
            ", ".join("a cache" if isinstance(v.type, CacheType) else str(v.type) for v in values)
            for values in (ours, theirs)
        ]
        if shown[0] != shown[1]:
            raise IRError(f"@{have.name} {what} ({shown[0]}), but the spec's {what} ({shown[1]})")


def _check_tensors(module: Module, naive: Module) -> None:
    have, want = _tensors(module), _tensors(naive)
    for name, shape in have.items():
        if name not in want:
            close = nearest(name, [n for n in want if n[:12] == name[:12]][:500])
            raise IRError(f"the dump reads ${name}, which the spec's checkpoint hasn't{close}")
        if shape != want[name]:
            raise IRError(f"${name} is {shape} but {want[name]} in the spec")


def unread(module: Module, naive: Module) -> list[list[str]]:
    """Patterns of the tensors that the spec reads and the optimised module does not, with the reason."""
    have, found = _tensors(module), []
    for entry in manifest_tensors(naive)["checkpoint"]:
        names = [n for n in expand(entry) if n not in have]
        if len(names) == len(list(expand(entry))) > 1:
            names = [entry["name"]]  # all of a family
        found += [[re.escape(n).replace(r"\*", r"\d+"), "the resumed dump doesn't read it"] for n in names]
    return found


def _tensors(module: Module) -> dict[str, str]:
    """dtype and shape of each tensor that is read from a checkpoint."""
    entries = manifest_tensors(module)["checkpoint"]
    return {name: f"{e['dtype']}{e['shape']}" for e in entries for name in expand(e)}


def steps(module: Module) -> int:
    """How many passes are behind ``module``."""
    return len(split_top(module.ran))
