"""Patterns over the graph. A rule is a line of a table: its name, ``(pattern, rewrite)``, and what it does::

    RULES = {
        "cast-identity": (P.cast("x", to=ANY).where(keeps_type), lambda m: m["x"]),  # cast(x) -> x
        "combine-plus": (
            P.add(P.combine("rows", "slot", "w", None, to=ANY).once().named("c"), "s").commutes(),
            plus,
        ),  # add(combine(rows, slot, w), s) -> combine(rows, slot, w, s)
    }

``P.name(operands..., attribute=...)`` matches an op of that name:

    "x"              any value; the same name again must be the same value
    param("w")       a parameter
    P.other(...)     the result of an op, by default its first; ``.out(i)`` asks for the i-th
    None             an optional operand that must be absent; trailing ones may be left out
    maybe("bias")    an optional operand, present or absent
    ...              any further operands (last only)
    key=value        this attribute exactly; one that isn't named must have its default
    key=ANY          any value of this attribute

``.once()`` wants one use of each result, ``.once(1)`` of that one: where a rewrite would otherwise do the
work twice, or leave a result without its op. ``.named("c")`` captures the op itself, ``.commutes()`` tries
both orders of the first two operands, ``.where(check)`` adds a condition, a function of the match so far that
returns "" or the reason why not.

Matching says why it fails: the first condition that did, with the op that it was about, the line of the
model that made the op, and the line of the rule that says the condition.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, Union

from moec.errors import SourceLoc
from moec.ir import Function, Module, Op, Value
from moec.ir.op import Argument, OpResult, Param, op_class


class _Any:
    def __repr__(self) -> str:
        return "ANY"


ANY = _Any()


@dataclass(frozen=True)
class Miss:
    """Why a rule didn't fire at ``op`` (the first condition that failed), and the line that made the op.

    ``asked`` is the line of the rule's file that the condition stands in.
    """

    reason: str
    op: Op
    loc: SourceLoc | None
    rule: str = ""
    function: str = ""
    asked: SourceLoc | None = None
    checked: int = 0  # conditions that held before

    def __str__(self) -> str:
        place = f" ({self.loc.short})" if self.loc is not None else ""
        return f"{self.rule}: not at {self.op!r}{place}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """The miss as JSON can hold it."""
        line = self.loc.short if self.loc is not None else None
        return {
            "rule": self.rule,
            "function": self.function,
            "op": repr(self.op),
            "line": line,
            "reason": self.reason,
            "asked": self.asked.short if self.asked is not None else None,
        }


class Refusal(Exception):
    """Raised by a rewrite that finds, as it goes, that it can't; the driver undoes what it had made."""

    def __init__(self, reason: str, op: Op | None = None) -> None:
        super().__init__(reason)
        self.reason, self.op = reason, op


class Match:
    """What a pattern found. ``m["x"]`` is what the pattern calls x: a Value, or an Op for ``.named``."""

    def __init__(self, module: Module, function: Function, root: Op) -> None:
        self.module, self.function, self.root = module, function, root
        self.captures: dict[str, Any] = {}
        self.ops: list[Op] = []  # the matched ones, root first
        self.created: list[Op] = []
        self.replaced: list[tuple[OpResult, Value]] = []
        self.afterwards: list[Callable[[], None]] = []
        self.rule_loc: SourceLoc | None = None  # where the pattern is written
        # Names, once it has fired: of what was matched, what that read from outside, what the root became.
        self.names: dict[Op, str] = {}
        self.reads: tuple[str, ...] = ()
        self.out: tuple[str, ...] = ()
        self.checked = 0  # conditions that held: of two misses, the one that got further says more

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]

    def fork(self) -> Match:
        copy = Match(self.module, self.function, self.root)
        copy.captures, copy.ops, copy.checked = dict(self.captures), list(self.ops), self.checked
        return copy

    @property
    def matched(self) -> tuple[str, ...]:
        return tuple(name for names in self.names.values() for name in names.split(",") if name)

    def note_names(self) -> None:
        """Keeps the names that values have before the rewrite gives them to others."""
        inside = {r for op in self.ops for r in op.results}
        self.names = {op: ",".join(r.text for r in op.results) for op in self.ops}
        read = [v.text for op in self.ops for v in op.operands if v is not None and v not in inside]
        self.reads = tuple(dict.fromkeys(read))

    def uses(self, value: Value) -> int:
        return len(self.function.uses(value))

    def create(
        self,
        op_name: str,
        *operands: Value | None,
        out: str | Sequence[str] = (),
        loc: SourceLoc | None = None,
        **attrs: Any,
    ) -> Any:
        """A new op in front of the root, of the root's source line unless ``loc`` is given: its result(s)."""
        op = op_class(op_name)(operands, attrs, loc or self.root.loc)
        self.function.create(op, (out,) if isinstance(out, str) else out, before=self.root)
        self.created.append(op)
        return op.results[0] if len(op.results) == 1 else op.results

    def also(self, op: Op, *results: Value) -> None:
        """Beside the root, ``op`` gives way: its results become ``results``, the first ones where these are
        fewer and what matched is all that uses the others."""
        self.ops.append(op)
        self.replaced += zip(op.results, results, strict=False)

    def later(self, action: Callable[[], None]) -> None:
        """Runs ``action`` once the root is gone."""
        self.afterwards.append(action)


Check = Callable[[Match], str]
Operand = Union["Pattern", str, None, EllipsisType]
Rewrite = Callable[[Match], "Value | Sequence[Value]"]
Rules = Mapping[str, "tuple[OpPattern, Rewrite]"]


class Pattern:
    """Matches a value."""

    def match(self, m: Match, value: Value | None, user: Op) -> Miss | None:
        """None where it matches; ``user`` is the op that the value is an operand of."""
        raise NotImplementedError


@dataclass(frozen=True)
class Capture(Pattern):
    """Any value, or any parameter, called ``name``."""

    name: str
    only_params: bool = False
    optional: bool = False

    def match(self, m: Match, value: Value | None, user: Op) -> Miss | None:
        if value is not None and self.only_params and not isinstance(value, Param):
            return Miss(f"{value.text} is no parameter", user, user.loc)
        if self.name in m.captures and m.captures[self.name] is not value:
            other = m.captures[self.name]
            return Miss(f"{_text(value)} and {_text(other)} are not the same", user, user.loc)
        m.captures[self.name] = value
        m.checked += 1
        return None


@dataclass(frozen=True)
class OpPattern(Pattern):
    """An op, by name, operands and attributes, and what else is asked of it."""

    op_name: str
    operands: tuple[Operand, ...]
    attrs: Mapping[str, Any]
    index: int = 0
    label: str = ""
    single_use: tuple[int, ...] | None = None  # the results of which one use is wanted; empty: all
    commutative: bool = False
    checks: tuple[Check, ...] = ()
    line: SourceLoc | None = field(default=None, compare=False)  # where it is written

    def __post_init__(self) -> None:
        cls = op_class(self.op_name)
        for key in self.attrs:
            if key not in cls.attr_specs:
                raise TypeError(f"a pattern asks for {self.op_name}'s {key}, which it hasn't")
        for key, spec in cls.attr_specs.items():
            if spec.required and key not in self.attrs:
                raise TypeError(f"a pattern must say what it wants of {self.op_name}'s {key}: a value or ANY")

    def once(self, *results: int) -> OpPattern:
        return replace(self, single_use=results)

    def commutes(self) -> OpPattern:
        return replace(self, commutative=True)

    def named(self, label: str) -> OpPattern:
        return replace(self, label=label)

    def out(self, index: int) -> OpPattern:
        return replace(self, index=index)

    def where(self, check: Check) -> OpPattern:
        return replace(self, checks=(*self.checks, check))

    def match(self, m: Match, value: Value | None, user: Op) -> Miss | None:
        if not isinstance(value, OpResult):
            kind = "an argument" if isinstance(value, Argument) else "a parameter"
            what = "absent" if value is None else f"{value.text}, {kind}"
            return Miss(
                f"an operand is {what}, not the result of {self.op_name}", user, user.loc, asked=self.line
            )
        if value.op.name != self.op_name:
            reason = f"{value.text} comes from {value.op.name}, not {self.op_name}"
            return Miss(reason, user, user.loc, asked=self.line)
        if value.index != self.index:
            reason = f"{value.text} is result {value.index} of {self.op_name}"
            return Miss(reason, value.op, value.op.loc, asked=self.line)
        return self.match_op(m, value.op)

    def match_op(self, m: Match, op: Op) -> Miss | None:
        """None where ``op`` and what it is made of match; the captures are then in ``m``."""
        miss = self._match_op(m, op)
        return miss if miss is None or miss.asked is not None else replace(miss, asked=self.line)

    def _match_op(self, m: Match, op: Op) -> Miss | None:
        m.ops.append(op)
        m.checked += 1
        if self.label:
            m.captures[self.label] = op
        miss = self._match_attrs(m, op) or self._match_operands(m, op) or self._match_uses(m, op)
        if miss is not None:
            return miss
        for check in self.checks:
            if reason := check(m):
                return Miss(reason, op, op.loc, asked=check_line(check))
            m.checked += 1
        return None

    def _match_attrs(self, m: Match, op: Op) -> Miss | None:
        for key, spec in op.attr_specs.items():
            wanted, found = self.attrs.get(key, spec.default), op.attrs[key]
            if wanted is not ANY and found != wanted:
                have, want = ("not given" if v is None else spec.kind.print(v) for v in (found, wanted))
                return Miss(f"{key} is {have}, not {want}", op, op.loc)
            m.checked += 1
        return None

    def _match_uses(self, m: Match, op: Op) -> Miss | None:
        if self.single_use is None:
            return None
        for res in (op.results[i] for i in self.single_use or range(len(op.results))):
            users = m.function.users(res)
            if m.uses(res) > 1:
                return Miss(f"{res.text} is used more than once, by {_names(users)}", op, op.loc)
        m.checked += 1
        return None

    def _match_operands(self, m: Match, op: Op) -> Miss | None:
        miss = self._match_in_order(first := m.fork(), op, op.operands)
        if miss is not None and self.commutative:
            swapped = (op.operands[1], op.operands[0], *op.operands[2:])
            other = self._match_in_order(second := m.fork(), op, swapped)
            if other is None or second.checked > first.checked:
                first, miss = second, other
        m.captures, m.ops, m.checked = first.captures, first.ops, first.checked
        return miss

    def _match_in_order(self, m: Match, op: Op, values: Sequence[Value | None]) -> Miss | None:
        wanted = [p for p in self.operands if p is not ...]
        open_ended = len(wanted) < len(self.operands)
        if len(values) < len(wanted):
            return Miss(f"has {len(values)} operands, not {len(wanted)}", op, op.loc)
        for number, value in enumerate(values):
            if number >= len(wanted) and open_ended:
                break
            pattern = wanted[number] if number < len(wanted) else None
            miss = self._match_operand(m, op, pattern, value, number)
            if miss is not None:
                return miss
        return None

    def _match_operand(
        self, m: Match, op: Op, pattern: Pattern | str | None, value: Value | None, number: int
    ) -> Miss | None:
        spec = op.operand_specs[min(number, len(op.operand_specs) - 1)]
        if pattern is None:
            return None if value is None else Miss(f"has {spec.name} {value.text}", op, op.loc)
        if isinstance(pattern, str):
            pattern = Capture(pattern)
        if value is None and not (isinstance(pattern, Capture) and pattern.optional):
            return Miss(f"has no {spec.name}", op, op.loc)
        return pattern.match(m, value, op)


def param(name: str) -> Capture:
    return Capture(name, only_params=True)


def maybe(name: str) -> Capture:
    return Capture(name, optional=True)


class _Patterns:
    """``P.cast("x", to=ANY)``: a pattern for each op of the registry."""

    def __getattr__(self, op_name: str) -> Callable[..., OpPattern]:
        if op_name.startswith("_"):
            raise AttributeError(op_name)

        def pattern(*operands: Operand, **attrs: Any) -> OpPattern:
            caller = sys._getframe(1)
            line = SourceLoc(caller.f_code.co_filename, caller.f_lineno)
            return OpPattern(op_name, operands, attrs, line=line)

        return pattern


P = _Patterns()


def match(pattern: OpPattern, module: Module, function: Function, op: Op) -> Match | Miss:
    """Matches ``pattern`` with ``op`` as its root, which must be an op of the pattern's name."""
    m = Match(module, function, op)
    m.rule_loc = pattern.line
    miss = pattern.match_op(m, op)
    return m if miss is None else replace(miss, checked=m.checked)


def check_line(check: Callable[..., Any]) -> SourceLoc | None:
    """Where a condition is defined; None for one that no file defines."""
    code = getattr(inspect.unwrap(getattr(check, "func", check)), "__code__", None)
    return SourceLoc(code.co_filename, code.co_firstlineno, code.co_name) if code is not None else None


def _text(value: Any) -> str:
    return "nothing" if value is None else getattr(value, "text", repr(value))


def _names(ops: Sequence[Op]) -> str:
    return " and ".join(dict.fromkeys(op.name for op in ops))
