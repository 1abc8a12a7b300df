"""Routing of one run put into another, so that what they compute can be compared token by token.

Where two runs round differently, an expert that is nearly as good as another may be chosen in its place. That
token then has another result, and so have those that attend to it, though nobody made a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.ir.op import Op
from moec.ir.ops.moe import SortByExpert

# Those that a rounding may turn: no hash_route.
ROUTERS = ("route", "route_sort", "route_sort_and_quant")
_NUMBER = re.compile(r"(\d+)\.(?!.*\d+\.)")  # the last in a scope
# Parts of the tolerance that may explain a choice.
STEPS = (0.0, 1 / 64, 1 / 16, 1 / 4, 1.0)
Choice = tuple[torch.Tensor, torch.Tensor]  # w [T, k], id [T, k]


@dataclass
class Injection:
    """Gives an interpreter the choices of ``choices``, by layer number, for tokens that it routes otherwise.

    Its ``alter`` is what the Interpreter takes. A token whose experts are the same keeps its own weights, so
    that these are compared as well. One with others counts in ``flipped``, and in ``wrong`` too where logits
    that differ by ``tolerance`` of the token's largest would not explain its choice: that is no rounding.

    The logits are those of this interpreter, which it keeps in ``logits``, or ``known`` ones: those of a run
    that rounds as the one does whose choices are given. This router must then choose so of those.
    """

    tolerance: float
    choices: Mapping[int, Choice] = field(default_factory=dict)
    known: Mapping[int, torch.Tensor] = field(default_factory=dict)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0
    flipped: int = 0
    wrong: int = 0
    worst: str = ""

    def alter(self, op: Op, scope: str, operands: list[Any], results: tuple[Any, ...]) -> tuple[Any, ...]:
        layer = layer_of(scope)
        given = self.choices.get(layer) if op.name in ROUTERS else None
        if given is None:
            return results
        self.logits[layer] = operands[0]
        w, id = results[:2]
        other_w, other_id = given[0].to(w), given[1].to(id)
        chosen = other_id.shape[1]
        if (
            chosen < id.shape[1]
        ):  # folded shared experts, at the end: every token takes them, no record says so
            other_w, other_id = (torch.cat([a, b[:, chosen:]], 1) for a, b in ((other_w, w), (other_id, id)))
        flipped = (id.sort(-1).values != other_id.sort(-1).values).any(-1)
        self.tokens += len(id)
        self.flipped += int(flipped.sum())
        if not bool(flipped.any()):
            return results
        logits = self.known.get(layer, operands[0])
        wrong = int((~self._explained(op, [logits, *operands[1:]], other_id)[flipped]).sum())
        if wrong and not self.wrong:
            self.worst = scope.removesuffix(".")
        self.wrong += wrong
        w, id = torch.where(flipped[:, None], other_w, w), torch.where(flipped[:, None], other_id, id)
        if op.name == "route":
            return w, id
        return w, id, *SortByExpert.reference(id, experts=len(results[3]) - 1), *results[4:]

    def _explained(self, op: Op, operands: list[Any], chosen: torch.Tensor) -> torch.Tensor:
        """[T] whether the choice would be the router's, were its logits a little higher, the others lower.

        By as much as the tolerance or by less: much may take a router by groups to another group, in which
        it lowers the logits that count beside the chosen one's.
        """
        logits = operands[0].float()
        little = self.tolerance * logits.abs().amax(-1, keepdim=True)
        experts, shared = logits.shape[-1], chosen.shape[1]  # at most: these have no logits
        sign = logits.new_full((len(logits), experts + shared), -1.0).scatter(1, chosen.long(), 1.0)
        sign = sign[:, :experts]
        wanted = chosen.sort(-1).values
        same = torch.zeros(len(chosen), dtype=torch.bool, device=chosen.device)
        for part in STEPS:
            _, id, *_ = type(op).reference(logits + sign * part * little, *operands[1:], **op.attrs)
            same |= (id.sort(-1).values == wanted).all(-1)
        return same


@dataclass
class Recorder:
    """Keeps what the routers of an interpreter choose, by layer number; changes nothing."""

    choices: dict[int, Choice] = field(default_factory=dict)

    def alter(self, op: Op, scope: str, operands: list[Any], results: tuple[Any, ...]) -> tuple[Any, ...]:
        if op.name in ROUTERS:
            self.choices[layer_of(scope)] = (results[0], results[1])
        return results


def layer_of(scope: str) -> int:
    """The number of the layer that a scope as ``model.layers.3.`` stands for; 0 for none."""
    found = _NUMBER.search(scope)
    return int(found[1]) if found else 0
