"""What an op is. A concrete op is one class in one place (``ir/ops``) that declares::

    class RMSNorm(Op, name="rms_norm"):
        "x / sqrt(mean(x²) + eps) · w over the last axis, in fp32, rounded once."

        x = operand("[..., K]")
        w = operand("[K]")
        eps = attr(FLOAT)
        y = result()

        def infer(self): ...                  # result types from operand types; raises TypeMismatch
        @staticmethod
        def reference(x, w, *, eps): ...      # plain PyTorch, the judge of every kernel and rewrite
        def cost(self): ...                   # FLOPs and compulsory bytes
        launches = 1                          # 0 for a view

Printing, parsing, the builder's method, the documentation row and the property tests follow from the
declaration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import sympy

from moec.errors import AttributeMismatch, SourceLoc, TypeMismatch, UnknownOp, nearest
from moec.ir.attrs import NUMBERS, STR, Kind
from moec.ir.types import IndexType, TensorType, Type, i32, i64

_MISSING = object()


@dataclass(frozen=True)
class Cost:
    """FLOPs, the bytes that must move even with perfect reuse, and launches. Ints or sympy expressions."""

    flops: Any = 0
    bytes: Any = 0
    launches: Any = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches)

    def __mul__(self, times: Any) -> Cost:
        return Cost(self.flops * times, self.bytes * times, self.launches * times)

    def at(self, values: Mapping[Any, Any]) -> Cost:
        given = tuple(values.items())
        return Cost(_at(self.flops, given), _at(self.bytes, given), self.launches)


@lru_cache(maxsize=1 << 14)  # dumps ask the same of the same ops, pass after pass
def _at(amount: Any, values: tuple[tuple[Any, Any], ...]) -> Any:
    # Much quicker than subs, which looks for more than equal symbols.
    return sympy.sympify(amount).xreplace({symbol: sympy.sympify(value) for symbol, value in values})


class operand:
    """Declares an operand; on an op it reads as the Value (None where an optional one is left out)."""

    def __init__(self, doc: str = "", *, optional: bool = False, variadic: bool = False) -> None:
        self.doc, self.optional, self.variadic = doc, optional, variadic
        self.index = -1

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, op: Any, owner: type | None = None) -> Any:
        if op is None:
            return self
        if self.variadic:
            return op.operands[self.index :]
        return op.operands[self.index]


class attr:
    """Declares an attribute. Without ``default`` it must be given; one equal to its default isn't printed."""

    def __init__(self, kind: Kind, default: Any = _MISSING, *, doc: str = "", hidden: bool = False) -> None:
        self.kind, self.default, self.doc, self.hidden = kind, default, doc, hidden

    @property
    def required(self) -> bool:
        return self.default is _MISSING

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, op: Any, owner: type | None = None) -> Any:
        return self if op is None else op.attrs[self.name]


# What any op may carry beside its own attributes: how it runs and where its results lie, never what it
# computes. Printed and parsed like attributes; patterns, equality of ops and the interpreter don't see them.
ANNOTATIONS = {
    "kernel": attr(STR, None, doc="the kernel record that emits it"),
    "schedule": attr(STR, None, doc="its kernel's schedules, by rows an expert: the first whose bound holds"),
    "tuned": attr(STR, None, doc="the device on which its schedules were measured, and when"),
    "buffer": attr(NUMBERS, None, doc="the planned buffer of each result; `_` for one that takes no memory"),
}


class result:
    """Declares a result; ``name`` is what the value is called when nobody names it."""

    def __init__(self, doc: str = "") -> None:
        self.doc = doc
        self.index = -1

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, op: Any, owner: type | None = None) -> Any:
        return self if op is None else op.results[self.index]


class Value:
    """Something an op may use. ``name`` is unique in its function; ``type`` changes by ``retype`` only."""

    __slots__ = ("name", "type")

    def __init__(self, name: str, type: Type) -> None:
        self.name, self.type = name, type

    @property
    def text(self) -> str:
        return f"%{self.name}"

    def __repr__(self) -> str:
        return f"{self.text}: {self.type}"


class Argument(Value):
    """A function's argument."""

    __slots__ = ()


class Param(Value):
    """A weight by its checkpoint name, relative to the scope that the function is called in.

    A name with ``*`` in it is a family: one tensor of ``type`` for each value of a loop.
    """

    __slots__ = ()

    @property
    def text(self) -> str:
        return f"${self.name}"


class OpResult(Value):
    """The ``index``-th result of ``op``."""

    __slots__ = ("index", "op")

    def __init__(self, name: str, type: Type, op: Op, index: int) -> None:
        super().__init__(name, type)
        self.op, self.index = op, index


class Op:
    """One node of a graph.

    Make them through a Builder or ``Function.create``; change them through Function only.
    """

    name: ClassVar[str] = ""
    operand_specs: ClassVar[tuple[operand, ...]] = ()
    attr_specs: ClassVar[dict[str, attr]] = {}
    result_specs: ClassVar[tuple[result, ...]] = ()
    # What an op does beside computing its results. Ops with effects are never removed or merged;
    # state (caches, randomness) is not listed here: it is threaded as values.
    effects: ClassVar[frozenset[str]] = frozenset()
    # Kernels it takes at least: none for a view or what only the host looks at.
    launches: ClassVar[int] = 1
    # Its FLOPs are products of operands of the first one's dtype; all else is arithmetic in fp32.
    products: ClassVar[bool] = False

    def __init_subclass__(cls, name: str | None = None, effects: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        # By name: one that a subclass declares anew keeps its place.
        fields = {n: f for base in reversed(cls.__mro__) for n, f in vars(base).items()}.values()
        cls.name, cls.effects = name, frozenset(effects)
        cls.operand_specs = tuple(f for f in fields if isinstance(f, operand))
        cls.result_specs = tuple(f for f in fields if isinstance(f, result))
        cls.attr_specs = {f.name: f for f in fields if isinstance(f, attr)}
        for i, spec in enumerate(cls.operand_specs):
            spec.index = i
        for i, res in enumerate(cls.result_specs):
            res.index = i
        if name in OPS:
            raise RuntimeError(f"two ops are called {name}")
        if taken := cls.attr_specs.keys() & ANNOTATIONS:
            raise RuntimeError(f"{name} has an attribute {', '.join(taken)}: any op may carry that")
        OPS[name] = cls

    def __init__(
        self,
        operands: Sequence[Value | None],
        attrs: Mapping[str, Any] | None = None,
        loc: SourceLoc | None = None,
    ) -> None:
        self.loc = loc
        self.origin = ""  # the rule that made it, as ``permute-fusion(%xp,%gu)``
        self.written: SourceLoc | None = None  # where it stands in IR text, if it was read from such
        self.operands = self._fit_operands(tuple(operands))
        given = dict(attrs or {})
        self.annotations: dict[str, Any] = {}
        for key in ANNOTATIONS.keys() & given.keys():
            self.annotate(key, given.pop(key))
        self.attrs = self._fit_attrs(given)
        self.results: tuple[OpResult, ...] = ()

    def _fit_operands(self, given: tuple[Value | None, ...]) -> tuple[Value | None, ...]:
        specs = self.operand_specs  # a variadic one is the last
        variadic = bool(specs) and specs[-1].variadic
        if len(given) > len(specs) and not variadic:
            raise TypeMismatch(f"{self.name}: takes {len(specs)} operands, got {len(given)}", loc=self.loc)
        fixed = specs[:-1] if variadic else specs
        filled = given + (None,) * (len(fixed) - len(given))
        for i, value in enumerate(filled):
            spec = specs[min(i, len(specs) - 1)]
            if value is None and not spec.optional:
                raise TypeMismatch(f"{self.name}: operand {spec.name} is missing", loc=self.loc)
        return filled

    def _fit_attrs(self, given: dict[str, Any]) -> dict[str, Any]:
        for key in given:
            if key not in self.attr_specs:
                hint = nearest(key, [*self.attr_specs, *ANNOTATIONS])
                raise AttributeMismatch(f"{self.name}: no attribute is called {key!r}{hint}", loc=self.loc)
        fitted = {}
        for key, spec in self.attr_specs.items():
            value = given.get(key, spec.default)
            if value is _MISSING:
                raise AttributeMismatch(f"{self.name}: attribute {key} is missing", loc=self.loc)
            if value is not spec.default and not spec.kind.check(value):
                raise AttributeMismatch(
                    f"{self.name}: {key} must be {spec.kind.name}, not {value!r}", loc=self.loc
                )
            fitted[key] = value
        return fitted

    def annotate(self, key: str, value: Any) -> bool:
        """Gives the op an annotation, or takes it away (None); whether that changed anything."""
        if value == self.annotations.get(key):
            return False
        kind = ANNOTATIONS[key].kind
        if value is None:
            del self.annotations[key]
        elif not kind.check(value):
            raise AttributeMismatch(f"{self.name}: {key} must be {kind.name}, not {value!r}", loc=self.loc)
        else:
            self.annotations[key] = value
        return True

    def take_notes(self, other: Op) -> None:
        """Origin and annotations of ``other``, whose copy this is."""
        self.origin, self.written = other.origin, other.written
        self.annotations = dict(other.annotations)

    # What each op defines.
    def infer(self) -> Any:
        """The result types: one Type, or a tuple of them. Raises TypeMismatch."""
        raise NotImplementedError

    @staticmethod
    def reference(*args: Any, **attrs: Any) -> Any:
        """Plain PyTorch. Operands by position (None for one left out), attributes by name."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """FLOPs and bytes (``moec.ir.cost.op_cost`` adds the launches). By default none, and each operand and
        result moved once.
        """
        return Cost(0, self.moved_bytes())

    # What they use.
    def moved_bytes(self) -> Any:
        values = [v for v in (*self.operands, *self.results) if v is not None]
        return sum(v.type.nbytes for v in values if isinstance(v.type, TensorType))

    def mismatch(self, message: str) -> TypeMismatch:
        return TypeMismatch(f"{self.name}: {message}", loc=self.loc)

    def tensor(
        self, value: Value, rank: int | None = None, *, min_rank: int = 0, scaled: bool = False
    ) -> TensorType:
        """``value``'s type, once it's known to be a tensor (of ``rank``).

        Only an op that reads block scales says ``scaled``: to any other the elements alone mean nothing.
        """
        type = value.type
        if not isinstance(type, TensorType):
            raise self.mismatch(f"{value.text} is {type}, not a tensor")
        if rank is not None and type.rank != rank:
            raise self.mismatch(f"{value.text} is {type}, not of rank {rank}")
        if type.rank < min_rank:
            raise self.mismatch(f"{value.text} is {type}, but needs an axis")
        if type.scale and not scaled:
            raise self.mismatch(f"{value.text} is {type}: this op doesn't read block scales")
        return type

    def integers(self, value: Value, rank: int | None = None) -> TensorType:
        """``value``'s type, once it's known to be a tensor of i32 or i64 (of ``rank``)."""
        type = self.tensor(value, rank)
        if type.dtype not in (i32, i64):
            raise self.mismatch(f"{value.text} is {type}, not integers")
        return type

    def same(self, what: str, left: Any, a: Value, right: Any, b: Value) -> None:
        """Raises unless two dimensions are equal; ``what`` names them."""
        if left != right:
            raise self.mismatch(f"{what} is {left} in {a.text} but {right} in {b.text}")

    def index(self, value: Value) -> None:
        if not isinstance(value.type, IndexType):
            raise self.mismatch(f"{value.text} is {value.type}, not an index")

    @property
    def users_label(self) -> str:
        return ",".join(r.text for r in self.results) or self.name

    def __repr__(self) -> str:
        args = ", ".join("_" if v is None else v.text for v in self.operands)
        return f"{self.users_label} = {self.name}({args})"


OPS: dict[str, type[Op]] = {}


def op_class(name: str) -> type[Op]:
    """The op of that name. Raises UnknownOp with the nearest names."""
    if name not in OPS:
        raise UnknownOp(f"no op is called {name!r}{nearest(name, OPS)}")
    return OPS[name]
