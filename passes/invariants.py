"""What is the same in every run of a body: proved, and computed once outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moec.ir import Function, Module, Op, Value
from moec.ir.graph import ENTRIES
from moec.ir.op import Argument, op_class
from moec.passes.cleanup import with_operands

Values = tuple[Value, ...]


def outside(module: Module, function: Function, values: Values) -> list[tuple[Function, Values]]:
    """The same values in each function that runs ``function``; nothing unless all are invariants of it."""
    numbers = [_invariant(module, function, v) for v in values]
    if None in numbers or function.name in ENTRIES:
        return []
    return [(f, tuple(op.operands[n] for n in numbers)) for f, op in module.callers(function.name)]  # type: ignore[index,misc]


def _invariant(module: Module, function: Function, value: Value) -> int | None:
    """Which operand of the loops that run ``function`` the argument ``value`` is; none if it is carried."""
    if not isinstance(value, Argument):
        return None
    number = function.args.index(value) - 1
    return number if all(number >= op.attrs["carry"] for _, op in module.callers(function.name)) else None


def everywhere(module: Module, function: Function, values: Values, holds: Callable[[Values], bool]) -> bool:
    """Whether ``holds`` is true of the values here, or of what they are wherever the function is run."""
    if holds(values):
        return True
    above = outside(module, function, values)
    return bool(above) and all(everywhere(module, *each, holds) for each in above)


def sources(module: Module, function: Function, value: Value) -> Iterator[Value]:
    """What ``value`` is in the outermost functions that pass it on."""
    above = outside(module, function, (value,))
    if not above:
        yield value
    for outer, (passed,) in above:
        yield from sources(module, outer, passed)


def is_prefix_sum(module: Module, function: Function, offsets: Value, lengths: Value) -> bool:
    """Whether ``offsets`` is ``prefix_sum(lengths)``, here or wherever both come from."""

    def holds(values: Values) -> bool:
        op = getattr(values[0], "op", None)
        return op is not None and op.name == "prefix_sum" and op.operands[0] is values[1]

    return everywhere(module, function, (offsets, lengths), holds)


def hoist(
    module: Module,
    function: Function,
    op_name: str,
    operands: Sequence[Value],
    attrs: dict[str, Any],
    names: Sequence[str],
    before: Op | None = None,
    same: Callable[[Op], bool] | None = None,
) -> Values:
    """The results of an op, computed as far outside as its operands are known, one op for all who ask alike.

    ``same`` says of an op with these operands whether it serves; by default, one with these attributes does.
    """
    above = outside(module, function, tuple(operands))
    if not above:
        made = next((op for op in function.ops_named(op_name) if _serves(op, operands, attrs, same)), None)
        if made is None:
            made = function.create(op_class(op_name)(operands, attrs), names, before)
        return made.results
    results = [hoist(module, outer, op_name, given, attrs, names, None, same) for outer, given in above]
    return tuple(_pass_in(module, function, names[i], [r[i] for r in results]) for i in range(len(names)))


def _serves(
    op: Op, operands: Sequence[Value], attrs: dict[str, Any], same: Callable[[Op], bool] | None
) -> bool:
    if op.operands != tuple(operands):
        return False
    return same(op) if same is not None else all(op.attrs[key] == value for key, value in attrs.items())


def _pass_in(module: Module, function: Function, name: str, values: list[Value]) -> Value:
    """The argument by which ``function`` knows ``values``, one for each loop that runs it."""
    callers = module.callers(function.name)
    for number, arg in enumerate(function.args[1:]):
        carried = any(number < op.attrs["carry"] for _, op in callers)
        if not carried and all(op.operands[number] is v for (_, op), v in zip(callers, values, strict=True)):
            return arg
    for (caller, op), value in zip(callers, values, strict=True):
        with_operands(caller, op, [*op.operands, value])
    return function.add_argument(name, values[0].type)
