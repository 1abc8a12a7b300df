"""FLOPs, compulsory bytes and launches of ops, bodies and whole functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from moec.ir.graph import Function, Module
from moec.ir.op import Cost, Op, Param
from moec.ir.ops.control import Loop
from moec.ir.ops.moe import ExpertProduct, ExpertSlots
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


def parameters(module: Module, *functions: str) -> int:
    """Elements of all parameters that ``functions`` use, their bodies included; a shared one counts once."""
    return sum(int(param_elements(param)) for param, _ in _parameters(module, functions).values())


def active_parameters(module: Module, *functions: str) -> int:
    """As ``parameters``, but of a layer's experts only as many as a token chooses."""
    uses = _parameters(module, functions).values()
    return round(sum(int(param_elements(param)) * share for param, share in uses))


def parameter_bytes(module: Module, *functions: str) -> int:
    """As ``parameters``: their bytes, scales included."""
    uses = _parameters(module, functions).values()
    return sum(int(p.type.nbytes) for p, _ in uses if isinstance(p.type, TensorType))


def _parameters(module: Module, functions: Iterable[str]) -> dict[str, tuple[Param, Fraction]]:
    """By full name: the parameter, and the share of it that one token uses."""
    found: dict[str, tuple[Param, Fraction]] = {}

    def walk(name: str, prefixes: list[str], share: Fraction) -> None:
        body = module[name]
        for param in body.params.values():
            of_param = share * min((_share(op) for op, _ in body.uses(param)), default=Fraction(1))
            found.update({prefix + param.name: (param, of_param) for prefix in prefixes})
        for op in body.ops:
            if isinstance(op, Loop) and op.callee in module:
                inner = [p + op.prefix(n) for p in prefixes for n in op.range]
                chosen = expert_slots(module[op.callee])
                each = Fraction(int(chosen.id.type.shape[1]), len(op.range)) if chosen else Fraction(1)
                walk(op.callee, inner, share * each)

    for function in functions:
        walk(function, [""], Fraction(1))
    return found


def _share(op: Op) -> Fraction:
    """Of an op's weights, those that one token uses."""
    if isinstance(op, ExpertProduct) and (choices := op.choices()) is not None:
        return min(Fraction(int(choices.k + choices.shared), int(op.w.type.shape[0])), Fraction(1))
    return Fraction(1)


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
