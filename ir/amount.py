"""Bytes as polynomials in the symbols, quick to add and to compare: what memory plans are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import sympy

from moec.errors import BadOption
from moec.ir.types import TensorType, Type, as_dim, format_dim


class Amount:
    """A sum of monomials with factors. Negative ones stand beside what they are part of: ``N - N0``.

    Immutable.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Any, int]) -> None:
        self.terms = terms

    @staticmethod
    def of(expr: Any) -> Amount:
        """An int or a sympy expression."""
        if isinstance(expr, int):
            return Amount({sympy.S.One: expr} if expr else {})
        coefficients = sympy.expand(expr).as_coefficients_dict()
        return Amount({m: _whole(c) for m, c in coefficients.items() if c})

    def __add__(self, other: Amount) -> Amount:
        if not self.terms or not other.terms:
            return self if self.terms else other
        terms = dict(self.terms)
        for monomial, factor in other.terms.items():
            terms[monomial] = terms.get(monomial, 0) + factor
        return Amount({m: factor for m, factor in terms.items() if factor})

    def __sub__(self, part: Amount) -> Amount:
        """Without what is a part of it; or a difference, to be added to what has the part."""
        return self + Amount({monomial: -factor for monomial, factor in part.terms.items()})

    def __mul__(self, times: float) -> Amount:
        """Rounded up."""
        return Amount({m: math.ceil(times * factor) for m, factor in self.terms.items()})

    def subs(self, values: Mapping[Any, Any]) -> Amount:
        """With other expressions for some symbols."""
        if not any(s in values for m in self.terms for s in m.free_symbols):
            return self
        return Amount.of(self.expr.xreplace({s: sympy.sympify(value) for s, value in values.items()}))

    def within(self, other: Amount) -> bool:
        """Whether it is at most ``other`` whatever the symbols are, factor by factor."""
        return all(factor <= other.terms.get(m, 0) for m, factor in self.terms.items()) and all(
            factor >= 0 for m, factor in other.terms.items() if m not in self.terms
        )

    @property
    def expr(self) -> Any:
        return sum((factor * m for m, factor in self.terms.items()), sympy.S.Zero)

    def __str__(self) -> str:
        expr = self.expr
        return format_dim(int(expr) if expr.is_Integer else expr)

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Amount) and dict(self.terms) == dict(other.terms)

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))


def _whole(number: Any) -> int:
    """Rounded up; sympy's own rounding gives sympy's own integers."""
    return int(sympy.ceiling(number))


NOTHING = Amount({})


def total(amounts: Iterable[Amount]) -> Amount:
    return sum(amounts, NOTHING)


@cache
def bytes_of(type: Type) -> Amount:
    """What a value of this type takes; state and indices take nothing of a step's memory."""
    return Amount.of(type.nbytes) if isinstance(type, TensorType) else NOTHING


@cache
def bytes_as(type: Type, bits: int) -> Amount:
    """What its elements take in another dtype, of ``bits`` each."""
    return Amount.of(as_dim(type.numel) * bits // 8) if isinstance(type, TensorType) else NOTHING


def largest(amounts: Iterable[Amount]) -> list[Amount]:
    """Those that no other one is sure to cover: their maximum is that of all."""
    found: list[Amount] = []
    for amount in sorted(dict.fromkeys(amounts), key=lambda a: -sum(a.terms.values())):
        if not any(amount.within(other) for other in found):
            found = [other for other in found if not other.within(amount)] + [amount]
    return found


class Sizes:
    """Numbers for the symbols, by name. Raises BadOption where an amount needs one that isn't there."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = dict(values)
        self._monomials: dict[Any, float] = {sympy.S.One: 1}

    def __getitem__(self, amount: Amount) -> int:
        return round(sum(factor * self._of(m) for m, factor in amount.terms.items()))

    def most(self, amounts: Iterable[Amount]) -> int:
        return max((self[a] for a in amounts), default=0)

    def _of(self, monomial: Any) -> float:
        if monomial not in self._monomials:
            missing = sorted(s.name for s in monomial.free_symbols if s.name not in self.values)
            if missing:
                raise BadOption(f"no number is given for {', '.join(missing)}: --at {missing[0]}=...")
            numbers = {s: self.values[s.name] for s in monomial.free_symbols}
            self._monomials[monomial] = float(monomial.subs(numbers))
        return self._monomials[monomial]
