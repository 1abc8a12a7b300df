"""The tensors that a module takes and makes, for the manifest: patterns with the ranges of their ``*``."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

from moec.ir.attrs import Range
from moec.ir.graph import ENTRIES, Function, Module
from moec.ir.op import OpResult, Param, Value
from moec.ir.ops.hash_route import HashRoute
from moec.ir.ops.weights import Bind, Stack
from moec.ir.types import TensorType
from moec.ir.weights import WEIGHTS, bindings, bodies_of

# What only moves elements, or writes them in another way.
MOVES = {"stack", "concat", "split", "reshape", "cast", "scaled", "quant", "dequant", "refine"}

# Of these, those that give another view of the same memory.
VIEWS = ("reshape", "split")

Scope = tuple[str, tuple[Range, ...]]

# What a parameter is that an op takes as this operand; any other is a matrix.
KINDS = {
    ("rms_norm", "w"): "norm",
    ("add_rms_norm", "w"): "norm",
    ("add_rms_norm_and_quant", "w"): "norm",
    ("norm_rope", "w"): "norm",
    ("kv_cache_write", "w"): "norm",
    ("latent_cache_write", "w"): "norm",
    ("linear", "bias"): "bias",
    ("hash_route", "table"): "experts",
    ("route", "bias"): "bias",
    ("route_sort", "bias"): "bias",
    ("route_sort_and_quant", "bias"): "bias",
    ("routed_experts", "bias"): "bias",
    ("scaled", "scale"): "scale",
}


def manifest_tensors(module: Module) -> dict[str, list[dict[str, Any]]]:
    """``parameters``: what the kernels use; ``checkpoint``: what is read for it.

    Each entry has name (``model.layers.*.mlp.gate.weight``), ranges (first and last of each ``*``), dtype,
    shape (and scale, the shape of its scales, of a scaled one) and kind: ``norm``, ``bias``, ``scale``,
    ``experts`` (numbers ``below`` one) or ``matrix``, by which random weights are drawn. A parameter that is
    part of another one's memory is marked ``view``.
    """
    used = {key: entry for name in ENTRIES if name != WEIGHTS for key, entry in _params(module, name)}
    bound = set(_bound(module))
    loaded, views = dict(_params(module, WEIGHTS)), set(_views(module, used.keys()))
    taken = loaded | {key: entry for key, entry in used.items() if key not in bound and key not in loaded}
    return {
        "parameters": [
            entry | {"bound": key in bound} | ({"view": True} if key in views else {})
            for key, entry in used.items()
        ],
        "checkpoint": list(taken.values()),
    }


def _scopes(module: Module, entry: str) -> Iterator[tuple[Function, Scope]]:
    """Each function that ``entry`` reaches, once for each scope it runs in."""
    if entry not in module:
        return
    queue: deque[tuple[Function, Scope]] = deque([(module[entry], ("", ()))])
    while queue:
        function, (prefix, ranges) = queue.popleft()
        yield function, (prefix, ranges)
        for op in function.loops():
            inner_ranges = (*ranges, op.range) if "*" in op.scope else ranges
            scope = f"{prefix}{op.scope}." if op.scope else prefix
            queue.append((module[op.callee], (scope, inner_ranges)))


def _params(module: Module, entry: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    for function, (prefix, ranges) in _scopes(module, entry):
        for param in function.params.values():
            family = [op.experts for op in function.users(param) if isinstance(op, Stack)]
            all_ranges = (*ranges, *family[:1])
            if isinstance(param.type, TensorType):
                yield (
                    (prefix + param.name, all_ranges),
                    {
                        "name": prefix + param.name,
                        "ranges": [[r.first, r.last] for r in all_ranges],
                        "dtype": str(param.type.dtype),
                        "shape": list(param.type.shape),
                        **({"scale": list(param.type.scale_shape)} if param.type.scale else {}),
                        "kind": _kind(module, function, param),
                        **_below(function, param),
                    },
                )


def _bound(module: Module) -> Iterator[Any]:
    for function, (prefix, ranges) in _scopes(module, WEIGHTS):
        for name in bindings(function):
            yield (prefix + name, ranges)


def _views(module: Module, used: Collection[Any]) -> Iterator[Any]:
    """Parameters that are cut from another one's tensor, which kernels use as well."""
    for function, (prefix, ranges) in _scopes(module, WEIGHTS):
        made = bindings(function)
        whole = {op.x: name for name, op in made.items()}
        for name, op in made.items():
            x = op.x
            while isinstance(x, OpResult) and x.op.name in VIEWS:
                x = x.op.operands[0]
            of = whole.get(x) or (x.name if isinstance(x, Param) else "")
            if x is not op.x and (prefix + of, ranges) in used:
                yield (prefix + name, ranges)


def _below(function: Function, param: Param) -> dict[str, int]:
    """Of a router's table: how many experts its entries choose among."""
    routers = [op for op in function.users(param) if isinstance(op, HashRoute)]
    return {"below": routers[0].logits.type.shape[1]} if routers else {}


def _kind(module: Module, function: Function, value: Value) -> str:
    """By its use, followed through what only moves elements: passes must not change what a seed draws."""
    for op, number in function.uses(value):
        spec = op.operand_specs[min(number, len(op.operand_specs) - 1)]
        if kind := KINDS.get((op.name, spec.name)):
            return kind
        if op.name in MOVES:
            after: list[tuple[Function, Value]] = [(function, res) for res in op.results]
        elif isinstance(op, Bind):
            bodies = bodies_of(module, function.name)
            after = [(f, f.params[op.param]) for f in bodies if op.param in f.params]
        else:
            continue
        for kind in (_kind(module, f, v) for f, v in after):
            if kind != "matrix":
                return kind
    return "matrix"
