"""Bodies that run once a layer or once an expert, and the return."""

from __future__ import annotations

from typing import Any

from moec.ir.attrs import INT, RANGE, STR
from moec.ir.op import Op, attr, operand


class Return(Op, name="return"):
    """Ends a function and says what it returns."""

    launches = 0
    values = operand("any", variadic=True)

    def infer(self) -> Any:
        return ()


class Loop(Op):
    """A body, the function @body, run for each number of a range.

    As many operands as there are results are carried: the body takes them after its index and returns their
    successors. The other operands are invariants: every run gets them unchanged. ``scope`` goes before the
    body's parameter names, its ``*`` standing for the number. The interpreter and the code generators run
    the body; a loop has no reference of its own.
    """

    launches = 0  # its own: the body has its own
    range_name = ""
    values = operand("carried values, then invariants", variadic=True)
    callee = attr(STR, doc="the body, a function")
    carry = attr(INT, 0, hidden=True, doc="how many operands are carried: as many as there are results")
    scope = attr(STR, "", doc="prefix of the body's parameters; * is the loop's number")

    def infer(self) -> Any:
        if self.carry > len(self.operands):
            raise self.mismatch(f"returns {self.carry} values but takes {len(self.operands)}")
        return tuple(v.type for v in self.values[: self.carry])

    @property
    def range(self) -> Any:
        return self.attrs[self.range_name]

    def prefix(self, number: int) -> str:
        """What goes before the body's parameter names in the run for ``number``."""
        return self.scope.replace("*", str(number), 1) + "." if self.scope else ""


class Call(Loop, name="call"):
    """One body for a range of decoder layers: it carries streams and caches, not positions or tables."""

    range_name = "layers"
    layers = attr(RANGE, doc="the layers, both ends included")


class ForEach(Loop, name="for_each"):
    """One body for each expert. What the naive MoE layer is made of; expert-grouping takes it apart."""

    range_name = "experts"
    experts = attr(RANGE, doc="the experts, both ends included")
