"""FLOPs, compulsory bytes and launches of ops, bodies and whole functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moec.ir.graph import Function, Module
from moec.ir.op import Cost, Op, Param
from moec.ir.ops.control import Loop
from moec.ir.ops.moe import ExpertSlots
from moec.ir.routing import active
from moec.ir.types import TensorType, symbol


def op_cost(op: Op, module: Module | None = None) -> Cost:
    """The cost of an op; a loop costs its body, once for each number of its range."""
    if not isinstance(op, Loop):
        return replace(op.cost(), launches=op.launches)
    if module is None or op.callee not in module:
        return Cost()
    body, times = module[op.callee], len(op.range)
    cost = function_cost(body, module)
    if (chosen := expert_slots(body)) is None:
        return cost * times
    running, rows = rows_each(chosen, times)
    spent = cost.at({symbol(chosen.rows): rows}) * running
    return replace(spent, launches=cost.launches * times)


def function_cost(function: Function, module: Module | None = None) -> Cost:
    total = Cost()
    for op in function.ops:
        total += op_cost(op, module)
    return total


def expert_slots(body: Function) -> ExpertSlots | None:
    """The op by which the body of a loop over experts finds its expert's rows."""
    return next((op for op in body.ops if isinstance(op, ExpertSlots)), None)


def rows_each(chosen: ExpertSlots, experts: int) -> tuple[Any, Any]:
    """The experts that have rows, and how many each of these has on average: others needn't move a weight."""
    tokens, k = chosen.id.type.shape
    running = active(experts, k, tokens)
    return running, tokens * k / running


def parameters(module: Module, function: str) -> int:
    """Elements of all parameters that ``function`` uses, its bodies included; a shared one counts once."""
    sizes: dict[str, int] = {}

    def walk(name: str, prefixes: list[str]) -> None:
        body = module[name]
        for param in body.params.values():
            for prefix in prefixes:
                sizes[prefix + param.name] = int(param_elements(param))
        for op in body.ops:
            if isinstance(op, Loop):
                inner = [p + op.prefix(n) for p in prefixes for n in op.range]
                walk(op.callee, inner)

    walk(function, [""])
    return sum(sizes.values())


def param_elements(param: Param) -> Any:
    return param.type.numel if isinstance(param.type, TensorType) else 0


def short(value: float, unit: str) -> str:
    """Three significant digits with a decimal prefix: ``15.0GF``, ``66.6MB``."""
    if value < 999.5:
        return f"{value:.0f}{unit}"
    digits, exponent = f"{value:.2e}".split("e")
    thousands, shift = divmod(int(exponent), 3)
    thousands, shift = (thousands, shift) if thousands <= 4 else (4, int(exponent) - 12)
    scaled = float(digits) * 10**shift
    return f"{scaled:.{max(2 - shift, 0)}f}{' KMGT'[thousands]}{unit}"


def describe(cost: Cost, values: dict[Any, Any]) -> list[str]:
    """``["15.0GF", "66.6MB"]`` at these values of the symbols; what stays symbolic or is zero is left out."""
    at = cost.at(values)
    found = []
    for amount, unit in ((at.flops, "F"), (at.bytes, "B")):
        if not amount.free_symbols and amount > 0:
            found.append(short(float(amount), unit))
    return found
