"""The tensors that a module takes and makes, as the manifest lists them: name patterns with the ranges of their ``*``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moec.ir.attrs import Range
from moec.ir.graph import ENTRIES, Function, Module
from moec.ir.op import Param
from moec.ir.ops.control import Loop
from moec.ir.ops.weights import Bind, Stack
from moec.ir.types import TensorType
from moec.ir.weights import WEIGHTS

Scope = tuple[str, tuple[Range, ...]]


def manifest_tensors(module: Module) -> dict[str, list[dict[str, Any]]]:
    """``parameters``: what the kernels use; ``checkpoint``: what is read for it.

    Each entry has name (``model.layers.*.mlp.gate.weight``), ranges (first and last of each ``*``), dtype, shape, and
    kind: ``norm``, ``bias``, ``scale`` or ``matrix``, by which random weights are drawn.
    """
    used = {key: entry for name in ENTRIES if name != WEIGHTS for key, entry in _params(module, name)}
    bound = set(_bound(module))
    loaded = {key: entry for key, entry in _params(module, WEIGHTS)}
    taken = loaded | {key: entry for key, entry in used.items() if key not in bound and key not in loaded}
    return {
        "parameters": [entry | {"bound": key in bound} for key, entry in used.items()],
        "checkpoint": list(taken.values()),
    }


def _scopes(module: Module, entry: str) -> Iterator[tuple[Function, Scope]]:
    """Each function that ``entry`` reaches, once for each scope it runs in."""
    if entry not in module:
        return
    stack: list[tuple[Function, Scope]] = [(module[entry], ("", ()))]
    while stack:
        function, (prefix, ranges) = stack.pop(0)
        yield function, (prefix, ranges)
        for op in function.ops:
            if isinstance(op, Loop):
                inner_ranges = (*ranges, op.range) if "*" in op.scope else ranges
                stack.append((module[op.callee], (f"{prefix}{op.scope}.", inner_ranges)))


def _params(module: Module, entry: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    for function, (prefix, ranges) in _scopes(module, entry):
        for param in function.params.values():
            family = [op.experts for op in function.ops if isinstance(op, Stack) and op.family is param]
            all_ranges = (*ranges, *family[:1])
            if isinstance(param.type, TensorType):
                yield (
                    (prefix + param.name, all_ranges),
                    {
                        "name": prefix + param.name,
                        "ranges": [[r.first, r.last] for r in all_ranges],
                        "dtype": str(param.type.dtype),
                        "shape": list(param.type.shape),
                        "kind": _kind(function, param),
                    },
                )


def _bound(module: Module) -> Iterator[Any]:
    for function, (prefix, ranges) in _scopes(module, WEIGHTS):
        for op in function.ops:
            if isinstance(op, Bind):
                yield (prefix + op.param, ranges)


def _kind(function: Function, param: Param) -> str:
    for op, number in function.uses(param):
        if op.name == "rms_norm":
            return "norm"
        if op.name in ("linear", "route") and op.operand_specs[number].name == "bias":
            return "bias"
        if op.name == "dequant" and number == 1:
            return "scale"
    return "matrix"
