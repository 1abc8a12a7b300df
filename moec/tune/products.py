"""The products of a package that have schedules to choose among, each once; and packages of one candidate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy

from moec import __version__
from moec.codegen.invariance import computed
from moec.codegen.kernels import select
from moec.codegen.kernels.triton import TritonKernel, tensor
from moec.codegen.package import write_package
from moec.codegen.schedules import Problem, Schedule
from moec.codegen.targets import target as target_of
from moec.ir import Function, Module
from moec.ir.op import Op
from moec.ir.types import TensorType, symbol

# A token's routing weights are so many at most; its activations are more.
MOST_CHOICES = 16
# Results of one product under two schedules are sums in another order, rounded: of the largest element.
TOLERANCE = {"f32": 1e-4, "f16": 4e-3, "bf16": 3e-2, "f8e4m3": 1.5e-1}


@dataclass(frozen=True)
class Product:
    """One op of those with an equal problem; ``token`` is the symbol that counts tokens."""

    problem: Problem
    op: Op
    token: str

    @property
    def tolerance(self) -> float:
        return TOLERANCE[tensor(self.op.results[0]).dtype.name]

    @property
    def importance(self) -> float:
        """What a product's share of the time is by."""
        return math.sqrt(_weights(self.problem))

    def rows(self, tokens: int) -> float:
        """Rows an expert on average."""
        return self._rows(tokens) / self.problem.experts

    def _rows(self, tokens: int) -> int:
        given = {s.name: v for s, v in zip(self.op.operand_specs, self.op.operands, strict=False)}
        shape = tensor(given["slot"]).shape if given.get("slot") else tensor(self.op.operands[0]).shape[:-1]
        return int(sympy.prod(self._sizes(shape, tokens)))

    def arguments(self, tokens: int) -> list[dict[str, Any]]:
        """The operands as a worker draws them."""
        found = []
        for spec, value in zip(self.op.operand_specs, self.op.operands, strict=False):
            if value is None:
                continue
            type = tensor(value)
            found.append(
                {
                    "name": spec.name,
                    "role": _role(type),
                    "dtype": type.dtype.name,
                    "shape": self._sizes(type.shape, tokens),
                    "scale": self._sizes(type.scale_shape, tokens) if type.scale else None,
                }
            )
        return found

    def choices(self, tokens: int) -> dict[str, int]:
        """Experts, tokens that choose, and how many each chooses."""
        rows, experts = self._rows(tokens), self.problem.experts
        k = max(1, rows // max(tokens, 1)) if experts > 1 else 1
        return {"experts": experts, "tokens": rows // k, "choices": k}

    def _sizes(self, shape: Iterable[Any], tokens: int) -> list[int]:
        return [d if isinstance(d, int) else int(d.subs(symbol(self.token), tokens)) for d in shape]

    def module(self, schedule: Schedule) -> Module:
        """The product alone, by one schedule whatever the number of rows: ``@forward`` of its operands.

        Whose kernel has that schedule is selected as in any build.
        """
        module = Module(f"tune.{self.op.name}", target="")
        forward = module.add(Function("forward"))
        given = {
            value: forward.add_argument(spec.name, value.type)
            for spec, value in zip(self.op.operand_specs, self.op.operands, strict=False)
            if value is not None
        }
        operands = [None if v is None else given[v] for v in self.op.operands]
        made = forward.create(type(self.op)(operands, self.op.attrs))
        made.annotate("schedule", schedule.text)
        forward.ret(*made.results)
        return module

    def write(self, folder: Path, schedule: Schedule, target: str) -> None:
        """A package of it in ``folder``, which is new; its kernels are yet to be compiled."""
        module = self.module(schedule)
        module.target = target
        folder.mkdir(parents=True)
        about = {
            "name": f"{self.op.name} {schedule.text}",
            "dtype": "bf16",  # a layer's, which this isn't
            "hidden": 1,
            "vocab": None,
            "max_positions": None,
            "eos": [],
            "options": {},
            "ignored": [],
        }
        write_package(folder, module, target_of(target), __version__, about)


def products(module: Module, target: str) -> tuple[list[Product], list[str]]:
    """The products to tune, the one with most weights first, and what of others stands against it."""
    found: dict[Problem, Product] = {}
    left_out: dict[str, None] = {}
    for op in computed(module):
        record = select(op, target)
        if not isinstance(record, TritonKernel) or record.problem is None:
            continue
        problem = record.problem(op)
        symbols = {s.name for v in op.operands if v for d in tensor(v).shape if not isinstance(d, int)
                   for s in d.free_symbols}  # fmt: skip
        if len(symbols) != 1:
            left_out[f"{op.name} of {problem.text}: its sizes are of {', '.join(sorted(symbols))}"] = None
        elif problem not in found:
            found[problem] = Product(problem, op, symbols.pop())
    ordered = sorted(found.values(), key=lambda p: -_weights(p.problem))
    return ordered, list(left_out)


def _role(type: TensorType) -> str:
    """What an operand holds (``runtime/draw.py``): told by its dtype, and by whether its size is fixed."""
    fixed = all(isinstance(d, int) for d in type.shape)
    if not type.dtype.is_float:
        return "off" if fixed else "slot"
    if fixed:
        return "weights"
    return "routing" if type.rank == 2 and type.shape[-1] <= MOST_CHOICES else "rows"


def _weights(problem: Problem) -> int:
    return problem.experts * problem.matrices * problem.columns * problem.depth
