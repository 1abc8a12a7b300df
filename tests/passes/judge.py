"""Runs a module over a run's steps, and says whether two modules give the same.

Where a difference of rounding flips a router's choice, the two are compared again with the choices of the
first: the logits must then agree too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.ir import Interpreter, Module, Op
from moec.ir.ops.attention import PagedCache
from moec.ir.ops.moe import SortByExpert
from moec.passes.instruments import relative_error
from tests.passes.whole_models import Run, caches

# Ops that choose experts of the logits, their first operand: they give the weights first, then the ids.
ROUTERS = ("route", "route_sort", "route_sort_and_quant")
ENTRY_LIMIT = 8  # new tokens of a sequence that @decode takes


@dataclass
class Outcome:
    """What a run gave: hidden states and logits of each step, the caches after the last."""

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    caches: list[Any] = field(default_factory=list)
    choices: list[Any] = field(default_factory=list)  # logits, weights, ids of each routing, in order


class Pinned(Interpreter):
    """Notes every routing; with ``choices``, makes those instead of its own, in the same order."""

    def __init__(self, module: Module, weights: Any, choices: Sequence[Any] | None = None) -> None:
        self.noted: list[Any] = []
        self.choices = choices
        super().__init__(module, weights)

    def _step(self, op: Op, operands: list[Any], scope: str, symbols: dict[Any, int]) -> tuple[Any, ...]:
        results = super()._step(op, operands, scope, symbols)
        if op.name not in ROUTERS:
            return results
        w, id, *sorted_ = results
        k = op.attrs["k"]  # behind these are experts that every token takes
        self.noted.append((operands[0], w[:, :k], id[:, :k]))
        if self.choices is None:
            return results
        _, pinned_w, pinned_id = self.choices[len(self.noted) - 1]
        w = torch.cat([pinned_w[:, :k].to(w.dtype), w[:, k:]], dim=1)
        id = torch.cat([pinned_id[:, :k].to(id.dtype), id[:, k:]], dim=1)
        if sorted_:
            experts = operands[0].shape[1] + op.attrs["shared"]
            sorted_ = [*SortByExpert.reference(id, experts=experts), *sorted_[2:]]
        return (w, id, *sorted_)


class Jittered(Pinned):
    """Each product's operands are off by as much as a rounding to e4m3 may turn them: 2^-4 of themselves."""

    def __init__(
        self, module: Module, weights: Any, choices: Sequence[Any] | None = None, seed: int = 0
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        super().__init__(module, weights, choices)

    def _step(self, op: Op, operands: list[Any], scope: str, symbols: dict[Any, int]) -> tuple[Any, ...]:
        if op.name == "linear":
            x, w, *bias = operands
            operands = [self._jitter(x), self._jitter(w), *bias]
        return super()._step(op, operands, scope, symbols)

    def _jitter(self, x: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(0, 2, x.shape, generator=self.generator, dtype=torch.int8) * 2 - 1
        return x * (1 + sign.to(x.dtype) / 16)


def outcome(
    module: Module,
    weights: Any,
    run: Run,
    choices: Sequence[Any] | None = None,
    entry: str = "step",
    layers: int = 6,
    jitter: int | None = None,
) -> Outcome:
    """Interprets the run. ``entry``: with ``decode``, the steps that fit it are run by it. ``jitter``: a
    seed, to have every product's operands off by a rounding to e4m3.
    """
    found = Outcome()
    interpreter = (
        Pinned(module, weights, choices) if jitter is None else Jittered(module, weights, choices, jitter)
    )
    state = [interpreter.new_cache(t, layers, run.pages) for t in caches(module)]
    for number, batch in enumerate(run.steps):
        short = not batch.cu_seqlens.diff().numel() or int(batch.cu_seqlens.diff().max()) <= ENTRY_LIMIT
        name = entry if short else "step"
        hidden, *state = interpreter.run(name, *batch.tensors(), *state)
        found.outputs[f"{number}: hidden"] = hidden
        (found.outputs[f"{number}: logits"],) = interpreter.run("head", hidden)
    found.caches, found.choices = state, interpreter.noted
    return found


def worst(before: Outcome, after: Outcome, state: bool = True) -> tuple[float, str]:
    """The largest relative error of all outputs, and of the caches where they are of the same type."""
    errors = {k: relative_error(v, after.outputs[k]) for k, v in before.outputs.items()}
    for number, (a, b) in enumerate(zip(before.caches, after.caches, strict=True)):
        if state and isinstance(a, PagedCache):
            errors[f"cache {number}"] = relative_error(a, b)
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def flipped(before: Outcome, after: Outcome) -> bool:
    return len(before.choices) == len(after.choices) and any(
        not torch.equal(a[2], b[2]) for a, b in zip(before.choices, after.choices, strict=True)
    )


def same(before: Outcome, module: Module, weights: Any, run: Run, tolerance: float, what: str) -> None:
    """Fails where ``module`` gives something else than ``before``; as @decode too, where there is one."""
    for entry in ("step", "decode"):
        if entry not in module:
            continue
        after = outcome(module, weights, run, entry=entry)
        if flipped(before, after):
            after = outcome(module, weights, run, before.choices, entry)
            for (a, *_), (b, *_) in zip(before.choices, after.choices, strict=True):
                error = relative_error(a.float(), b.float())
                assert error <= tolerance, f"{what}: a router's logits differ by {error:.1e} in @{entry}"
        error, where = worst(before, after)
        assert error <= tolerance, f"{what}: {where} differs by {error:.1e} in @{entry}"


def sqnr(reference: torch.Tensor, got: torch.Tensor) -> float:
    """Signal to noise, in dB."""
    signal, noise = reference.double().square().sum(), (got.double() - reference.double()).square().sum()
    return math.inf if not noise else 10 * math.log10(float(signal / noise))
