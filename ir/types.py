"""Types of IR values: dtypes, symbolic shapes, ragged groups, block scales, caches.

Text forms::

    bf16[N,7168]                a tensor; N is a symbol
    bf16[8*N~256,7168]          8·N rows in 256 groups
    f8e4m3[2048,7168]@s128x128  block scales of 128 × 128 travel with the tensor
    f8e4m3[N,7168]@s1x*         a scale a row: ``*`` is the whole axis, ``@s*x*`` one scale for all
    bf16[256@ep,2048,7168]      axis 0 is split over mesh axis ep
    bf16[4096]@host             lives in host memory
    cache<bf16[576], page=64>   paged KV cache: entries of 576 elements, 64 to a page
    cache<f8e4m3[576], page=64, scale=0.5>   the same in e4m3, times one scale (1, unless it says so)
    cache<u8[656], page=64, rank=512>        packed: 512 elements in e4m3, 4 fp32 scales, 64 bf16
    index                       the number of a layer or an expert, inside a loop's body
"""

from __future__ import annotations

import ast
import math
import operator
import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, TypeAlias

import sympy
from sympy.printing.str import StrPrinter

from moec.errors import IRError, ParseError

Dim: TypeAlias = int | sympy.Expr


@dataclass(frozen=True)
class DType:
    """A dtype by its short name; ``bits`` may be below 8 for packed ones."""

    name: str
    bits: int
    torch_name: str

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__

    @property
    def is_float(self) -> bool:
        return self.name != "bool" and self.name[0] in "bf"

    @property
    def torch(self) -> Any:
        import torch

        return getattr(torch, self.torch_name)

    @staticmethod
    def of(name: str) -> DType:
        """By short name (``bf16``) or torch's (``bfloat16``). Raises KeyError for neither."""
        return DTYPES.get(name) or _BY_TORCH[name.removeprefix("torch.")]


DTYPES = {
    name: DType(name, bits, torch_name)
    for name, bits, torch_name in [
        ("f64", 64, "float64"),
        ("f32", 32, "float32"),
        ("bf16", 16, "bfloat16"),
        ("f16", 16, "float16"),
        ("f8e4m3", 8, "float8_e4m3fn"),
        ("f8e5m2", 8, "float8_e5m2"),
        ("f4e2m1", 4, "float4_e2m1fn_x2"),
        ("i64", 64, "int64"),
        ("i32", 32, "int32"),
        ("i8", 8, "int8"),
        ("u8", 8, "uint8"),
        ("bool", 8, "bool"),
    ]
}
TILE = 128  # elements of a packed cache entry that share a scale
_BY_TORCH = {d.torch_name: d for d in DTYPES.values()}
f32, bf16, f16, i64, i32 = (DTYPES[n] for n in ("f32", "bf16", "f16", "i64", "i32"))


@cache
def symbol(name: str) -> sympy.Symbol:
    """The symbol of that name: a non-negative integer, the same object every time."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def as_dim(value: Any) -> Dim:
    """An int, or a sympy expression multiplied out so that equal ones are alike."""
    if isinstance(value, str):
        return parse_dim(value)
    if isinstance(value, int) or value.is_Symbol:
        return value
    if value.is_Integer:
        return int(value)
    value = sympy.expand(value.replace(sympy.ceiling, lambda x: -sympy.floor(-x)))
    return int(value) if value.is_Integer else value


class _DimPrinter(StrPrinter):
    """Writes what ``parse_dim`` reads: ``//`` for a floor, products for powers."""

    def _print_floor(self, expr: sympy.floor) -> str:
        above, below = expr.args[0].as_numer_denom()
        return f"(({self._print(above)})//{below})"

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        base, exponent = expr.args
        if not (exponent.is_Integer and exponent > 0):
            return super()._print_Pow(expr, rational)
        return "*".join([self.parenthesize(base, 100)] * int(exponent))


def format_dim(dim: Dim) -> str:
    if isinstance(dim, int):
        return str(dim)
    text = re.sub(r"\((\w+)\)", r"\1", _DimPrinter().doprint(dim).replace(" ", ""))
    return re.sub(r"(^|\+)\((\w+//\d+)\)(?=$|[+-])", r"\1\2", text)


_DIM_OPS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def parse_dim(text: str) -> Dim:
    """``8*N+1`` and the like: integers, symbols, ``+ - * //`` and brackets, nothing else."""

    def walk(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return symbol(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _DIM_OPS:
            left, right = walk(node.left), walk(node.right)
            if isinstance(node.op, ast.FloorDiv) and not (isinstance(right, int) and right > 0):
                raise ParseError(f"{text!r} is no dimension: what follows // must be a positive number")
            return _DIM_OPS[type(node.op)](left, right)
        raise ParseError(f"{text!r} is no dimension: integers, symbols, + - * // and brackets are")

    try:
        return as_dim(walk(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ParseError(f"{text!r} is no dimension") from None


def block_count(dim: Dim, block: int) -> Dim:
    """How many blocks an axis has, the last one perhaps partial; a block of 0 is the whole axis."""
    return as_dim(-(-dim // block)) if block else 1


def format_block(block: tuple[int, ...]) -> str:
    """``1x128``; ``*`` for an axis that is one block."""
    return "x".join("*" if size == 0 else str(size) for size in block)


def parse_block(text: str) -> tuple[int, ...]:
    """The inverse of ``format_block``. Raises ParseError."""
    sizes = text.split("x")
    if not all(size == "*" or (size.isdecimal() and int(size) > 0) for size in sizes):
        raise ParseError(f"{text!r} are no scale blocks: positive sizes, or * for a whole axis, as in 1x128")
    return tuple(0 if size == "*" else int(size) for size in sizes)


def product(dims: Any) -> Dim:
    out: Dim = 1
    for dim in dims:
        out = out * dim
    return as_dim(out)


@dataclass(frozen=True)
class TensorType:
    """``dtype[shape]``, with what else a kernel must know of the tensor. Raises IRError where they don't fit.

    groups      number of ragged row groups along axis 0 (``R~256``), None for a plain tensor
    scale       block shape, along the last axes, of the fp32 scales that travel with a quantised tensor; 0 is
                a whole axis. The axes before (experts) have scales of their own
    placement   mesh axis per tensor axis, ``((0, "ep"),)``
    space       memory space, None for the device's own
    """

    dtype: DType
    shape: tuple[Dim, ...]
    groups: Dim | None = None
    scale: tuple[int, ...] | None = None
    placement: tuple[tuple[int, str], ...] = ()
    space: str | None = None

    def __post_init__(self) -> None:
        fix = object.__setattr__
        fix(self, "shape", tuple(as_dim(d) for d in self.shape))
        fix(self, "groups", None if self.groups is None else as_dim(self.groups))
        fix(self, "scale", tuple(self.scale) if self.scale else None)
        fix(self, "placement", tuple(sorted(self.placement)))
        for dim in self.shape if self.groups is None else (*self.shape, self.groups):
            if dim < 0 if isinstance(dim, int) else not dim.is_integer:
                raise IRError(f"{format_dim(dim)} is no size")
        if self.groups is not None and not self.shape:
            raise IRError("a tensor without axes can't have groups")
        if self.scale and (len(self.scale) > self.rank or min(self.scale) < 0):
            raise IRError(f"scale blocks {self.scale} don't fit a tensor of rank {self.rank}")
        axes = [axis for axis, _ in self.placement]
        if len(set(axes)) < len(axes) or not set(axes) <= set(range(self.rank)):
            raise IRError(f"placement {self.placement} doesn't fit a tensor of rank {self.rank}")

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> Dim:
        return product(self.shape)

    @property
    def scale_shape(self) -> tuple[Dim, ...]:
        """The shape of the tensor of scales; without any a plain tensor has none."""
        if self.scale is None:
            raise IRError(f"{self} has no scales")
        lead, blocked = self.shape[: -len(self.scale)], self.shape[-len(self.scale) :]
        return (*lead, *(block_count(d, b) for d, b in zip(blocked, self.scale, strict=True)))

    @cached_property
    def nbytes(self) -> Any:
        """Bytes of the elements and their scales (fp32, one a block); symbolic where the shape is."""
        size = sympy.ceiling(sympy.Rational(self.dtype.bits, 8) * self.numel)
        if self.scale:
            size += 4 * product(self.scale_shape)
        return int(size) if size.is_Integer else size

    def with_(self, **changes: Any) -> TensorType:
        return replace(self, **changes)

    def __str__(self) -> str:
        places = dict(self.placement)
        dims = [format_dim(d) + (f"@{places[i]}" if i in places else "") for i, d in enumerate(self.shape)]
        if self.groups is not None:
            dims[0] += f"~{format_dim(self.groups)}"
        text = f"{self.dtype}[{','.join(dims)}]"
        if self.scale:
            text += "@s" + format_block(self.scale)
        return text + (f"@{self.space}" if self.space else "")


@dataclass(frozen=True)
class CacheType:
    """A paged KV cache over all layers: SSA state, threaded through every op that reads or writes it.

    entry is what one token keeps in one layer (V3's MLA: the 576 latent elements); page is tokens a page.
    Ops that write entries quantise them as the type says, those that read them undo it (``moec.ir.cached``):
    e4m3 has one ``scale`` for all; u8 with a ``rank`` is packed, the first ``rank`` elements in tiles.
    """

    dtype: DType
    entry: tuple[int, ...]
    page: int
    rank: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.entry or min(*self.entry, self.page) < 1:
            raise IRError(f"{self}: an entry's sizes and the page must be positive")
        if self.scale != 1.0 and (self.dtype.name != "f8e4m3" or not 0 < self.scale < math.inf):
            raise IRError(f"{self}: a scale is positive, of entries in f8e4m3")
        if self.rank:
            rest = self.entry[0] - self.rank - 4 * self.tiles
            if self.dtype.name != "u8" or len(self.entry) != 1 or self.rank < 0 or rest < 0 or rest % 2:
                raise IRError(f"{self}: no bytes of {self.rank} elements in e4m3, their scales and bf16")

    @property
    def quantised(self) -> bool:
        """Whether entries are stored otherwise than they are written."""
        return self.rank > 0 or self.dtype.name == "f8e4m3"

    @property
    def tiles(self) -> int:
        """Scales of a packed entry."""
        return -(-self.rank // TILE)

    @property
    def elements(self) -> tuple[int, ...]:
        """The shape of an entry as it is written and read."""
        if not self.rank:
            return self.entry
        return (self.rank + (self.entry[0] - self.rank - 4 * self.tiles) // 2,)

    @property
    def entry_bytes(self) -> int:
        """Bytes that an entry takes."""
        return math.prod(self.entry) * self.dtype.bits // 8

    def packed(self, rank: int) -> CacheType:
        """The packed cache of these entries, the first ``rank`` elements of which are latent."""
        (width,) = self.entry
        bytes_of = rank + 4 * -(-rank // TILE) + 2 * (width - rank)
        return CacheType(DTYPES["u8"], (bytes_of,), self.page, rank=rank)

    def __str__(self) -> str:
        form = f", rank={self.rank}" if self.rank else ""
        form += f", scale={self.scale!r}" if self.scale != 1.0 else ""
        return f"cache<{self.dtype}[{','.join(map(str, self.entry))}], page={self.page}{form}>"


@dataclass(frozen=True)
class TokenType:
    """Order without data: randomness, collectives."""

    kind: str

    def __str__(self) -> str:
        return f"token<{self.kind}>"


@dataclass(frozen=True)
class IndexType:
    """A loop's number: the layer or the expert that a body runs for."""

    def __str__(self) -> str:
        return "index"


Type = TensorType | CacheType | TokenType | IndexType
STATE_TYPES = (CacheType, TokenType)

_TENSOR = re.compile(r"(\w+)\[([^\]]*)\](@s(?:\d+|\*)(?:x(?:\d+|\*))*)?(?:@([A-Za-z_]\w*))?")
_CACHE = re.compile(
    r"cache<(\w+)\[(\d+(?:,\d+)*)\], ?page=(\d+)(?:, ?rank=([1-9]\d*))?(?:, ?scale=([\d.]+(?:e[+-]?\d+)?))?>"
)
_AXIS = re.compile(r"([^@~]*)(?:@([A-Za-z_]\w*))?(?:~([^@~]*))?")


def parse_type(text: str) -> Type:
    """The inverse of ``str(type)``. Raises ParseError."""
    text = text.strip()
    if text == "index":
        return IndexType()
    if match := re.fullmatch(r"token<(\w+)>", text):
        return TokenType(match[1])
    try:
        if match := _CACHE.fullmatch(text):
            entry, rank, scale = tuple(map(int, match[2].split(","))), match[4] or 0, match[5] or 1.0
            return CacheType(DTYPES[match[1]], entry, int(match[3]), int(rank), float(scale))
        if match := _TENSOR.fullmatch(text):
            dtype, dims, scale, space = match.groups()
            return _tensor(DTYPES[dtype], dims, scale, space)
    except KeyError as error:
        raise ParseError(f"no dtype is called {error.args[0]!r}; there are {', '.join(DTYPES)}") from None
    except IRError as error:
        raise ParseError(f"{text!r} is no type: {error.message}") from None
    except ValueError:  # a number of more digits than int() takes
        pass
    raise ParseError(f"{text!r} is no type")


def _tensor(dtype: DType, dims: str, scale: str | None, space: str | None) -> TensorType:
    shape: list[Dim] = []
    groups: Dim | None = None
    placement: list[tuple[int, str]] = []
    for axis, part in enumerate(dims.split(",") if dims else []):
        match = _AXIS.fullmatch(part)
        if match is None or (axis and match[3] is not None):
            raise ParseError(f"{part!r} is no axis: 'size@mesh_axis', the first 'size@mesh_axis~groups'")
        shape.append(parse_dim(match[1]))
        if match[2] is not None:
            placement.append((axis, match[2]))
        if match[3] is not None:
            groups = parse_dim(match[3])
    block = parse_block(scale[2:]) if scale else None
    return TensorType(dtype, tuple(shape), groups, block, tuple(placement), space)
