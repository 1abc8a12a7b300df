"""From a spec to a package: the whole compiler in one readable function."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec import __version__, codegen, models, passes
from moec.codegen import invariance
from moec.codegen.choosing import Choosing, choose_by
from moec.codegen.kernels import check_family, family_of, select
from moec.config import BuildOptions
from moec.errors import BadOption, nearest
from moec.ir import Module
from moec.ir.text import split_top
from moec.passes.fp8_recipes import without_fp8
from moec.tune.files import about as tuning_used
from moec.tune.files import find_tuning

if TYPE_CHECKING:
    import torch

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """A package on disk. It can be given wherever a path can: ``moec.load(built, weights=...)``."""

    path: Path
    manifest: dict[str, Any]

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def ir_files(self) -> list[Path]:
        """The IR before the first pass and after each."""
        return sorted((self.path / "ir").glob("*.moec"))

    @property
    def sources(self) -> list[Path]:
        """The generated Python files."""
        return sorted(self.path.rglob("*.py"))


def build(
    spec: Any,
    target: str | None = None,
    out: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    options: BuildOptions | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Built:
    """Compiles ``spec`` into the package folder ``out`` (by default ``build/NAME``).

    spec      preset name | Hugging Face folder or config.json | ``file.py:name`` | models.Model or Layer
    target    ``cpu`` by default; see ``moec list targets``
    dtype     ``f32``, ``bf16`` or ``f16``, or PyTorch's, of weights and activations; the model's by default
    weights   a folder of safetensors to check against the model now rather than at the first load
    progress  called with a line for each stage

    Raises a MoecError; then nothing is left in ``out``.
    """
    if not isinstance(options, BuildOptions | None):
        raise BadOption(f"options is a moec.BuildOptions, not {type(options).__name__}")
    for name, path in (("out", out), ("weights", weights)):
        if not isinstance(path, str | os.PathLike | None):
            raise BadOption(f"{name} is a folder, not {type(path).__name__}")
        if path == "":
            raise BadOption(f"{name} is ''; it must name a folder")
    chosen = options or BuildOptions.from_environment()
    changes: dict[str, Any] = {"target": target, "dtype": dtype}
    chosen = replace(chosen, **{name: value for name, value in changes.items() if value is not None})
    say = progress or (lambda line: None)

    goal = codegen.target(chosen.target)
    model = models.resolve(spec)
    if chosen.layers is not None:
        model = model.with_layers(chosen.layers)
    if chosen.dtype is not None:
        model = model.with_dtype(chosen.dtype)
    folder = Path(out) if out is not None else Path("build") / _folder_name(model.name)
    how = choosing(chosen, goal.name)

    with codegen.staging(folder, chosen.force) as aside, choose_by(how):
        say(f"lowering {model.name}")
        module = models.lower(model)
        module.target = goal.name
        about = describe(model, chosen)
        if chosen.resume is not None:
            module, about = resume(module, chosen, about, aside, say)
        else:
            optimise(module, pipeline_of(chosen), aside, say)
        say("emitting")
        about |= schedules(module, goal.name, how)
        manifest = codegen.write_package(aside, module, goal, __version__, about, compiler(goal, chosen, say))
        if weights is not None:
            say("checking the weights")
            check_weights(weights, manifest)
    return Built(folder, manifest)


def choosing(options: BuildOptions, target: str) -> Choosing:
    """How kernels and schedules of a build are picked. Warns of tuning files that are passed over.

    Raises BadTuning; UnknownKernel for a family that there isn't.
    """
    if options.kernels is not None:
        check_family(options.kernels)
    return Choosing(options.batch_invariant, find_tuning(options, target), options.kernels)


def schedules(module: Module, target: str, how: Choosing) -> dict[str, Any]:
    """What the manifest says of it.

    Warns where a batch-invariant build has kernels that aren't, and where no op is emitted by the family of
    kernels that was to go first.
    """
    if how.kernels is not None and not emits(how.kernels, module, target):
        warnings.warn(f"no op here can have a kernel of {how.kernels}'s on {target}", stacklevel=3)
    found = invariance.report(module, target) if how.batch_invariant else None
    if found and (line := invariance.warning(found)):
        warnings.warn(line, stacklevel=3)
    return {"tuning": tuning_used(module, target, how.tuning), "batch_invariant": found}


def emits(family: str, module: Module, target: str) -> bool:
    """Whether kernels of a family emit any op of a step."""
    return any(family_of(select(op, target)) == family for op in invariance.computed(module))


def compiler(
    goal: codegen.Target, options: BuildOptions, say: Progress
) -> Callable[[Path], list[dict[str, Any]]] | None:
    """What compiles the kernels in a package's folder for a target; None where they need no compiler."""
    if goal.device != "cuda":
        return None

    def compile(folder: Path) -> list[dict[str, Any]]:
        from moec.runtime.ahead import compile_kernels

        cache = Path(options.cache) if options.cache else None
        return compile_kernels(
            folder, goal.name, cache, lambda done, n: say(f"compiling kernels, {done} of {n}")
        )

    return compile


def _folder_name(name: str) -> str:
    """A model's name as a file's: no separators, no spaces, never hidden or the folder above."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"


def pipeline_of(options: BuildOptions) -> list[passes.Pass]:
    """The passes that these options ask for."""
    if options.passes is not None:
        return stop_after(passes.parse_pipeline(options.passes), options.stop_after)
    whole = passes.pipeline(options.opt_level, options.target, options.fp8)
    return stop_after(whole, options.stop_after)


def asked_fp8(pipeline: Sequence[passes.Pass]) -> str:
    """The fp8-cast of a pipeline, as it writes it; "" for none."""
    return ",".join(str(p) for p in pipeline if p.name == "fp8-cast")


def fp8_of(target: str, pipeline: Sequence[passes.Pass]) -> str:
    """What the manifest says of fp8: the cast, or what happens instead where a target can't multiply it."""
    casts = [p.options.chosen for p in pipeline if p.name == "fp8-cast"]
    return next(filter(None, (without_fp8(target, recipe) for recipe in casts)), asked_fp8(pipeline))


def stop_after(pipeline: list[passes.Pass], last: str | None, first: int = 1) -> list[passes.Pass]:
    """The passes up to ``last``, a name or a number counted from ``first``. Raises BadOption."""
    if last is None:
        return pipeline
    numbered = list(enumerate(pipeline, start=first))
    ends = [i for i, (number, p) in enumerate(numbered) if last in (p.name, str(number))]
    if not ends:
        have = ", ".join(f"{number}: {p.name}" for number, p in numbered)
        hint = nearest(last, [p.name for p in pipeline])
        raise BadOption(f"stop_after is {last!r}, no pass of this pipeline{hint} ({have})")
    return pipeline[: ends[-1] + 1]


def optimise(
    module: Module, pipeline: list[passes.Pass], folder: Path, say: Progress, first: str = ""
) -> None:
    """Runs ``pipeline`` over ``module``, leaving the dumps and the event log in ``folder``.

    The module as it comes is dumped as ``000_naive``, or as ``first``.
    """

    class Announce(passes.Instrument):
        def before(self, run: passes.PassRun, module: Module) -> None:
            say(f"pass {run.ran.name}")

        def replay(self, run: passes.PassRun) -> str:
            """A failed build leaves no dump behind: how to get the one that the pass was given."""
            command = dump.replay(run).replace(str(folder), "DIR")
            stop = f"--stop-after {before + run.number - 1}" if before + run.number > 1 else "-O0"
            return f"build with {stop} --out DIR, then {command}"

    before, dump = len(split_top(module.ran)), passes.Dump(folder / "ir", first)
    instruments = [Announce(), dump, passes.Events(folder / "events.jsonl")]
    passes.PassManager(pipeline, instruments).run(module)


def resume(
    naive: Module, options: BuildOptions, about: dict[str, Any], folder: Path, say: Progress
) -> tuple[Module, dict[str, Any]]:
    """Goes on from the dump that the options name: the module, and what the manifest says of it.

    The spec's naive IR is kept beside it as ``000_naive``: it is what `moec verify` compares with.
    """
    from moec.resume import read_dump, steps, unread

    dump = Path(str(options.resume))
    say(f"reading {dump}")
    whole = pipeline_of(replace(options, passes=None, stop_after=None))
    resumed = read_dump(dump, naive, whole, options.passes)
    whole_run = [*passes.parse_pipeline(resumed.module.ran), *resumed.passes]
    asked, found = asked_fp8(pipeline_of(options)), asked_fp8(whole_run)
    if options.fp8 and asked != found:
        raise BadOption(
            f"{asked} is asked for, but what {dump} says ran and is to run has {found or 'no fp8-cast'}: "
            "resume a dump of a build with that, or say with -p what is to run"
        )
    optimise(naive, [], folder, say)
    pipeline = stop_after(resumed.passes, options.stop_after, steps(resumed.module) + 1)
    optimise(resumed.module, pipeline, folder, say, "resumed")
    ignored = [*about["ignored"], *unread(resumed.module, naive)]
    about = about | {"ignored": ignored, "resumed": resumed.record, "fp8": fp8_of(options.target, whole_run)}
    return resumed.module, about


def describe(model: Any, options: BuildOptions) -> dict[str, Any]:
    """What the manifest says of the model beside its tensors."""
    return {
        "name": model.name,
        "dtype": model.dtype,
        "hidden": model.hidden,
        "vocab": getattr(model, "vocab", None),
        "max_positions": getattr(model, "max_positions", None),
        "eos": list(getattr(model, "eos", ()) or ()),
        "options": options.as_manifest(),
        "fp8": fp8_of(options.target, pipeline_of(options)),
        "ignored": [list(pair) for pair in getattr(model, "ignored", ())],
    }


def check_weights(weights: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
    """Raises the error that loading ``weights`` would, from the files' headers alone."""
    from moec.runtime.checkpoint import expand, open_checkpoint
    from moec.runtime.weights import check

    wanted = {name: entry for entry in manifest["checkpoint"] for name in expand(entry)}
    check(open_checkpoint(Path(weights), manifest["checkpoint"]), wanted, manifest["ignored"])
