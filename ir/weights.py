"""The load-time half of a module: ``@weights`` and, beside each body @f, a function @weights.f.

``@weights`` runs them over the same layers and experts, in the same scopes, as the entry functions run the
bodies. An entry's own parameters are handled in ``@weights`` itself. A parameter that no ``bind`` makes is
the checkpoint's tensor of that name.
"""

from __future__ import annotations

from typing import Any

from moec.ir.graph import ENTRIES, Function, Module
from moec.ir.op import Op
from moec.ir.ops.control import Loop
from moec.ir.ops.weights import Bind
from moec.ir.types import IndexType

WEIGHTS = "weights"


# What a body is called that differs from @BODY in what it computes for @decode, not in its parameters.
DECODE = "decode."


def decode_name(body: str) -> str:
    return f"{DECODE}{body}"


def weights_name(body: str) -> str:
    """The load-time function of a body; that of its form for @decode is the same."""
    return WEIGHTS if body in ENTRIES else f"{WEIGHTS}.{body.removeprefix(DECODE)}"


def weights_of(module: Module, body: str) -> Function:
    """The load-time function of ``body``; made, and run wherever ``body`` is, at the first request."""
    name = weights_name(body)
    if name in module:
        return module[name]
    if name == WEIGHTS:
        function = module.add(Function(WEIGHTS))
        function.ret()
        return function
    callers = [call for form in forms(body) for call in module.callers(form)]
    function = module.add(Function(name, [(module[body].args[0].name, IndexType())]))
    function.ret()
    for caller, op in callers:
        mirror(module, caller.name, op)
    return function


def mirror(module: Module, caller: str, loop: Op) -> None:
    """Runs the load-time function of ``loop``'s body as ``loop`` runs the body.

    Entries that run a body alike (``step`` and ``decode``) share one load-time run: they share ``@weights``.
    """
    outer = weights_of(module, caller)
    if not any(_mirrors(op, loop) for op in _runs(module, outer, loop)):
        attrs = loop.attrs | {"callee": weights_name(loop.attrs["callee"]), "carry": 0}
        outer.create(type(loop)((), attrs, loop.loc))


def unmirror(module: Module, caller: str, loop: Op) -> None:
    """Undoes ``mirror`` once ``loop`` is gone and nothing runs the body alike.

    The body's last run takes the load-time function along.
    """
    body, name = loop.attrs["callee"], weights_name(caller)
    outer = module.functions.get(name)
    others = (op for form in forms(body) for f, op in module.callers(form) if weights_name(f.name) == name)
    if any(_alike(op) == _alike(loop) for op in others):
        return
    for op in _runs(module, outer, loop) if outer else []:
        if _mirrors(op, loop):
            outer.erase(op)  # type: ignore[union-attr]
    callee = weights_name(body)
    if callee in module and not module.callers(callee):
        module.remove(callee)


def forms(body: str) -> tuple[str, str]:
    """``body`` and its form for @decode, or the other way round."""
    plain = body.removeprefix(DECODE)
    return plain, decode_name(plain)


def _runs(module: Module, outer: Function, loop: Op) -> list[Op]:
    """The ops of ``outer`` that run the load-time function of ``loop``'s body."""
    return [op for f, op in module.callers(weights_name(loop.attrs["callee"])) if f is outer]


def _mirrors(op: Op, loop: Op) -> bool:
    """Whether ``op`` is the load-time twin of ``loop``: same numbers, same scope."""
    return isinstance(op, Loop) and _alike(op, op.callee) == _alike(loop)


def _alike(loop: Op, load: str = "") -> tuple[Any, ...]:
    """What runs of one body have in common with that of its load-time function, ``load``."""
    load = load or weights_name(loop.attrs["callee"])
    return type(loop), load, loop.attrs["scope"], loop.range  # type: ignore[attr-defined]


def bindings(function: Function) -> dict[str, Bind]:
    """What ``function`` binds, by parameter."""
    return {op.param: op for op in function.ops_named(Bind.name) if isinstance(op, Bind)}


def bodies_of(module: Module, load: str) -> list[Function]:
    """The functions whose parameters the load-time function ``load`` makes: entries, or forms of a body."""
    names = (
        [f for f in ENTRIES if f != WEIGHTS] if load == WEIGHTS else forms(load.removeprefix(f"{WEIGHTS}."))
    )
    return [module[name] for name in names if name in module]
