"""How passes change weights: by IR in the load-time functions (see ``moec.ir.weights``).

A *holder* is the function whose parameters are meant; its load-time function makes them from the
checkpoint's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from moec.ir import Function, Module, Op, TensorType, Value
from moec.ir.builder import stem
from moec.ir.op import OpResult, Param, op_class
from moec.ir.ops.control import Loop
from moec.ir.ops.weights import Bind
from moec.ir.weights import WEIGHTS, bindings, bodies_of, weights_name, weights_of
from moec.passes.cleanup import roots


def loaded(module: Module, holder: Function, param: Param) -> Value:
    """What ``param`` is in the load-time function: the value bound to it, or the checkpoint's tensor."""
    load = weights_of(module, holder.name)
    bound = bindings(load).get(param.name)
    return load.param(param.name, param.type) if bound is None else bound.x


def emit(module: Module, holder: Function, op_name: str, operands: list[Value], attrs: Any, *out: str) -> Op:
    """An op of the load-time function; the one that is there already where it's the same."""
    load = weights_of(module, holder.name)
    new = op_class(op_name)(operands, attrs)
    for op in _same_operands(load, new):
        if (op.operands, op.attrs) == (new.operands, new.attrs):
            return op
    return load.create(new, out)


def _same_operands(load: Function, new: Op) -> list[Op]:
    """Ops called as ``new`` that use its first operand, or without operands all that are called so."""
    first = next((v for v in new.operands if v is not None), None)
    return load.ops_named(new.name) if first is None else [u for u in load.users(first) if u.name == new.name]


def bind(module: Module, holder: Function, value: Value, name: str) -> Param:
    """The parameter of ``holder`` that ``value`` becomes: called ``name``, unless it is bound already."""
    load = weights_of(module, holder.name)
    for known in load.users(value):
        if isinstance(known, Bind):
            return holder.param(known.param, value.type)
    load.create(op_class("bind")([value], {"param": name}))
    return holder.param(name, value.type)


def fresh_name(module: Module, holder: Function, name: str) -> str:
    """``name``, or ``name.1``, ... where a parameter is called so already."""
    taken = {n for f in bodies_of(module, weights_name(holder.name)) for n in f.params}
    if (load := module.functions.get(weights_name(holder.name))) is not None:
        taken |= {*load.params, *bindings(load)}
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}.{number}"
    return candidate


# Stacking. An op on one expert's tensors, as the same op on all of them: what a new first axis changes.
Lift = Callable[[Op, int], dict[str, Any]]


def _same(op: Op, experts: int) -> dict[str, Any]:
    return dict(op.attrs)


def _shift_axis(op: Op, experts: int) -> dict[str, Any]:
    axis = op.attrs["axis"]
    return op.attrs | {"axis": axis if axis < 0 else axis + 1}


def _shift_shape(op: Op, experts: int) -> dict[str, Any]:
    return op.attrs | {"shape": (experts, *op.attrs["shape"])}


LIFTS: dict[str, Lift] = {
    "cast": _same,
    # These work over leading axes.
    **dict.fromkeys(("scaled", "quant", "dequant", "refine"), _same),
    "concat": _shift_axis,
    "split": _shift_axis,
    "reshape": _shift_shape,
}


def family(loop: Loop, param: Param) -> str:
    """The name of an expert's parameter as the loop's holder sees it, ``*`` for the expert."""
    return f"{loop.scope}.{param.name}"


def bound_outside(module: Module, function: str, name: str) -> str:
    """Why what ``function`` sees isn't all there is to say of its parameter's loading; "" where it is.

    A function around it may bind the parameter for one layer or one expert only.
    """
    for caller, loop in module.callers(function):
        scope = f"{loop.attrs['scope']}." if loop.attrs["scope"] else ""
        load = module.functions.get(weights_name(caller.name))
        bound = bindings(load) if load is not None else {}
        if load is not None and bound and any(map(_regex(scope + name).fullmatch, bound)):
            return f"${name} is bound in @{load.name}, for some of the runs"
        if why := bound_outside(module, caller.name, scope + name):
            return why
    return ""


def why_unstackable(module: Module, loop: Loop, param: Param) -> str:
    """Why the experts' ``param`` can't be made as one stacked tensor; "" where it can."""
    if why := bound_outside(module, loop.callee, param.name):
        return why
    todo = [_bound_in_body(module, loop, param)]
    while todo:
        value = todo.pop()
        if isinstance(value, OpResult):
            if value.op.name not in LIFTS:
                return f"{param.text} is loaded by {value.op.name}, not known to work on stacked tensors"
            todo += value.op.operands
        elif value is not None and not isinstance(value, Param):
            return f"{param.text} is loaded with the expert's number"
    return ""


def stack(module: Module, holder: Function, loop: Loop, param: Param) -> Value:
    """All experts' ``param``, as the holder's load-time function makes it from their checkpoint tensors."""
    value = _bound_in_body(module, loop, param)
    return _stack(module, holder, loop, param if value is None else value)


def _stack(module: Module, holder: Function, loop: Loop, value: Value) -> Value:
    # A value's name starts with a letter; a parameter's need not.
    out = stem(value.name.removesuffix(".weight")).lstrip("0123456789.-*") or "w"
    if isinstance(value, Param):
        members = weights_of(module, holder.name).param(family(loop, value), value.type)
        return emit(module, holder, "stack", [members], {"experts": loop.range}, out).results[0]
    if not isinstance(value, OpResult):
        raise TypeError(f"{value.text} can't be stacked")  # why_unstackable has said so
    operands = [_stack(module, holder, loop, v) for v in value.op.operands if v is not None]
    attrs = LIFTS[value.op.name](value.op, len(loop.range))
    return emit(module, holder, value.op.name, operands, attrs, out).results[value.index]


def _bound_in_body(module: Module, loop: Loop, param: Param) -> Value | None:
    load = module.functions.get(weights_name(loop.callee))
    bound = bindings(load).get(param.name) if load is not None else None
    return None if bound is None else bound.x


# Dropping.
def drop_dead_bindings(module: Module) -> bool:
    """Removes every ``bind`` of a parameter that no function uses any more."""
    changed = False
    for load in list(module):
        if load.name == WEIGHTS:
            bodies = roots(module) - {WEIGHTS}
        elif load.name.startswith(f"{WEIGHTS}."):
            bodies = {f.name for f in bodies_of(module, load.name)}
        else:
            continue
        bound = bindings(load)
        if not bound:
            continue
        used = {name for body in bodies for name in used_parameters(module, body)}
        families = [_regex(name) for name in used if "*" in name]
        for name, op in bound.items():
            if name not in used and not any(pattern.fullmatch(name) for pattern in families):
                load.erase(op)
                changed = True
    return changed


def used_parameters(module: Module, body: str) -> set[str]:
    """Names of the parameters that ``body`` and what it runs use, in its scope; ``*`` is a loop's number."""
    if body not in module:
        return set()
    function = module[body]
    names = {name for name, param in function.params.items() if function.uses(param)}
    for op in function.loops():
        scope = f"{op.scope}." if op.scope else ""
        names |= {scope + name for name in used_parameters(module, op.callee)}
    return names


def _regex(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", r"\d+"))


def stacked_type(param: Param, experts: int) -> TensorType:
    """``param`` of all experts, one behind the other along a new first axis."""
    if not isinstance(param.type, TensorType):
        raise TypeError(f"{param.text} is no tensor")
    return param.type.with_(shape=(experts, *param.type.shape))
