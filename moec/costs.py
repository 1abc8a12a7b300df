"""What a module costs, as data: the figures behind ``moec show --cost`` and its JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.printing.str import StrPrinter

from moec.ir import Module, Op
from moec.ir.cost import expert_slots, function_cost, op_cost
from moec.ir.graph import NEW_TOKENS
from moec.ir.ops.control import Loop
from moec.ir.ops.moe import Choices, ExpertProduct
from moec.ir.roofline import Costs, Price, Runs, dtype_of, functions_run
from moec.ir.weights import WEIGHTS

TILE = 64  # rows, where no schedule says otherwise


def entries(module: Module, sizes: Mapping[str, float]) -> list[str]:
    """The functions that a step of these sizes runs: ``@decode`` where there is one and it takes so few."""
    few = sizes.get("N", 0) <= module.bounds.get(NEW_TOKENS, 1) * sizes.get("B", 1)
    step = "decode" if "decode" in module and few else "step"
    return [name for name in (step, "forward", "head") if name in module] or [next(iter(module)).name]


def report(costs: Costs, tile: int | None = None) -> dict[str, Any]:
    """All figures of a module at ``costs``'s sizes, as JSON takes them: seconds, bytes, FLOPs."""
    device = costs.device
    return {
        "module": costs.module.name,
        "device": {
            "name": device.name,
            "stands_for": device.stands_for,
            "bandwidth": device.bandwidth,
            "matmul_flops": device.matmul_flops,
            "launch_s": device.launch_s,
        },
        "at": dict(costs.sizes),
        "routing": str(costs.routing),
        "routers": list(routers(costs, tile)),
        "entries": {name: entry_report(costs, name) for name in entries(costs.module, costs.sizes)},
    }


def entry_report(costs: Costs, entry: str) -> dict[str, Any]:
    """Each function that the entry runs, with its ops (a loop's with all that it runs), and the totals."""
    total = costs.function(entry)
    functions = []
    for runs in functions_run(costs, entry).values():
        ops = [op_report(runs.costs, op) for op in runs.costs.module[runs.name].ops]
        once, own = runs.costs.function(runs.name), runs.own
        functions.append(
            {
                "name": runs.name,
                "runs": runs.launched,
                "working_runs": runs.working,
                "ops": ops,
                "once": figures(once),
                "own": figures(own),
                "share": own.seconds / total.seconds if total.seconds else 0.0,
            }
        )
    return {"functions": functions, "total": figures(total)}


def op_report(costs: Costs, op: Op) -> dict[str, Any]:
    price = costs.op(op)
    name = op.results[0].text if op.results else ""
    found = {"value": name, "op": op.name, **figures(price)}
    if isinstance(op, Loop):
        return found | {"callee": op.callee, op.range_name: str(op.range)}
    by_bytes = price.bytes / costs.device.bandwidth
    return found | {
        "dtype": dtype_of(op),
        "bound": "" if not price.seconds else "bytes" if price.seconds == by_bytes else "FLOPs",
        "kernel": op.annotations.get("kernel"),
    }


def figures(price: Price) -> dict[str, Any]:
    return {
        "launches": price.launches,
        "flops": price.flops,
        "bytes": price.bytes,
        "seconds": price.seconds,
    }


@dataclass(frozen=True)
class Symbolic:
    """One op's cost in the module's symbols."""

    value: str
    op: str
    launches: Any
    flops: str
    bytes: str


def formulas(module: Module, function: str) -> list[Symbolic]:
    """Each op's cost, and last the function's, as formulas."""
    rows = []
    for op in module[function].ops:
        cost = op_cost(op, module)
        label = f"{op.name} @{op.callee}" if isinstance(op, Loop) else op.name
        name = op.results[0].text if op.results else ""
        rows.append(Symbolic(name, label, cost.launches, formula(cost.flops), formula(cost.bytes)))
    total = function_cost(module[function], module)
    rows.append(Symbolic("", "total", total.launches, formula(total.flops), formula(total.bytes)))
    return rows


def formula(amount: Any) -> str:
    """``10240*N + 512`` and the like: whole numbers without a point, others to six digits."""
    return str(_Printer().doprint(sympy.expand(sympy.sympify(amount))))


class _Printer(StrPrinter):
    def _print_Float(self, expr: sympy.Float) -> str:
        return f"{float(expr):.0f}" if expr == int(expr) else f"{float(expr):.6g}"


def routers(costs: Costs, tile: int | None = None) -> Iterator[dict[str, Any]]:
    """The ``Load`` of each different router of a module, and how many experts more every token takes.

    ``tile`` overrides what the kernels' schedules say.
    """
    seen: set[Any] = set()
    for function in costs.module:
        if function.name.split(".")[0] == WEIGHTS:
            continue
        for op in function.ops:
            if (router := router_of(op, costs)) is None:
                continue
            experts, k, tokens, shared = router
            rows = tokens * (k + shared) / (experts + shared)
            height = tile or scheduled_tile(op.annotations.get("schedule"), rows) or TILE
            if (router, height) not in seen:
                seen.add((router, height))
                yield {**costs.routing.load(experts, k, tokens, height).__dict__, "shared": shared}


def router_of(op: Op, costs: Costs) -> Choices | None:
    """What is chosen for an op that takes experts' rows, in numbers; None for all others."""
    if isinstance(op, ExpertProduct) and (choices := op.choices()) is not None:
        experts, k, tokens, shared = choices
    elif isinstance(op, Loop) and op.callee in costs.module:
        chosen = expert_slots(costs.module[op.callee])
        if chosen is None:
            return None
        experts, (tokens, k), shared = len(op.range), chosen.id.type.shape, 0
    else:
        return None
    return Choices(int(experts), int(costs.number(k)), int(costs.number(tokens)), shared)


def scheduled_tile(schedule: str | None, rows: float) -> int | None:
    """The tile's height of a schedule annotation, ``<4 rows: swapped 16x128x64 w4 s4; rows 128x...``, for an
    expert's average rows; None where it says none.
    """
    for part in (schedule or "").split(";"):
        bound = re.search(r"<\s*([\d.]+)", part)
        shape = re.search(r"(\d+)x\d+x\d+", part)
        if shape and (bound is None or rows < float(bound[1])):
            return int(shape[1])
    return None


def seconds_of_launches(costs: Costs, price: Price) -> float:
    """What launching alone takes where nothing hides it."""
    return price.launches * costs.device.launch_s


__all__ = ["Costs", "Runs", "entries", "formulas", "report", "routers", "seconds_of_launches"]
