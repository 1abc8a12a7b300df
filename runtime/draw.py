"""Operands of one op, drawn at random, as many sets as it takes that none is found in the cache.

What is drawn is told by JSON: a list of arguments in order, each with ``name``, ``role``, ``dtype``,
``shape`` and, of a scaled value, ``scale`` (the shape of its scales):

weights   copies share nothing; they are drawn once for all numbers of rows
rows      activations
off, slot what a router's choices make: ``experts``, ``tokens`` and ``choices`` say of which
routing   weights of a token's choices
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moec.errors import BadInput
from moec.runtime.dtypes import DTYPES
from moec.runtime.values import Scaled

Argument = Mapping[str, Any]
MOST_SETS = 32
CACHES = 3  # so many times the cache's bytes are read before a set comes round again


class Sets:
    """Weights that stay, and around them the other operands for one number of rows after the other."""

    def __init__(self, arguments: Sequence[Argument], device: str, cache: int) -> None:
        self.arguments, self.device, self.cache = arguments, device, cache
        size = sum(nbytes(a) for a in arguments if a["role"] == "weights")
        self._generator = torch.Generator(device).manual_seed(0)
        self.weights = [
            [self._value(a, a["shape"]) if a["role"] == "weights" else None for a in arguments]
            for _ in range(max(1, min(MOST_SETS, math.ceil(CACHES * cache / max(size, 1)))))
        ]

    def draw(self, arguments: Sequence[Argument], choices: Mapping[str, int]) -> list[list[Any]]:
        """Sets of operands: ``arguments`` are those of the constructor with the shapes of some rows."""
        experts = max(1, choices["experts"])
        active = -experts * math.expm1(-choices["tokens"] * choices["choices"] / experts) / experts
        read = sum(nbytes(a) * (active if a["role"] == "weights" else 1) for a in arguments)
        count = max(2, len(self.weights), math.ceil(CACHES * self.cache / max(read, 1)))
        return [
            self._set(arguments, choices, self.weights[number % len(self.weights)])
            for number in range(min(MOST_SETS, count))
        ]

    def _set(
        self, arguments: Sequence[Argument], choices: Mapping[str, int], weights: list[Any]
    ) -> list[Any]:
        slot, off = self._sorted(choices)
        made = []
        for argument, weight in zip(arguments, weights, strict=True):
            role, shape = argument["role"], argument["shape"]
            if role == "weights":
                made.append(weight)
            elif role in ("slot", "off"):
                made.append((slot if role == "slot" else off).to(DTYPES[argument["dtype"]]))
            elif role == "routing":
                made.append(
                    torch.rand(shape, generator=self._generator, device=self.device).to(_dtype(argument))
                )
            elif role == "rows":
                made.append(self._value(argument, shape))
            else:
                raise BadInput(f"{argument['name']}: nobody knows how to draw {role!r}")
        return made

    def _sorted(self, choices: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        """slot [T·k] int32, the slots by expert, and off [E+1]: each token chooses k of E at random."""
        experts, tokens, k = choices["experts"], choices["tokens"], choices["choices"]
        scores = torch.rand(tokens, experts, generator=self._generator, device=self.device)
        owner = scores.topk(min(k, experts), dim=1).indices.flatten()
        slot = owner.sort(stable=True).indices.to(torch.int32)
        counts = torch.bincount(owner, minlength=experts)
        return slot, torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)

    def _value(self, argument: Argument, shape: Sequence[int]) -> Any:
        q = torch.empty(shape, dtype=_dtype(argument), device=self.device)
        # A matrix at a time: in fp32 all experts' weights at once needn't fit.
        for part in q if q.dim() > 2 else [q]:
            part.copy_(torch.randn(part.shape, generator=self._generator, device=self.device))
        if argument.get("scale") is None:
            return q
        scale = torch.rand(argument["scale"], generator=self._generator, device=self.device)
        return Scaled(q, (scale + 0.5) / 64)


def nbytes(argument: Argument) -> int:
    return math.prod(argument["shape"]) * _dtype(argument).itemsize


def _dtype(argument: Argument) -> torch.dtype:
    return DTYPES[argument["dtype"]]


def difference(y: Any, wanted: Any) -> float:
    """max|y - wanted| / max|wanted|; infinite where y isn't finite, or has another shape."""
    if isinstance(y, tuple):
        y, wanted = Scaled(*y), Scaled(*wanted)
        if y.scale.shape != wanted.scale.shape:
            return math.inf
        return max(difference(*_spread(y, wanted)), difference(y.scale, wanted.scale))
    if y.shape != wanted.shape or not bool(torch.isfinite(y.float()).all()):
        return math.inf
    if not y.numel():
        return 0.0
    most = float(wanted.float().abs().max())
    return float((y.float() - wanted.float()).abs().max()) / max(most, 1e-30)


def _spread(*scaled: Scaled) -> tuple[Tensor, ...]:
    """What quantised rows mean: each value times the scale of its 128 columns."""
    return tuple(
        s.q.float() * s.scale.repeat_interleave(128, -1)[..., : s.q.shape[-1]]
        if s.scale.shape[-1] > 1
        else s.q.float() * s.scale
        for s in scaled
    )
