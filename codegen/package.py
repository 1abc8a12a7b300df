"""A package's folder: sources, IR dumps, manifest; written aside and renamed: never half of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moec.codegen.emit import emit_python, emitted_by
from moec.codegen.parameters import manifest_tensors
from moec.codegen.targets import Target
from moec.errors import OutputExists, OutputUnwritable
from moec.ir.graph import NEW_TOKENS, Module
from moec.ir.memory import is_planned, plan_memory
from moec.ir.op import Op, Value
from moec.ir.ops.control import Loop
from moec.ir.records import kernel_records
from moec.ir.types import CacheType

FORMAT = 1


@contextmanager
def staging(out: Path, force: bool) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place if all goes well and vanishes otherwise.

    Raises OutputExists where ``out`` exists, unless ``force`` says to replace it and it's a package or empty;
    OutputUnwritable where it can't be written.
    """
    out = Path(os.path.abspath(out))
    check_output(out, force)
    above = next(folder for folder in out.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise OutputUnwritable(f"can't write {out}: {above} is no folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputUnwritable(f"can't write {out}: {error.strerror or error}") from None
    try:
        aside.chmod(0o755)
        yield aside
        check_output(out, force)  # it may have come into being meanwhile
        _swap(aside, out)
    except OSError as error:
        raise OutputUnwritable(f"can't write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_output(out: Path, force: bool) -> None:
    """Raises OutputExists unless ``out`` may be written."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputExists(f"{out} exists and is no folder")
    if any(out.iterdir()):
        if not (out / "manifest.json").is_file():
            raise OutputExists(f"{out} exists and is not a package; choose another folder")
        if not force:
            raise OutputExists(f"{out} exists; --force replaces it")


def _swap(aside: Path, out: Path) -> None:
    """Renames ``aside`` to ``out``; where that fails, what was at ``out`` is there again."""
    if not os.path.lexists(out):
        os.replace(aside, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    try:
        os.replace(out, old / out.name)
        os.replace(aside, out)
    except BaseException:
        if not os.path.lexists(out):
            os.replace(old / out.name, out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write_package(
    folder: Path,
    module: Module,
    target: Target,
    version: str,
    about: dict[str, Any],
    compile: Callable[[Path], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Emits ``module`` into ``folder``, which already holds ir/ and events.jsonl, and returns the manifest.

    ``about`` is what the IR doesn't know: the model's name, vocabulary, options, ignored tensors. ``compile``
    builds the kernels of the folder that it is given into it and says what the manifest should of each.
    """
    for path, source in emit_python(module, target.name, version).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    kernels = compile(folder) if compile is not None else []
    manifest = {
        "format": FORMAT,
        "moec": version,
        "target": target.name,
        "device": target.device,
        **about,
        "entries": entries(module),
        "caches": caches(module),
        "routed_layers": routed_layers(module),
        "kernels": kernels,
        "emitted_by": emitted_by(module, target.name),
        "memory_plan": memory_plan(module, target.name),
        **manifest_tensors(module),
        "files": {f.relative_to(folder).as_posix(): _digest(f) for f in _hashed(folder)},
    }
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _hashed(folder: Path) -> list[Path]:
    """All files but the event log, which holds times: equal builds give equal manifests."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "events.jsonl")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def memory_plan(module: Module, target: str) -> dict[str, Any] | None:
    """By entry the most that a step holds beside weights and caches; None for a module that wasn't planned.

    ``peak`` is a formula in bytes, ``bytes`` its value for ``at``; ``largest`` are the values behind it:
    [function, value, bytes].
    """
    if not is_planned(module):
        return None
    plan = plan_memory(module, kernel_records(), target)
    numbers = plan.numbers()
    found: dict[str, Any] = {"at": plan.sizes, "entries": {}}
    for entry in plan.entries:
        held = [(p.function.name, h) for p, i in plan.peak_ops(entry) for h in p.at(i)]
        held.sort(key=lambda item: -numbers[item[1].size])
        found["entries"][entry] = {
            "peak": plan.formula(entry),
            "bytes": plan.peak(entry),
            "buffers": plan.arena(entry),
            "largest": [[name, h.value.name, numbers[h.size]] for name, h in held[:5]],
        }
    return found


def entries(module: Module) -> dict[str, Any]:
    """Arguments and results of each function that a caller may run, in the IR's text form; of @decode also
    ``max_new``, the most new tokens of a sequence that it takes.
    """
    found = {}
    for name in ("step", "decode", "head", "forward"):
        if name in module:
            function = module[name]
            found[name] = {
                "args": [[a.name, str(a.type)] for a in function.args],
                "returns": [str(v.type) for v in function.outputs],
            }
    if "decode" in found:
        found["decode"]["max_new"] = module.bounds.get(NEW_TOKENS, 1)
    return found


def routed_layers(module: Module) -> list[list[int]]:
    """The layers whose experts are chosen by a router, in the order in which a step runs them, each with how
    many it chooses. A layer that is compiled alone is number 0.
    """
    entry = module["step" if "step" in module else "forward"]
    found = [[0, op.attrs["k"]] for op in entry.ops if _routes(op)]
    for op in entry.ops:
        if isinstance(op, Loop) and op.callee in module:
            chosen = [inner.attrs["k"] for inner in module[op.callee].ops if _routes(inner)]
            found += [[number, k] for number in op.range for k in chosen]
    return found


def _routes(op: Op) -> bool:
    return "k" in op.attrs and {"w", "id"} <= {result.name for result in op.result_specs}


def caches(module: Module) -> list[dict[str, Any]]:
    """Each cache argument of ``@step`` or ``@forward`` with the layers that keep entries in it."""
    entry = module["step" if "step" in module else "forward"]
    found = []
    for arg in entry.args:
        if isinstance(arg.type, CacheType):
            found.append(
                {
                    "name": arg.name,
                    "dtype": str(arg.type.dtype),
                    "entry": list(arg.type.entry),
                    "page": arg.type.page,
                    "layers": sorted(_layers(entry.ops, arg)),
                }
            )
    return found


def _layers(ops: list[Any], cache: Value) -> set[int]:
    """The layers whose bodies carry ``cache`` or a successor of it."""
    layers: set[int] = set()
    versions = {cache}
    for op in ops:
        if isinstance(op, Loop):
            for before, after in zip(op.values[: op.carry], op.results, strict=True):
                if before in versions:
                    layers |= set(op.range)
                    versions.add(after)
    return layers
