"""The order of a function's ops: new ones go in anywhere, and each one's place is known at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from moec.ir.op import Op


class Order:
    """A list of ops, each with a number between those of its neighbours.

    Finding, adding and removing one takes time that hardly grows with the list: a pass that rewrites every op
    of a long function must not look through all of them each time.
    """

    def __init__(self) -> None:
        self._ops: list[Op] = []
        self._number: dict[Op, float] = {}

    def __iter__(self) -> Iterator[Op]:
        return iter(self._ops)

    def number(self, op: Op) -> float:
        """What ops compare by; it may change when others are added. Raises KeyError."""
        return self._number[op]

    def append(self, op: Op) -> None:
        self._number[op] = self._number[self._ops[-1]] + 1.0 if self._ops else 0.0
        self._ops.append(op)

    def insert(self, op: Op, before: Op) -> None:
        place = self._place(before)
        high = self._number[before]
        low = self._number[self._ops[place - 1]] if place else high - 2.0
        self._ops.insert(place, op)
        self._number[op] = middle = (low + high) / 2
        if not low < middle < high:  # no number is left between the two
            self.reset(self._ops)

    def remove(self, op: Op) -> None:
        del self._ops[self._place(op)]
        del self._number[op]

    def reset(self, ops: Iterable[Op]) -> None:
        """The ops in another order."""
        self._ops = list(ops)
        self._number = {op: float(i) for i, op in enumerate(self._ops)}

    def _place(self, op: Op) -> int:
        return bisect_left(self._ops, self._number[op], key=self._number.__getitem__)
