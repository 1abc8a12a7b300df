"""Batch invariance: whether a row's bits depend on the rest of the batch, and what it costs that they don't.

A product sums along K in the order that its tile gives, so a schedule that depends on M is a sum that
depends on M. ``batch_invariant`` builds give each product one schedule, and with it one order along K and
one number of parts that K is split into. What then remains are the kernels that aren't moec's: PyTorch's
products and attention pick theirs by shape, and its reductions may be cut into parts by shape.
"""

from __future__ import annotations

from typing import Any

from moec.codegen.choosing import pick, prices
from moec.codegen.kernels import select
from moec.codegen.kernels.triton import GluonKernel, TritonKernel
from moec.codegen.schedules import Problem
from moec.ir.devices import GPUS
from moec.ir.graph import Module
from moec.ir.op import Op
from moec.ir.ops.control import Loop, Return
from moec.ir.ops.experts import taken_apart
from moec.ir.ops.weights import Bind
from moec.ir.weights import WEIGHTS

# PyTorch's kernels that move values, count, or round each result of +, ·, / and max exactly: on any device a
# result depends on its own operands.
# fmt: off
EXACT = frozenset({
    "add", "broadcast", "cache_read", "cache_write", "cast", "clamp", "concat", "dequant", "embedding",
    "expert_slots", "gather_rows", "local_experts", "merge_rows", "mul", "prefix_sum", "quant",
    "refine", "reshape", "rope", "scaled", "sort_by_expert", "split", "split_batch", "stack",
    "take_rows", "zeros_like",
})
# fmt: on
# Functions of one element at a time. On GPUs all elements run one code; a CPU has another for those that
# don't fill a vector.
POINTWISE = frozenset({"rope_table", "sigmoid", "swiglu"})


def report(module: Module, target: str) -> dict[str, Any]:
    """What a manifest says of a batch-invariant build.

    ``not``: the ops, by kernel, whose results may depend on the batch all the same. ``cost``: for each
    product its schedule, and by rows an expert how many times as long it takes (by the model, or measured).
    ``unknown``: the products whose cost no model says, as Gluon emits them by name.
    """
    kernels: dict[str, set[str]] = {}
    products: dict[Problem, list[str]] = {}
    unknown: list[str] = []
    for op in computed(module):
        record = select(op, target)
        if not (record.row_by_row or op.name in EXACT or (op.name in POINTWISE and target in GPUS)):
            kernels.setdefault(record.name, set()).add(op.name)
        if isinstance(record, GluonKernel):
            unknown += [op.name] * (op.name not in unknown)
        elif isinstance(record, TritonKernel) and record.problem is not None:
            found = products.setdefault(record.problem(op), [])
            found += [op.name] * (op.name not in found)
    return {
        "not": {name: sorted(ops) for name, ops in sorted(kernels.items())},
        "cost": [_price(problem, ops, target) for problem, ops in products.items()],
        "unknown": unknown,
    }


def warning(found: dict[str, Any]) -> str:
    """For people: what of ``report`` breaks the promise; empty where nothing does."""
    names = sorted(found["not"])
    if not names:
        return ""
    return (
        "batch_invariant holds for moec's kernels only: a row's bits may depend on its batch in "
        f"{', '.join(names)}"
    )


def computed(module: Module) -> list[Op]:
    """The ops of a step that a kernel emits, in order; of one that has parts, these: their kernels."""
    return [
        part
        for function in module
        if function.name.split(".")[0] != WEIGHTS
        for op in function.ops
        if not isinstance(op, Loop | Return | Bind)
        for part in taken_apart(op)
    ]


def _price(problem: Problem, ops: list[str], target: str) -> dict[str, Any]:
    ((_, schedule),) = pick(problem, GPUS[target])
    return {
        "ops": ops,
        "problem": problem.text,
        "schedule": schedule.text,
        "times": [[rows, round(ratio, 4)] for rows, ratio in prices(problem, GPUS[target])],
    }
