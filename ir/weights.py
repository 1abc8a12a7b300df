"""The load-time half of a module: ``@weights`` and, beside each body @f, a function @weights.f.

``@weights`` runs them over the same layers and experts, in the same scopes, as the entry functions run the bodies. An
entry's own parameters are handled in ``@weights`` itself. A parameter that no ``bind`` makes is the checkpoint's tensor
of that name.
"""

from __future__ import annotations

from moec.ir.graph import ENTRIES, Function, Module
from moec.ir.op import Op
from moec.ir.ops.control import Loop
from moec.ir.ops.weights import Bind
from moec.ir.types import IndexType

WEIGHTS = "weights"


def weights_name(body: str) -> str:
    return WEIGHTS if body in ENTRIES else f"{WEIGHTS}.{body}"


def weights_of(module: Module, body: str) -> Function:
    """The load-time function of ``body``; made, and run wherever ``body`` is, at the first request."""
    name = weights_name(body)
    if name in module:
        return module[name]
    if name == WEIGHTS:
        function = module.add(Function(WEIGHTS))
        function.ret()
        return function
    callers = module.callers(body)
    function = module.add(Function(name, [(module[body].args[0].name, IndexType())]))
    function.ret()
    for caller, op in callers:
        mirror(module, caller.name, op)
    return function


def mirror(module: Module, caller: str, loop: Op) -> None:
    """Runs the load-time function of ``loop``'s body as ``loop`` runs the body."""
    attrs = loop.attrs | {"callee": weights_name(loop.attrs["callee"]), "carry": 0}
    outer = weights_of(module, caller)
    outer.create(type(loop)((), attrs, loop.loc))


def unmirror(module: Module, caller: str, loop: Op) -> None:
    """Undoes ``mirror`` once ``loop`` is gone; the load-time function goes with its last run."""
    callee, outer = weights_name(loop.attrs["callee"]), module.functions.get(weights_name(caller))
    for op in outer.ops if outer else []:
        if isinstance(op, Loop) and (op.callee, op.scope) == (callee, loop.attrs["scope"]):
            outer.erase(op)  # type: ignore[union-attr]
    if callee in module and not module.callers(callee):
        module.remove(callee)


def bindings(function: Function) -> dict[str, Bind]:
    """What ``function`` binds, by parameter."""
    return {op.param: op for op in function.ops if isinstance(op, Bind)}
