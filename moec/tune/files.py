"""Which tuning file a build goes by: the one it's given, this device's in the cache's folder, or moec's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moec import __version__
from moec.codegen.invariance import computed
from moec.codegen.kernels import select
from moec.codegen.tuned import SHIPPED, Tuning, read_tuning
from moec.config import BuildOptions
from moec.errors import BadTuning, CompilerMissing
from moec.ir.devices import GPUS
from moec.ir.graph import Module

NONE = "none"  # MOEC_TUNING=none, --tuning none: by the analytic model alone


def folder_of(options: BuildOptions) -> Path:
    """Where ``moec tune`` leaves its files unless it's told otherwise, and where builds look."""
    from moec.runtime.kernel_cache import default_folder

    return (Path(options.cache) if options.cache else default_folder()) / "tuning"


def file_name(device: str, triton: str) -> str:
    """``nvidia-h100-80gb-hbm3.triton-3.6.0.json``."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.triton-{triton}.json"


def versions(target: str) -> dict[str, str]:
    """Of what decides how fast a schedule is. Raises CompilerMissing without Triton."""
    from moec.runtime.compile import compiler_version

    return {"moec": __version__, "triton": compiler_version(target).split(",")[0].removeprefix("triton ")}


def device_here(target: str) -> str | None:
    """The name of the GPU that this process would use, where it runs what is built for ``target``."""
    import torch

    from moec.runtime.devices import family

    if not torch.cuda.is_available() or not family(target).runs_on(torch.cuda.get_device_capability()):
        return None
    return torch.cuda.get_device_name()


def find_tuning(options: BuildOptions, target: str) -> Tuning | None:
    """The tuning of a build, None for none. Warns of each file that is passed over, and why.

    Raises BadTuning where the file that the options name can't be read; one that lies where builds look is
    passed over.
    """
    if target not in GPUS and options.tuning not in (None, NONE):
        _warn(f"{options.tuning} is not read: {target} has no schedules to choose among")
    if target not in GPUS or options.tuning == NONE:
        return None
    if options.tuning is not None:
        tuning = read_tuning(Path(options.tuning), _warn)
        if reason := against(tuning, target):
            _warn(f"{tuning.path} is ignored: {reason}")
            return None
        return tuning
    for folder in (folder_of(options), SHIPPED):
        fitting = [t for t in map(_read, sorted(folder.glob("*.json"))) if t and t.target == target]
        usable = [t for t in fitting if not _passed_over(t, target)]
        if len(usable) > 1:
            names = ", ".join(str(t.path) for t in usable)
            _warn(f"{names} are of several devices, none of which is here: --tuning FILE picks one")
        elif usable:
            return usable[0]
    return None


def against(tuning: Tuning, target: str) -> str:
    """Why a build for ``target`` here can't go by ``tuning``; empty where it can."""
    if tuning.target != target:
        return f"it is of {tuning.device}, {tuning.target}, and the build is for {target}"
    here = device_here(target)
    if here is not None and here != tuning.device:
        return f"it is of {tuning.device}, and this is {here}"
    try:
        ours = versions(target)
    except CompilerMissing as error:
        return error.message
    for name, version in ours.items():
        if (found := tuning.versions.get(name)) != version:
            return f"it was measured with {name} {found}, and this is {name} {version}"
    return ""


def about(module: Module, target: str, tuning: Tuning | None) -> dict[str, Any] | None:
    """What a manifest says of a build's tuning: the file and, by problem, the ops that go by it."""
    if tuning is None:
        return None
    used: dict[str, dict[str, Any]] = {}
    for op in computed(module):
        record = select(op, target)
        problem = getattr(record, "problem", None)
        if problem is not None and (op.annotations.get("tuned") or record.measured_on(op, target)):
            text = problem(op).text
            entry = used.setdefault(text, {"problem": text, "ops": []})
            entry["ops"] += [op.name] * (op.name not in entry["ops"])
    return {
        "file": tuning.path.name,
        "device": tuning.device,
        "versions": dict(tuning.versions),
        "constants": tuning.constants is not None,
        "used": list(used.values()),
    }


def _read(path: Path) -> Tuning | None:
    try:
        return read_tuning(path, _warn)
    except BadTuning as error:
        where = f"{error.loc}: " if error.loc else ""
        _warn(f"{path} is ignored: {where}{error.message}")
        return None


def _passed_over(tuning: Tuning, target: str) -> bool:
    """Another device's file is no mistake where files of several lie; all else is worth a word."""
    here = device_here(target)
    if here is not None and here != tuning.device:
        return True
    reason = against(tuning, target)
    if reason:
        _warn(f"{tuning.path} is ignored: {reason}")
    return bool(reason)


_warn: Callable[[str], None] = lambda line: warnings.warn(line, stacklevel=3)  # noqa: E731
