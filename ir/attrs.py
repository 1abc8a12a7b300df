"""Attribute kinds: how an op's attribute is checked, printed and parsed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

import sympy

from moec.errors import ParseError
from moec.ir.types import DTYPES, DType, as_dim, format_block, format_dim, parse_block, parse_dim

_WORD = re.compile(r"[A-Za-z_@*][\w.@*+-]*")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Range:
    """``first..last``, both included: the layers or experts that a loop runs for. ``0..-1`` is empty."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last + 1))

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"


@dataclass(frozen=True)
class Kind:
    """A kind of attribute. ``parse(print(v)) == v`` for every ``v`` that ``check`` accepts."""

    name: str
    check: Callable[[Any], bool]
    print: Callable[[Any], str]
    parse: Callable[[str], Any]
    doc: str = ""  # how it is written


def _parse_int(text: str) -> int:
    return int(text)


def _parse_bool(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _print_str(value: str) -> str:
    return value if _WORD.fullmatch(value) else json.dumps(value)


def _parse_str(text: str) -> str:
    if _WORD.fullmatch(text):
        return text
    value = json.loads(text)
    if not isinstance(value, str):
        raise ValueError(f"{text} is no string")
    return value


def _parse_range(text: str) -> Range:
    first, last = text.split("..")
    return Range(int(first), int(last))


def _items(text: str) -> list[str]:
    if text[0] != "[" or text[-1] != "]":
        raise ParseError(f"{text!r} is no list")
    return [item.strip() for item in text[1:-1].split(",")] if text[1:-1].strip() else []


def _print_number(value: int | None) -> str:
    return "_" if value is None else str(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _all_ints(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_int, value))


def _is_dim(value: Any) -> bool:
    return _is_int(value) or isinstance(value, sympy.Expr)


def _is_symbol(value: Any) -> bool:
    return isinstance(value, str) and bool(_SYMBOL.fullmatch(value)) and not iskeyword(value)


def _is_range(value: Any) -> bool:
    return isinstance(value, Range) and 0 <= value.first <= value.last + 1


INT = Kind("int", _is_int, str, _parse_int, "`8`")
FLOAT = Kind("float", lambda v: isinstance(v, float) and v == v, repr, float, "`1e-06`, `inf`; not NaN")
BOOL = Kind("bool", lambda v: isinstance(v, bool), lambda v: str(v).lower(), _parse_bool, "`true`, `false`")
STR = Kind("str", lambda v: isinstance(v, str), _print_str, _parse_str, '`a.word`, or `"quoted"` as in JSON')
DTYPE = Kind("dtype", lambda v: isinstance(v, DType), str, lambda t: DTYPES[t], "`bf16`")
SYMBOL = Kind("symbol", _is_symbol, str, str, "`S`: the name of a size that the op defines")
RANGE = Kind("range", _is_range, str, _parse_range, "`0..7`: both ends included; `0..-1` is empty")
INTS = Kind(
    "ints",
    _all_ints,
    lambda v: f"[{','.join(map(str, v))}]",
    lambda t: tuple(int(item) for item in _items(t)),
    "`[512,64]`",
)
DIMS = Kind(
    "dims",
    lambda v: isinstance(v, tuple) and all(map(_is_dim, v)),
    lambda v: f"[{','.join(map(format_dim, v))}]",
    lambda t: tuple(as_dim(parse_dim(item)) for item in _items(t)),
    "`[8*N,64]`: sizes of a shape, with `+ - * //` and brackets",
)
BLOCK = Kind(
    "block",
    lambda v: _all_ints(v) and len(v) > 0 and min(v) >= 0,
    format_block,
    parse_block,
    "`128x128`; `1x*`: `*` is the whole axis",
)
NUMBERS = Kind(
    "numbers",
    lambda v: isinstance(v, tuple) and len(v) > 0 and all(n is None or (_is_int(n) and n >= 0) for n in v),
    lambda v: _print_number(v[0]) if len(v) == 1 else f"[{','.join(map(_print_number, v))}]",
    lambda t: tuple(None if n == "_" else int(n) for n in (_items(t) if t[:1] == "[" else [t])),
    "`3`, `[3,_,4]`: one for each result, `_` for none",
)


def choice(*names: str) -> Kind:
    """One of these words."""
    return Kind("|".join(names), lambda v: v in names, str, str)
