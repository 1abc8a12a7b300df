"""Passes, their registry, and the manager that runs them in order.

A pass is a class with a name and, where it has any, a frozen dataclass of options. See the package's
docstring for a template. The manager verifies the module after each pass and tells its instruments what
happened."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

from moec.errors import BadOption, InternalError, MoecError, UnknownPass, nearest
from moec.ir import Module, verify
from moec.ir.text import split_top
from moec.passes.firings import Firing, Recorder
from moec.passes.options import read_options, show_options, split_pipeline
from moec.passes.pattern import Rules
from moec.passes.rewrite import Log, rewrite


@dataclass(frozen=True)
class NoOptions:
    """The options of a pass that has none."""


class Pass:
    """One rewrite of a module. ``str(pass)`` is what ``parse_pipeline`` reads.

    ``phase`` orders what can't be in any order: no pass runs after one of a higher phase.
    0: what is computed and how it is written; 1: further entries made of it; 2: kernels; 3: memory.
    """

    name: ClassVar[str] = ""
    phase: ClassVar[int] = 0
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options
        self.log = Log()

    def run(self, module: Module) -> bool:
        """Rewrites ``module`` in place; whether anything changed. A second run changes nothing."""
        raise NotImplementedError

    def apply(self, module: Module, rules: Rules) -> bool:
        """Applies a table of rules until none fires, logging to ``self.log``."""
        return rewrite(module, rules, self.name, self.log)

    def __str__(self) -> str:
        return self.name + show_options(self.options)

    def __repr__(self) -> str:
        return f"<{self}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pass) and (self.name, self.options) == (other.name, other.options)

    def __hash__(self) -> int:
        return hash((self.name, self.options))


PASSES: dict[str, type[Pass]] = {}
_P = TypeVar("_P", bound=type[Pass])


def register(cls: _P) -> _P:
    """Class decorator: makes the pass known by its name."""
    if cls.name in PASSES:
        raise RuntimeError(f"two passes are called {cls.name}")
    PASSES[cls.name] = cls
    return cls


def pass_class(name: str) -> type[Pass]:
    """The pass of that name. Raises UnknownPass with the nearest names."""
    if name not in PASSES:
        hint = nearest(name, PASSES) or f"; there are {', '.join(sorted(PASSES))}"
        raise UnknownPass(f"no pass is called {name!r}{hint}")
    return PASSES[name]


def parse_pipeline(text: str) -> list[Pass]:
    """``a,b{x=1},c`` as passes with their options. Raises UnknownPass or BadOption."""
    passes = []
    for name, given in split_pipeline(text):
        cls = pass_class(name)
        passes.append(cls(read_options(name, cls.Options, given)))
    return passes


def check_order(passes: Sequence[Pass | type[Pass]]) -> None:
    """Raises BadOption where a pass runs after one of a higher phase, whose work it could undo."""
    for before, after in pairwise(passes):
        if after.phase < before.phase:
            raise BadOption(
                f"{after.name} (phase {after.phase}) can't run after {before.name} (phase {before.phase})"
            )


def check_history(passes: Sequence[Pass], module: Module) -> None:
    """Raises BadOption where a dump's header says that a pass of a higher phase has run already: what that
    one left (a kernel, a buffer, a further entry) would not be true of the result.
    """
    names = [each.split("{")[0] for each in split_top(module.ran)]
    ran = [PASSES[name] for name in names if name in PASSES]
    try:
        check_order([*ran[-1:], *passes[:1]])
    except BadOption as error:
        raise error.note(f"{ran[-1].name} has run on this module: take a dump from before it") from None


def print_pipeline(passes: Iterable[Pass]) -> str:
    return ",".join(map(str, passes))


@dataclass
class PassRun:
    """What one run of one pass did. ``number`` counts from 1; 0 is the module as it came."""

    number: int
    ran: Pass
    changed: bool = False
    seconds: float = 0.0
    ops_before: int = 0
    ops_after: int = 0
    fired: dict[str, int] = field(default_factory=dict)
    firings: list[Firing] = field(default_factory=list)  # where an instrument asked for them
    misses: list[dict[str, Any]] = field(default_factory=list)


class Instrument:
    """Watches a pipeline. Every hook may be left out.

    Where one of them wants ``history``, the module says which passes ran and which are to (``Module.ran``);
    one that came with a history keeps it up anyway.
    """

    history: ClassVar[bool] = False

    def recorder(self, module: Module) -> Recorder | None:
        """What is to be told of each rule's firing in the next pass; ``run.firings`` has them after it."""
        return None

    def start(self, module: Module) -> None:
        """Before the first pass."""

    def before(self, run: PassRun, module: Module) -> None: ...

    def after(self, run: PassRun, module: Module) -> None:
        """After a pass, once the module has been verified."""

    def finish(self, module: Module) -> None:
        """After the last pass."""

    def replay(self, run: PassRun) -> str:
        """The command that repeats the failing pass, for whoever can say; nothing for the others."""
        return ""


class _History:
    """The passes that ran before and that are to run after, as ``passes`` go on."""

    def __init__(self, passes: Sequence[Pass], module: Module) -> None:
        self._ran, to_run = split_top(module.ran), split_top(module.to_run)
        self._mine = [str(each) for each in passes]
        count = len(self._mine)
        self._after = to_run[count:] if to_run[:count] == self._mine else to_run
        self.note(0, module)

    def note(self, done: int, module: Module) -> None:
        module.ran = ",".join(self._ran + self._mine[:done])
        module.to_run = ",".join(self._mine[done:] + self._after)


class PassManager:
    """Runs ``passes`` in order, verifying after each. Raises BadOption for an order that isn't legal."""

    def __init__(self, passes: Sequence[Pass], instruments: Sequence[Instrument] = ()) -> None:
        check_order(passes)
        self.passes, self.instruments = list(passes), list(instruments)

    def run(self, module: Module) -> list[PassRun]:
        """Rewrites ``module`` in place. An error names the pass and how to run it again alone."""
        check_history(self.passes, module)
        verify(module)
        history = _History(self.passes, module) if self._keeps_history(module) else None
        for instrument in self.instruments:
            instrument.start(module)
        runs = []
        for number, each in enumerate(self.passes, start=1):
            run = PassRun(number, each)
            if history is not None:
                history.note(number, module)
            try:
                self._run_one(run, module)
            except MoecError as error:
                raise error.note(self._note(run)) from error.__cause__
            except Exception as error:
                message = f"{each.name} failed: {type(error).__name__}: {error}"
                raise InternalError(message, notes=[self._note(run)]) from error
            runs.append(run)
        for instrument in self.instruments:
            instrument.finish(module)
        return runs

    def _run_one(self, run: PassRun, module: Module) -> None:
        for instrument in self.instruments:
            instrument.before(run, module)
        recorder = next((r for i in self.instruments if (r := i.recorder(module)) is not None), None)
        run.ran.log = log = Log(recorder=recorder)
        run.ops_before = count_ops(module)
        start = time.perf_counter()
        try:
            run.changed = run.ran.run(module)
        finally:
            run.seconds = time.perf_counter() - start
            if recorder is not None:
                recorder.finish()
                run.firings = recorder.firings
        run.ops_after = count_ops(module)
        run.fired, run.misses = dict(log.fired), [miss.as_dict() for miss in log.misses]
        verify(module)
        for instrument in self.instruments:
            instrument.after(run, module)

    def _keeps_history(self, module: Module) -> bool:
        return bool(module.ran or module.to_run) or any(i.history for i in self.instruments)

    def _note(self, run: PassRun) -> str:
        commands = [c for c in (i.replay(run) for i in self.instruments) if c]
        return "; replay: ".join([f"after pass {run.ran.name}", *commands[:1]])


def count_ops(module: Module) -> int:
    return sum(len(function.ops) for function in module)
