"""Applies a table of rules until none fires, keeping a log of what fired and of what didn't, and why."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from moec.errors import InternalError, SourceLoc
from moec.ir import Function, Module, Op, Value
from moec.ir.op import OpResult
from moec.passes.firings import Recorder
from moec.passes.pattern import Match, Miss, OpPattern, Refusal, Rewrite, Rules, match

Rule = tuple[OpPattern, Rewrite]

# A table that fires more often than this for each op doesn't end: two of its rules undo each other.
FIRINGS_PER_OP = 100


@dataclass
class Log:
    """How often each rule fired, and the misses of the last round, in which none did.

    A ``recorder`` is told of each firing; ``tables`` are the rules that were applied.
    """

    fired: Counter[str] = field(default_factory=Counter)
    misses: list[Miss] = field(default_factory=list)
    tables: dict[str, Rule] = field(default_factory=dict)
    recorder: Recorder | None = None


def rewrite(module: Module, rules: Rules, pass_name: str, log: Log) -> bool:
    """Applies ``rules`` everywhere until none fires; whether any did.

    New ops carry ``pass_name(%a,%b)`` as their origin: the results of the matched ops that they replaced.
    """
    log.tables.update(rules)
    by_root: dict[str, list[str]] = {}
    for name, (pattern, _) in rules.items():
        by_root.setdefault(pattern.op_name, []).append(name)
    limit = FIRINGS_PER_OP * (1 + sum(len(f.ops) for f in module))
    fired = 0
    while True:
        before, misses = fired, []
        for function, op in _live_ops(module):
            for name in by_root.get(op.name, ()):
                found = attempt(module, function, op, rules[name], pass_name)
                if isinstance(found, Match):
                    log.fired[name] += 1
                    if log.recorder is not None:
                        log.recorder.fire(module, name, found)
                    fired += 1
                    break
                misses.append(replace(found, rule=name, function=function.name))
            if fired > limit:
                raise InternalError(f"{pass_name}: the rules don't come to an end: {dict(log.fired)}")
        if fired == before:
            log.misses += misses
            return fired > 0


def _live_ops(module: Module) -> Iterator[tuple[Function, Op]]:
    """Every op of every function, but for those that are gone by the time it's their turn."""
    for function in list(module):
        watch = _Watch()
        function.listeners.append(watch)
        try:
            for op in function.ops:
                if function.name in module and op not in watch.gone:
                    yield function, op
        finally:
            function.listeners.remove(watch)


class _Watch:
    """Notes which ops are erased and which appear while a rewrite runs."""

    def __init__(self) -> None:
        self.gone: set[Op] = set()

    def created(self, function: Function, op: Op) -> None: ...

    def erased(self, function: Function, op: Op) -> None:
        self.gone.add(op)

    def replaced(self, function: Function, old: Value, new: Value) -> None: ...


def attempt(module: Module, function: Function, op: Op, rule: Rule, pass_name: str) -> Match | Miss:
    """Fires ``rule`` at ``op`` if it matches; else why not, and nothing is changed."""
    pattern, apply = rule
    found = match(pattern, module, function, op)
    if isinstance(found, Miss):
        return found
    params = set(function.params)
    try:
        results = apply(found)
    except Refusal as refusal:
        for made in reversed(found.created):
            function.erase(made)
        for name in set(function.params) - params:
            function.drop_param(name)
        where = refusal.op or op
        return Miss(refusal.reason, where, where.loc, asked=_raised(refusal), checked=found.checked)
    _replace(found, (results,) if isinstance(results, Value) else tuple(results), pass_name)
    for action in found.afterwards:
        action()
    return found


def _raised(refusal: Refusal) -> SourceLoc | None:
    """The line of the rewrite that refused."""
    frames = traceback.extract_tb(refusal.__traceback__)
    return SourceLoc(frames[-1].filename, frames[-1].lineno or 0, frames[-1].name) if frames else None


def _replace(m: Match, results: Sequence[Value], pass_name: str) -> None:
    """The root's results become ``results``, and so with the ops that gave way beside it; the matched ops
    that nothing uses any more go."""
    function = m.function
    m.note_names()
    for old, new in (*m.replaced, *zip(m.root.results, results, strict=True)):
        # A new op takes the old one's name; a value that was there before keeps its own.
        function.replace(old, new, keep_name=isinstance(new, OpResult) and new.op in m.created)
    gone = []
    for op in sorted(set(m.ops), key=function.position, reverse=True):  # users before producers
        if op is m.root or not (op.effects or any(m.uses(r) for r in op.results)):
            function.erase(op)
            gone.append(op)
    m.out = tuple(new.text for new in results)
    origin = f"{pass_name}({','.join(m.names[op] for op in reversed(gone) if m.names[op])})"
    for op in m.created:
        op.origin = origin
