"""The two ways of attending to cached latents, as ops; and for how many new tokens which of them is cheaper.

::

    absorbed   q_lat = head_linear(q_nope, W_UK); o = head_linear(latent_attention([q_lat | q_pe]), W_UV)
    expanded   k_nope, v = kv_b(c); o = attention(q, [k_nope | k_pe], v)

The first reads nothing but the latents, in rows as wide as they are; the second makes keys and values of all
of them, once, and attends in narrow rows. So the first is cheaper for few queries, the second for many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy

from moec.ir import Builder, CacheType, Function, Module, TensorType, Value
from moec.ir.cost import op_cost
from moec.ir.devices import DEVICES
from moec.ir.types import DTYPES, Dim, IndexType, i32, symbol

# Of absorb_below, where absorbing is cheaper for any number of new tokens.
ALWAYS = 2**31 - 1


@dataclass(frozen=True)
class Sizes:
    """Widths of q_nope (P), q_pe (R), a head's value (V) and c (C), and the dtype of all."""

    heads: int
    nope: int
    rope: int
    value: int
    rank: int
    dtype: str


@dataclass(frozen=True)
class Segment:
    """Sequences of a batch: what attention over the cache is given beside the queries."""

    cache: Value
    layer: Value
    table: Value
    cu_q: Value
    lens: Value
    entries: str  # the symbol that counts their entries


# Makes an op: ``make("split", x, sizes=(1, 2), out=("a", "b"))``.
Make = Callable[..., Any]


def absorbed(make: Make, q: Value, s: Segment, w_uk: Value, w_uv: Value, sizes: Sizes, **how: Any) -> Value:
    """[N, heads, V] of queries q [N, heads, P+R]; W_UK [heads, P, C], W_UV [heads, V, C]."""
    q_nope, q_pe = make("split", q, sizes=(sizes.nope, sizes.rope), out=("q_nope", "q_pe"))
    q_lat = make("head_linear", q_nope, w_uk, transposed=True, out="q_lat")
    q = make("concat", q_lat, q_pe, out="q.latent")
    where = (s.cache, s.layer, s.table, s.cu_q, s.lens)
    o_lat = make("latent_attention", q, *where, rank=sizes.rank, rows=s.entries, out="o_lat", **how)
    o: Value = make("head_linear", o_lat, w_uv, out="o.absorbed")
    return o


def expanded(make: Make, q: Value, s: Segment, cu_k: Value, w: Value, sizes: Sizes, **how: Any) -> Value:
    """The same with kv_b_proj's weight [heads·(P+V), C]; ``cu_k``: offsets of the sequences' entries."""
    stored = s.cache.type
    to = DTYPES[sizes.dtype] if isinstance(stored, CacheType) and stored.quantised else None
    latent = make("cache_read", s.cache, s.layer, s.table, s.lens, rows=s.entries, to=to, out="latent.long")
    c, k_pe = make("split", latent, sizes=(sizes.rank, sizes.rope), out=("c.long", "k_pe.long"))
    kv = make("linear", c, w, out="kv_b.long")
    each: tuple[Dim, ...] = (symbol(s.entries), sizes.heads, sizes.nope + sizes.value)
    kv = make("reshape", kv, shape=each, out="kv_b.heads")
    k_nope, v = make("split", kv, sizes=(sizes.nope, sizes.value), out=("k_nope", "v"))
    k_pe = make("broadcast", k_pe, axis=1, size=sizes.heads, out="k_pe.heads")
    k = make("concat", k_nope, k_pe, out="k")
    o: Value = make("attention", q, k, v, s.cu_q, cu_k, out="o.expanded", **how)
    return o


@cache
def crossover(sizes: Sizes, target: str = "") -> int:
    """The fewest new tokens of a sequence with many more cached ones for which expanding is as cheap.

    By the ops of both forms: for each cached entry the time that a roofline gives them on ``target``'s
    device, or their FLOPs where there is no such device. Costs that don't grow with the entries don't count,
    nor does what computes nothing: views, and the concat that repeats k_pe beside each head's k_nope.

    That concat is a real copy where PyTorch's ``cat`` makes it. It is left out since the comparison is of two
    forms, not of their kernels: one that reads k_nope and k_pe where they lie needs no copy, and the bound
    shouldn't move the day there is one. With it DeepSeek-V3 on an H100 would expand from 304 new tokens on
    (98,304 bytes an entry take 33 ns), not from 199; ``absorb_below`` takes what was measured.

    DeepSeek-V3 by FLOPs: 2·128 heads·(2C+R)·Sq absorbed, 2·128·((P+R+V)·Sq + C·(P+V)) expanded: 171.
    """
    seconds = [_per_entry(module, sizes.dtype, target) for module in _forms(sizes)]

    def absorbing_pays(queries: int) -> bool:
        by_absorbing, by_expanding = (each(queries) for each in seconds)
        return by_absorbing < by_expanding

    if not absorbing_pays(1):
        return 1
    least = 1  # of those known to absorb
    while absorbing_pays(2 * least):
        least *= 2
        if least >= ALWAYS // 2:
            return ALWAYS
    most = 2 * least
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if absorbing_pays(middle) else (least, middle)
    return most


def _forms(sizes: Sizes) -> list[Function]:
    """Functions of the two forms for one sequence of N new tokens and S cached ones."""
    dtype, heads = DTYPES[sizes.dtype], sizes.heads
    entry = sizes.rank + sizes.rope
    found = []
    for name in ("absorbed", "expanded"):
        f = Function(name)
        b = Builder(Module(name), f, dtype)
        q = f.add_argument("q", TensorType(dtype, (symbol("N"), heads, sizes.nope + sizes.rope)))
        segment = Segment(
            f.add_argument("kv", CacheType(dtype, (entry,), 64)),
            f.add_argument("layer", IndexType()),
            f.add_argument("table", TensorType(i32, (1, symbol("P")))),
            f.add_argument("cu_q", TensorType(i32, (2,))),
            f.add_argument("lens", TensorType(i32, (1,))),
            "S",
        )

        def make(op: str, *operands: Any, b: Builder = b, **attrs: Any) -> Any:
            return getattr(b, op)(*operands, **attrs)

        if name == "absorbed":
            w_uk, w_uv = (
                b.param(n, (heads, d, sizes.rank)) for n, d in (("uk", sizes.nope), ("uv", sizes.value))
            )
            absorbed(make, q, segment, w_uk, w_uv, sizes, scale=1.0)
        else:
            w = b.param("w", (heads * (sizes.nope + sizes.value), sizes.rank))
            expanded(make, q, segment, segment.cu_q, w, sizes, scale=1.0)
        found.append(f)
    return found


def _per_entry(function: Function, dtype: str, target: str) -> Callable[[int], float]:
    """Seconds (or FLOPs) that each cached entry adds to ``function``, for a number of queries."""
    device, queries, entries = DEVICES.get(target), symbol("N"), symbol("S")
    slopes = []
    for op in function.ops:
        cost = op_cost(op)
        if sympy.sympify(cost.flops).is_zero:
            continue
        each = [
            sympy.Poly(sympy.sympify(c), queries, entries).coeff_monomial(m)
            for c in (cost.flops, cost.bytes)
            for m in (entries, queries * entries)
        ]
        slopes.append([float(x) for x in each])

    def at(n: int) -> float:
        total = 0.0
        for flops, flops_a_query, moved, moved_a_query in slopes:
            work = flops + flops_a_query * n
            if device is None:
                total += work
            else:
                traffic = moved + moved_a_query * n
                total += max(work / device.flops_of(dtype), traffic / device.bandwidth)
        return total

    return at
