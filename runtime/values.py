"""Arguments as callers give them (Python's, NumPy's, PyTorch's) made into numbers, or refused by name; and
quantised tensors, as generated code hands them on."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from moec.errors import BadInput


class Scaled(NamedTuple):
    """fp8 values and the fp32 scales of their blocks: what is meant is q times its block's scale."""

    q: torch.Tensor
    scale: torch.Tensor


def whole(name: str, value: Any) -> int:
    """An int of any library's. Raises BadInput, also for a bool."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise BadInput(f"{name} is {value!r}; it must be a whole number")


def wholes(name: str, given: Any) -> list[int]:
    """One whole number or several: a list, a set, an array, a tensor of them; none for None."""
    if given is None:
        return []
    if hasattr(given, "tolist"):  # a tensor, an array or a NumPy number
        given = given.tolist()
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        given = [given]
    return [whole(name, value) for value in given]


def number(name: str, value: Any) -> float:
    """A float or an int of any library's. Raises BadInput, also for a bool and for text."""
    try:
        if not isinstance(value, bool | str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise BadInput(f"{name} is {value!r}; it must be a number")
