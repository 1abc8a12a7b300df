"""Why a rule did not fire at a value: the match is tried again, and says the first condition that failed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moec.codegen  # noqa: F401  its kernel records are what `select` chooses among
from moec.dumps import dump_before, is_package, passes_run
from moec.errors import BadOption, MoecError, NotAPackage, nearest
from moec.ir import Function, Module, Op, read_module
from moec.passes import PASSES, Pass, parse_pipeline
from moec.passes.firings import Firing, Prices, Recorder
from moec.passes.pattern import Match, Miss
from moec.passes.rewrite import Log, Rule, attempt

NEAREST = 3  # misses elsewhere that are shown


@dataclass
class Answer:
    """What became of one rule at one value of one function.

    ``fired`` is set where it fired; else ``miss`` says why not at the op that makes the value, or, where that
    is no op that the rule looks at, ``near`` says why not at those that it does. ``source`` is the IR asked.
    """

    rule: str
    value: str
    function: str
    op: str
    line: str | None
    source: str
    ran: bool  # whether the pass was one of the package's; else this is what it would do
    root: str
    rule_line: str | None
    fired: Firing | None = None
    miss: Miss | None = None
    near: list[Miss] = field(default_factory=list)
    instead: Firing | None = None  # another rule of the pass that took the op first
    elsewhere: int = 0  # ops of the function that the rule looks at

    def as_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "value": self.value,
            "function": self.function,
            "op": self.op,
            "line": self.line,
            "source": self.source,
            "ran": self.ran,
            "root": self.root,
            "rule_line": self.rule_line,
            "fired": self.fired.as_dict() if self.fired else None,
            "miss": self.miss.as_dict() if self.miss else None,
            "near": [miss.as_dict() for miss in self.near],
            "instead": self.instead.as_dict() if self.instead else None,
        }


def rules_of(each: Pass) -> dict[str, Rule]:
    """The rules that a pass applies: what it says when it runs over an empty module."""
    log = each.log = Log()
    with suppress(MoecError, KeyError, ValueError):  # it may want something in it, but has named its rules
        each.run(Module("empty"))
    return log.tables


def find_rule(text: str, pipeline: list[Pass]) -> list[tuple[Pass, str]]:
    """The passes that have rule ``text`` (``pass.rule`` or ``rule``): those of ``pipeline`` with their
    options, any other with its defaults. Raises BadOption with the nearest names.
    """
    wanted, _, rule = text.rpartition(".")
    if wanted and wanted not in PASSES:
        raise BadOption(f"no pass is called {wanted!r}{nearest(wanted, PASSES)}")
    others = [cls() for name, cls in PASSES.items() if name not in {p.name for p in pipeline}]
    known: dict[str, None] = {}
    found: dict[str, tuple[Pass, str]] = {}
    for each in [*pipeline, *others]:
        if wanted in ("", each.name):
            rules = rules_of(each)
            known |= {f"{each.name}.{name}": None for name in rules}
            if rule in rules:
                found.setdefault(each.name, (each, rule))
    if not found:
        close = nearest(text, [*known, *(name.partition(".")[2] for name in known)])
        raise BadOption(f"no rule is called {text!r}{close or '; there are ' + ', '.join(known)}")
    return list(found.values())


def why_not(rule: str, value: str, where: Path, function: str | None = None) -> list[Answer]:
    """What became of ``rule`` at ``value``, in a package or a .moec file.

    In a package the rule is tried on the IR that its pass was given, each time that the pass ran. Raises
    BadOption for a rule, value or function that isn't there, with the nearest names.
    """
    if is_package(where):
        known = passes_run(where)
        if not known:
            raise NotAPackage(f"{where} has no events.jsonl with its passes; give one of its dumps instead")
        pipeline = [(n, each) for n, text in known for each in parse_pipeline(text)]
    elif where.is_dir():
        raise NotAPackage(f"{where} is no package")
    else:
        pipeline = []
    answers: list[Answer] = []
    missing: MoecError | None = None
    for each, name in find_rule(rule, [p for _, p in pipeline]):
        times: list[tuple[Path, Pass]] = [
            (dump_before(where, number), p) for number, p in pipeline if p.name == each.name
        ]
        ran = bool(times)
        for file, run in times or [(dump_before(where, 10**6) if pipeline else where, each)]:
            try:
                answers += ask(read_module(file), run, name, value, function, file.name, ran)
            except BadOption as error:
                missing = error
    if not answers and missing is not None:
        raise missing
    return answers


def ask(
    module: Module,
    each: Pass,
    rule: str,
    value: str,
    function: str | None = None,
    source: str = "",
    ran: bool = False,
) -> list[Answer]:
    """The same of one pass on one module, which isn't changed: an answer for each function with the value."""
    text = "%" + value.removeprefix("%")
    holders = [f for f in _functions(module, function) if _maker(f, text) is not None]
    if not holders:
        raise _no_value(module, text, function)
    table = rules_of(each)[rule]
    firings = _run(module, each)
    answers = []
    for holder in holders:
        op = _maker(holder, text)
        if op is None:
            continue
        pattern = table[0]
        answer = Answer(
            f"{each.name}.{rule}",
            text,
            holder.name,
            repr(op),
            op.loc.short if op.loc is not None else None,
            source,
            ran,
            pattern.op_name,
            pattern.line.short if pattern.line is not None else None,
        )
        here = [f for f in firings if f.function == holder.name and text in (*f.matched, *f.out)]
        answer.fired = next((f for f in here if f.rule == rule), None)
        if answer.fired is None:
            answer.instead = next((f for f in here if text in f.matched), None)
            _try(module, holder, op, each, table, answer)
        answers.append(answer)
    return sorted(answers, key=lambda a: (a.fired is None, a.miss is None, a.instead is None))


def _functions(module: Module, function: str | None) -> list[Function]:
    return list(module) if function is None else [module[function.removeprefix("@")]]


def _maker(function: Function, value: str) -> Op | None:
    return next((op for op in function.ops for r in op.results if r.text == value), None)


def _no_value(module: Module, value: str, function: str | None) -> BadOption:
    functions = _functions(module, function)
    arguments = [f"@{f.name}" for f in functions if any(a.text == value for a in f.args)]
    if arguments:
        return BadOption(f"{value} is an argument of {', '.join(arguments)}: no op makes it")
    names = [r.text for f in functions for op in f.ops for r in op.results]
    where = f"@{functions[0].name}" if function is not None else f"@{module.name}"
    return BadOption(f"no value is called {value} in {where}{nearest(value, dict.fromkeys(names))}")


def _run(module: Module, each: Pass) -> list[Firing]:
    """What fires when the pass runs over a copy."""
    copy = module.clone()
    recorder = Recorder(copy, Prices(copy))
    each.log = Log(recorder=recorder)
    each.run(copy)
    recorder.finish()
    return recorder.firings


def _try(module: Module, holder: Function, op: Op, each: Pass, rule: Rule, answer: Answer) -> None:
    """Matches again, on a copy, since a match would be carried out."""
    root = rule[0].op_name
    if op.name == root:
        answer.miss = _attempt(module, holder, op, rule, each)
        return
    below = _downstream(holder, op)
    misses = []
    roots = [other for other in holder.ops if other.name == root]
    answer.elsewhere = len(roots)
    for other in roots:
        if (found := _attempt(module, holder, other, rule, each)) is not None:
            misses.append((other not in below, -found.checked, found))
    answer.near = [miss for *_, miss in sorted(misses, key=lambda m: m[:2])[:NEAREST]]


def _attempt(module: Module, holder: Function, op: Op, rule: Rule, each: Pass) -> Miss | None:
    copy = module.clone()
    twin = copy[holder.name].ops[holder.ops.index(op)]
    found = attempt(copy, copy[holder.name], twin, rule, each.name)
    return None if isinstance(found, Match) else found


def _downstream(function: Function, op: Op) -> set[Op]:
    """Everything that depends on ``op``."""
    seen: set[Op] = set()
    todo = [op]
    while todo:
        for res in todo.pop().results:
            fresh = [user for user in function.users(res) if user not in seen]
            seen.update(fresh)
            todo += fresh
    return seen
