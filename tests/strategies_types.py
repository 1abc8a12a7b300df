"""Hypothesis strategies over dimensions, types and attributes of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from moec.ir import CacheType, Range, TensorType
from moec.ir.types import DTYPES, Dim, IndexType, TokenType, Type, as_dim, bf16, f32, symbol

Draw = Callable[[st.SearchStrategy[Any]], Any]
of = st.sampled_from
f8e4m3 = DTYPES["f8e4m3"]
N, B = symbol("N"), symbol("B")


def dims() -> st.SearchStrategy[Dim]:
    leaf = st.integers(0, 9).map(as_dim) | of([N, B, symbol("seq_len")])

    def grow(inner: st.SearchStrategy[Dim]) -> st.SearchStrategy[Dim]:
        pair = st.tuples(inner, inner)
        sums = pair.map(lambda p: as_dim(p[0] + p[1]))
        products = pair.map(lambda p: as_dim(p[0] * p[1]))
        halves = st.tuples(inner, st.integers(1, 5)).map(lambda p: as_dim(p[0] // p[1]))
        ceilings = st.tuples(inner, st.integers(1, 5)).map(lambda p: as_dim(-(-p[0] // p[1])))
        return sums | products | halves | ceilings

    return st.recursive(leaf, grow, max_leaves=5)


@st.composite
def tensor_types(draw: Draw) -> TensorType:
    shape = tuple(draw(st.lists(dims(), max_size=4)))
    axes = draw(st.sets(st.integers(0, len(shape) - 1), max_size=2)) if shape else set()
    return TensorType(
        draw(of(list(DTYPES.values()))),
        shape,
        groups=draw(st.none() | dims()) if shape else None,
        scale=draw(st.none() | st.tuples(*[st.integers(0, 256)] * draw(st.integers(1, len(shape)))))
        if shape
        else None,
        placement=tuple((axis, draw(of(["ep", "tp"]))) for axis in axes),
        space=draw(of([None, "host"])),
    )


def types() -> st.SearchStrategy[Type]:
    entries = st.lists(st.integers(1, 600), min_size=1, max_size=2).map(tuple)
    pages = st.integers(1, 128)
    caches = st.builds(CacheType, of([f32, bf16]), entries, pages)
    scales = st.floats(2.0**-140, 2.0**100)
    caches |= st.builds(CacheType, st.just(f8e4m3), entries, pages, st.just(0), scales)
    latent = st.builds(CacheType, st.just(bf16), st.tuples(st.integers(300, 600)), pages)
    caches |= st.builds(CacheType.packed, latent, st.integers(1, 300))
    return tensor_types() | caches | of([IndexType(), TokenType("rng")])


# Attributes, by kind; the values of a choice come from its name.
ATTRIBUTES: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(-(10**12), 10**12),
    "float": st.floats(allow_nan=False),
    "bool": st.booleans(),
    "str": st.text() | st.text(alphabet='",;{}[]()<>\\\n\r\u2028 =:@%$_a'),
    "dtype": of(list(DTYPES.values())),
    "symbol": st.from_regex(r"[A-Z][A-Za-z0-9_]{0,5}", fullmatch=True),
    "range": st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda p: Range(p[0], p[0] + p[1] - 1)),
    "ints": st.lists(st.integers(-9, 999)).map(tuple),
    "dims": st.lists(dims()).map(tuple),
    "block": st.lists(st.integers(0, 256), min_size=1, max_size=3).map(tuple),
}
