"""Hypothesis strategies over IR: whole well-typed functions, with inputs to run them on.

Each op has an entry in ``DRAW``: a function that appends the op to a ``Graph``, with operands taken from the
graph or made for it. A contract test fails for an op without one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from moec.errors import SourceLoc
from moec.ir import CacheType, DType, Function, Module, Range, TensorType, Value
from moec.ir.op import op_class
from moec.ir.ops.attention import PagedCache
from moec.ir.types import DTYPES, Dim, IndexType, Type, as_dim, bf16, block_count, f16, f32, i32, i64, symbol
from tests.strategies_types import B, Draw, N, of

small = st.integers(1, 4)

VALUE_NAMES = of(["", "h", "x.q", "k_pe", "up-proj", "_0"])


# Functions.
@dataclass
class Case:
    """A module whose function @main runs on ``args`` with ``weights``."""

    module: Module
    args: list[Any]
    weights: dict[str, torch.Tensor]


@dataclass
class Graph:
    """A function that grows, with the run-time values of its arguments and parameters."""

    draw: Draw
    module: Module
    function: Function
    lengths: list[int]  # of each sequence's new tokens; they add up to N
    args: list[Any] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    routed: list[tuple[Value, Value, int, int]] = field(default_factory=list)  # w, id, experts, k
    cache: Value | None = None
    depth: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def argument(self, type: Type, data: Any) -> Value:
        self.args.append(data)
        return self.function.add_argument("in", type)

    def size(self, dim: Dim) -> int:
        return dim if isinstance(dim, int) else int(dim.subs({N: self.tokens, B: len(self.lengths)}))

    def data(self, dtype: DType, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.draw(st.integers(0, 99)))
        return torch.randn(shape, generator=generator).to(dtype.torch)

    def fresh(self, dtype: DType, *shape: Dim) -> Value:
        return self.argument(TensorType(dtype, shape), self.data(dtype, *map(self.size, shape)))

    def integers(self, values: list[int] | torch.Tensor, *shape: Dim, dtype: DType = i32) -> Value:
        return self.argument(TensorType(dtype, shape), torch.as_tensor(values, dtype=dtype.torch))

    def param(self, dtype: DType, *shape: int) -> Value:
        name = f"layer.{len(self.weights)}.weight"
        self.weights[name] = self.data(dtype, *shape)
        return self.function.param(name, TensorType(dtype, shape))

    def known(self, fits: Callable[[TensorType], bool]) -> Value | None:
        """A float tensor that the graph already has and that fits, or None."""
        found = [v for v in self.floats() if fits(v.type)]
        return self.draw(of(found)) if found and self.draw(st.booleans()) else None

    def floats(self) -> list[Value]:
        tensors = [v for v in self.function.values() if isinstance(v.type, TensorType)]
        return [v for v in tensors if v.type.dtype in (f32, bf16, f16)]

    def x(self, *shape: Dim) -> Value:
        """A float tensor of this shape; of any with at least one axis where none is given."""
        value = self.known(lambda t: t.shape == shape if shape else t.rank > 0 and sized(t))
        return value or self.fresh(self.draw(of([f32, bf16])), *(shape or (N, self.draw(small))))

    def op(self, name: str, *operands: Value | None, **attrs: Any) -> Any:
        loc = self.draw(of([None, SourceLoc("my model.py", 88, "MoE.lower"), SourceLoc("<stdin>", 3)]))
        op = op_class(name)(operands, attrs, loc)
        op.origin = self.draw(of(["", "permute-fusion(%xp, %gu)"]))
        results = self.function.create(op, [self.draw(VALUE_NAMES)]).results
        return results[0] if len(results) == 1 else results


def sized(type: TensorType) -> bool:
    """Whether a shape is known outside: it speaks of N and B only."""
    return all(isinstance(d, int) or d.free_symbols <= {N, B} for d in type.shape)


DRAW: dict[str, Callable[[Graph], Any]] = {}


def draws(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what appends an op; one that serves several receives the name too."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            DRAW[name] = function if len(names) == 1 else lambda g, name=name: function(g, name)
        return function

    return register


@draws("add", "mul")
def _binary(g: Graph, name: str) -> Any:
    a = g.x()
    kept = a.type.shape[g.draw(st.integers(0, a.type.rank - 1)) :]
    b = g.fresh(a.type.dtype, *(1 if g.draw(st.booleans()) else d for d in kept))
    return g.op(name, *g.draw(st.permutations([a, b])))


@draws("sigmoid")
def _sigmoid(g: Graph) -> Any:
    return g.op("sigmoid", g.x())


@draws("clamp")
def _clamp(g: Graph) -> Any:
    lo, hi = sorted([g.draw(st.floats(-2, 2)), g.draw(st.floats(-2, 2))])
    return g.op("clamp", g.x(), lo=lo, hi=hi)


@draws("cast")
def _cast(g: Graph) -> Any:
    return g.op("cast", g.x(), to=g.draw(of([f32, bf16, f16, DTYPES["f8e4m3"]])))


@draws("zeros_like")
def _zeros_like(g: Graph) -> Any:
    return g.op("zeros_like", g.x(), dtype=g.draw(of([f32, bf16, i64])))


@draws("swiglu")
def _swiglu(g: Graph) -> Any:
    how = _gate(g)
    if g.draw(st.booleans()):
        gate = g.x()
        up = g.fresh(gate.type.dtype, *gate.type.shape) if plain(gate) else gate
        return g.op("swiglu", gate, up, **how)
    return g.op("swiglu", g.fresh(g.draw(of([f32, bf16])), N, 2 * g.draw(small)), **how)


def _gate(g: Graph) -> dict[str, Any]:
    return {"act": g.draw(of(["silu", "gelu", "gelu_tanh"])), "limit": g.draw(of([None, 0.25]))}


def plain(value: Value) -> bool:
    return value.type == TensorType(value.type.dtype, value.type.shape)


@draws("linear")
def _linear(g: Graph) -> Any:
    if g.draw(of([False, False, True])):
        return _scaled_linear(g)
    x = g.known(lambda t: t.rank > 0 and isinstance(t.shape[-1], int)) or g.fresh(f32, N, 3)
    n = g.draw(small)
    w = g.param(x.type.dtype, n, x.type.shape[-1])
    return g.op(
        "linear", x, w, g.param(f32, n) if g.draw(st.booleans()) else None, acc=g.draw(of([None, f32, bf16]))
    )


def _scaled_linear(g: Graph) -> Any:
    n, k = g.draw(small), g.draw(st.integers(1, 9))
    x = g.op("quant", g.x(N, k), block=_row_block(g), scale=g.draw(FORMATS))
    bias = g.param(f32, n) if g.draw(st.booleans()) else None
    return g.op("linear", x, _quantised_weight(g, n, k), bias, acc=g.draw(of([None, f32, bf16])))


@draws("head_linear")
def _head_linear(g: Graph) -> Any:
    heads, k, m, turned = g.draw(small), g.draw(small), g.draw(small), g.draw(st.booleans())
    x = g.x(N, heads, k)
    shape = (heads, k, m) if turned else (heads, m, k)
    return g.op("head_linear", x, g.param(x.type.dtype, *shape), transposed=turned)


@draws("rms_norm")
def _rms_norm(g: Graph) -> Any:
    x = g.known(lambda t: t.rank > 0 and isinstance(t.shape[-1], int)) or g.fresh(f32, N, 3)
    return g.op("rms_norm", x, g.param(f32, x.type.shape[-1]), eps=g.draw(of([1e-6, 1e-5])), **_quant_of(g))


def _quant_of(g: Graph) -> dict[str, Any]:
    """The quantisation at the end of a norm, or none."""
    if g.draw(st.booleans()):
        return {}
    return {"quant": g.draw(of([(1, 2), (1, 0)])), "scale": g.draw(of(["fp32", "ue8m0"]))}


@draws("add_rms_norm", "add_rms_norm_and_quant")
def _add_rms_norm(g: Graph, name: str) -> Any:
    quant = _quant_of(g)
    if name != "add_rms_norm":
        quant = quant or {"quant": (1, 2)}
    x = g.fresh(g.draw(of([f32, bf16])), N, g.draw(small))
    w = g.param(f32, x.type.shape[-1])
    return g.op(
        name,
        x,
        g.fresh(x.type.dtype, *x.type.shape),
        w,
        eps=g.draw(of([1e-6, 1e-5])),
        **quant,
    )


@draws("embedding")
def _embedding(g: Graph) -> Any:
    ids = g.draw(st.lists(st.integers(0, 4), min_size=g.tokens, max_size=g.tokens))
    return g.op("embedding", g.integers(ids, N, dtype=i64), g.param(bf16, 5, g.draw(small)))


@draws("rope_table")
def _rope_table(g: Graph, dim: int = 8) -> Any:
    positions = g.draw(st.lists(st.integers(0, 9999), min_size=g.tokens, max_size=g.tokens))
    scaling = g.draw(of(["none", "linear", "yarn", "llama3"]))
    how = {"factor": 4.0, "original": 64} if scaling in ("yarn", "llama3") else {}
    return g.op("rope_table", g.integers(positions, N, dtype=i64), dim=dim, theta=1e4, scaling=scaling, **how)


@draws("rope")
def _rope(g: Graph) -> Any:
    cos, sin = _rope_table(g, 4)
    x = g.x(N, 4) if g.draw(st.booleans()) else g.x(N, 2, 4)
    return g.op("rope", x, cos, sin, layout=g.draw(of(["interleaved", "half"])))


@draws("reshape")
def _reshape(g: Graph) -> Any:
    if g.draw(of([False, False, True])):
        rows, each, k = g.draw(small), g.draw(small), g.draw(st.integers(1, 5))
        x = g.op("quant", g.param(f32, rows * each, k), block=(each, g.draw(of([0, 1, 2]))))
        return g.op("reshape", x, shape=(rows, each, k))
    x = g.x()
    first, *rest = x.type.shape
    shape = g.draw(of([(x.type.numel,), (*rest, first), (first, 1, *rest)]))
    return g.op("reshape", x, shape=shape)


@draws("split")
def _split(g: Graph) -> Any:
    if g.draw(of([False, False, True])):
        block, axis = g.draw(of([0, 1, 2])), g.draw(of([0, 1, 2, -1]))
        x = g.op("quant", g.param(f32, 4, 4, 4), block=(block, block), scale=g.draw(FORMATS))
        return g.op("split", x, sizes=g.draw(of([(2, 2), (4,)])), axis=axis)
    x = g.known(lambda t: t.rank > 0 and isinstance(t.shape[-1], int) and t.shape[-1] > 0) or g.fresh(
        f32, N, 4
    )
    last = x.type.shape[-1]
    cut = g.draw(st.integers(0, last - 1))
    return g.op(
        "split", x, sizes=(cut, last - cut) if cut else (last,), axis=g.draw(of([-1, x.type.rank - 1]))
    )


@draws("concat")
def _concat(g: Graph) -> Any:
    if g.draw(of([False, False, True])):
        block, axis = g.draw(of([1, 2])), g.draw(of([0, 1, -1]))
        parts = [g.op("quant", g.param(f32, 4, 4), block=(block, 2)) for _ in range(g.draw(of([1, 2])))]
        return g.op("concat", *parts, axis=axis)
    x = g.x()
    return g.op("concat", *[x] * g.draw(small), axis=g.draw(st.integers(-x.type.rank, x.type.rank - 1)))


@draws("broadcast")
def _broadcast(g: Graph) -> Any:
    x = g.x()
    return g.op("broadcast", x, axis=g.draw(st.integers(0, x.type.rank)), size=g.draw(small))


@draws("prefix_sum")
def _prefix_sum(g: Graph) -> Any:
    return g.op("prefix_sum", g.integers(g.lengths, B))


# Attention.
@draws("attention")
def _attention(g: Graph) -> Any:
    more = [n + g.draw(st.integers(0, 3)) for n in g.lengths]
    keys, kv, d = symbol(f"K{len(g.args)}"), g.draw(of([1, 2])), g.draw(small)
    q = g.x(N, kv * g.draw(of([1, 2])), d)
    k, v = (
        g.argument(TensorType(q.type.dtype, (keys, kv, w)), g.data(q.type.dtype, sum(more), kv, w))
        for w in (d, g.draw(small))
    )
    cu_q, cu_k = (g.integers(torch.tensor([0, *lens]).cumsum(0), as_dim(B + 1)) for lens in (g.lengths, more))
    causal, window = g.draw(st.booleans()), g.draw(of([0, 1, 3]))
    return g.op("attention", q, k, v, cu_q, cu_k, scale=0.5, causal=causal, window=window)


f8e4m3 = DTYPES["f8e4m3"]
PAGE = CacheType(f32, (2, 3), 4)
PAGE8 = CacheType(f8e4m3, (2, 3), 4, scale=0.5)
PAGES = 8


def _kept(g: Graph, type: CacheType, written: torch.Tensor, rank: int | None = None) -> Value:
    """A cache of its own, plain or in 8 bits; packed where it's said how many elements are latent."""
    types = [type, type, dataclasses.replace(type, dtype=f8e4m3, scale=g.draw(of([1.0, 0.3])))]
    type = g.draw(of(types if rank is None else [*types, type.packed(rank)]))
    return g.argument(type, PagedCache(type.page, {0: written}).stored_as(type))


@draws("cache_write")
def _cache_write(g: Graph) -> Any:
    known = g.cache if g.cache is not None and g.cache.type in (PAGE, PAGE8) else None
    type = g.draw(of([PAGE, PAGE8]))
    empty = torch.full((4 * PAGES, 2, 3), torch.nan, dtype=type.dtype.torch)
    cache = known or g.argument(type, PagedCache(4, {0: empty}, type))
    slots = g.draw(st.lists(st.integers(-1, 4 * PAGES - 1), min_size=g.tokens, max_size=g.tokens))
    entry = g.fresh(f32, N, 2, 3)
    g.cache = g.op("cache_write", cache, g.argument(IndexType(), 0), entry, g.integers(slots, N))
    return g.cache


def _table(g: Graph, width: int) -> tuple[Value, Value]:
    return g.fresh(f32, N, width // 2), g.fresh(f32, N, width // 2)


def _heads(
    g: Graph, dtype: DType, heads: int, columns: int
) -> tuple[Value, Value, Value | None, dict[str, Any]]:
    """cos, sin, perhaps a norm's weight, and the attributes of what turns heads of so many columns."""
    width = g.draw(of([n for n in (2, 4) if n <= columns]))
    norm, w, eps = "head", None, 0.0
    if g.draw(st.booleans()):
        norm, eps = g.draw(of(["head", "full"])), 1e-3
        w = g.param(g.draw(of([f32, dtype])), columns * (heads if norm == "full" else 1))
    how = {"norm": norm, "eps": eps, "layout": g.draw(of(["interleaved", "half"]))}
    how["start"] = g.draw(st.integers(0, columns - width))
    if g.draw(st.booleans()):
        how |= {"lo": -0.5, "hi": 0.5}
    return *_table(g, width), w, how


@draws("norm_rope")
def _norm_rope(g: Graph) -> Any:
    dtype, heads, columns = g.draw(of([f32, bf16])), g.draw(small), g.draw(st.integers(2, 5))
    cos, sin, w, how = _heads(g, dtype, heads, columns)
    before = g.fresh(dtype, N, heads, g.draw(small)) if g.draw(st.booleans()) else None
    return g.op("norm_rope", g.fresh(dtype, N, heads, columns), cos, sin, w, before, **how)


def _writable(g: Graph, *entry: int, rank: int | None = None) -> tuple[Value, Value, Value]:
    """A cache of its own, a layer's number, and different slots, some of them none."""
    cache = _kept(g, CacheType(f32, entry, 4), torch.full((4 * PAGES, *entry), torch.nan), rank)
    places = g.draw(st.permutations(range(4 * PAGES)))[: g.tokens]
    slots = [p if g.draw(st.booleans()) else -1 for p in places]
    return cache, g.argument(IndexType(), 0), g.integers(slots, N)


@draws("kv_cache_write")
def _kv_cache_write(g: Graph) -> Any:
    heads, columns = g.draw(small), g.draw(st.integers(2, 5))
    cache, layer, slots = _writable(g, 2 * heads, columns)
    cos, sin, w, how = _heads(g, f32, heads, columns)
    k, v = g.fresh(f32, N, heads, columns), g.fresh(f32, N, heads, columns)
    how["clamp_v"] = g.draw(st.booleans())
    g.cache = g.op("kv_cache_write", cache, layer, k, v, cos, sin, slots, w, **how)
    return g.cache


@draws("latent_cache_write")
def _latent_cache_write(g: Graph) -> Any:
    rank, width = g.draw(small), g.draw(of([2, 4]))
    cache, layer, slots = _writable(g, rank + width, rank=rank)
    kv_a, w, (cos, sin) = g.fresh(f32, N, rank + width), g.param(f32, rank), _table(g, width)
    how = {"eps": 1e-3, "layout": g.draw(of(["interleaved", "half"]))}
    g.cache = g.op("latent_cache_write", cache, layer, kv_a, w, cos, sin, slots, **how)
    return g.cache


@draws("cache_read")
def _cache_read(g: Graph) -> Any:
    if g.cache is None or g.cache.type not in (PAGE, PAGE8):
        _cache_write(g)
    sequences, pages = len(g.lengths), symbol(f"P{len(g.args)}")
    table = g.draw(st.lists(st.integers(0, PAGES - 1), min_size=2 * sequences, max_size=2 * sequences))
    lens = g.draw(st.lists(st.integers(0, 8), min_size=sequences, max_size=sequences))
    return g.op(
        "cache_read",
        g.cache,
        g.argument(IndexType(), 0),
        g.integers(torch.tensor(table, dtype=torch.int32).view(sequences, 2), B, pages),
        g.integers(lens, B),
        rows=f"S{len(g.args)}",
        to=g.draw(of([f32, bf16])) if g.cache.type == PAGE8 else None,
    )


@draws("paged_attention", "latent_attention")
def _paged_attention(g: Graph, name: str) -> Any:
    """Over pages in any order, some of them several times, nothing written behind a sequence's end."""
    latent, kv = name == "latent_attention", g.draw(small)
    width, page = g.draw(small), g.draw(of([1, 2, 3]))
    lens = [max(0, n + g.draw(st.integers(-1, 5))) for n in g.lengths]
    numbers = [g.draw(st.permutations(range(PAGES))) for _ in lens]
    entry = (width,) if latent else (2 * kv, width)
    written = torch.full((PAGES * page, *entry), torch.nan)
    full = [t[: n // page] for t, n in zip(numbers, lens, strict=True)]
    for t, n in zip(numbers, lens, strict=True):
        if n % page and t[n // page] not in {p for whole in full for p in whole}:
            written[t[n // page] * page :][: n % page] = g.data(f32, n % page, *entry)
    for t in full:
        for at in t:
            written[at * page :][:page] = g.data(f32, page, *entry)
    rank = g.draw(st.integers(1, width)) if latent else None
    cache = _kept(g, CacheType(f32, entry, page), written, rank)
    table = torch.tensor(numbers, dtype=torch.int32).view(len(lens), PAGES)
    return g.op(
        name,
        # In fp32: below it kernels round intermediates, which tiny results may be made of.
        g.fresh(f32, N, g.draw(small) if latent else kv * g.draw(of([1, 2])), width),
        cache,
        g.argument(IndexType(), 0),
        g.integers(table, B, PAGES),
        g.integers(torch.tensor([0, *g.lengths]).cumsum(0), as_dim(B + 1)),
        g.integers(lens, B),
        scale=0.5,
        causal=g.draw(st.booleans()),
        window=g.draw(of([0, 1, 3])),
        rows=f"S{len(g.args)}",
        **({"rank": rank} if latent else {}),
    )


# Parts of a batch.
@draws("split_batch")
def _split_batch(g: Graph) -> Any:
    owned = g.lengths[:-1] if g.lengths and g.draw(st.booleans()) else g.lengths  # rows that nothing owns
    bounds = torch.tensor([0, *owned, *[0] * (len(g.lengths) - len(owned))]).cumsum(0)
    number = len(g.args)
    return g.op(
        "split_batch",
        g.x(N, 3),
        g.integers(bounds, as_dim(B + 1)),
        g.integers([n + 1 for n in g.lengths], B),
        g.integers(torch.arange(2 * len(g.lengths)).view(-1, 2), B, 2),
        below=g.draw(st.integers(1, 4)),
        rows=f"N{number}",
        sequences=f"B{number}",
    )


@draws("take_rows")
def _take_rows(g: Graph) -> Any:
    rows = g.draw(st.lists(st.integers(0, g.tokens - 1), unique=True)) if g.tokens else []
    return g.op("take_rows", g.x(N, g.draw(small)), g.integers(sorted(rows), symbol(f"M{len(g.args)}")))


@draws("merge_rows")
def _merge_rows(g: Graph) -> Any:
    short_rows, *_, long_rows, _, _, _ = _split_batch(g)
    x = g.x(N, g.draw(small))
    a, b = g.op("take_rows", x, short_rows), g.op("take_rows", x, long_rows)
    return g.op("merge_rows", a, short_rows, b, long_rows)


# Experts.
def _beside(g: Graph, name: str) -> tuple[list[Value], dict[str, Any]]:
    """What an op takes beside its sort where it quantises, and how."""
    if not name.endswith("_and_quant"):
        return [], {}
    how = {"quant": g.draw(of([(1, 2), (1, 0), (0, 0)])), "quant_scale": g.draw(FORMATS)}
    return [g.fresh(g.draw(of([f32, bf16])), N, g.draw(small))], how


@draws("route", "route_sort", "route_sort_and_quant")
def _route(g: Graph, name: str = "route") -> Any:
    x, how = _beside(g, name)
    groups, each = g.draw(of([1, 2, 3])), g.draw(of([2, 3]))
    kept, experts = g.draw(st.integers(1, groups)), groups * each
    k = g.draw(st.integers(1, kept * each))
    w, id, *order = g.op(
        name,
        g.x(N, experts),
        g.param(f32, experts) if g.draw(st.booleans()) else None,
        *x,
        score=g.draw(of(["softmax", "sigmoid", "sqrtsoftplus"])),
        k=k,
        renorm=g.draw(st.booleans()),
        scale=g.draw(of([1.0, 2.5])),
        groups=groups,
        topk_groups=kept,
        group_score=g.draw(of(["max", "top2sum"])),
        masked=g.draw(of(["zero", "neginf"])),
        dtype=g.draw(of([f32, bf16])),
        shared=(shared := g.draw(of([0, 0, 2]))),
        **how,
    )
    g.routed.append((w, id, experts + shared, k + shared))
    return w, id, *order


@draws("hash_route")
def _hash_route(g: Graph) -> Any:
    """Some tokens without a row, some entries that name no expert."""
    experts, k, vocab = g.draw(small), g.draw(small), 5
    ids = g.draw(st.lists(st.integers(-1, vocab), min_size=g.tokens, max_size=g.tokens))
    entry = st.lists(st.integers(-1, experts), min_size=k, max_size=k)
    table = g.draw(st.lists(entry, min_size=vocab, max_size=vocab))
    kind = g.draw(of([i32, i64]))
    return g.op(
        "hash_route",
        g.x(N, experts),
        g.integers(table, vocab, k, dtype=kind),
        g.integers(ids, N, dtype=i64),
        score=g.draw(of(["sigmoid", "sqrtsoftplus"])),
        k=k,
        renorm=g.draw(st.booleans()),
        scale=g.draw(of([1.0, 1.5])),
        dtype=g.draw(of([f32, bf16])),
    )


def _choice(g: Graph) -> tuple[Value, Value, int, int]:
    if not g.routed:
        _route(g)
    return g.draw(of(g.routed))


@draws("expert_slots")
def _expert_slots(g: Graph, choice: tuple[Value, Value, int, int] | None = None) -> Any:
    _, id, experts, _ = choice or _choice(g)
    expert = g.argument(IndexType(), g.draw(st.integers(0, experts - 1)))
    return g.op("expert_slots", id, expert, rows=f"R{len(g.args)}")


@draws("sort_by_expert", "sort_by_expert_and_quant")
def _sort_by_expert(g: Graph, name: str) -> Any:
    if name == "sort_by_expert":
        return _sorted(g)[0]
    _, id, routed, _ = _choice(g)
    x, how = _beside(g, name)
    return g.op(name, id, *x, experts=g.draw(st.integers(1, routed)), **how)


def _sorted(g: Graph) -> tuple[tuple[Value, Value], Value, int, int]:
    """Slots sorted by expert and their offsets; weights, experts, k. Some slots may be those of no expert."""
    w, id, routed, k = _choice(g)
    experts = g.draw(st.integers(1, routed))
    return g.op("sort_by_expert", id, experts=experts), w, experts, k


@draws("local_experts", "local_sort", "local_sort_and_quant")
def _local_experts(g: Graph, name: str) -> Any:
    w, id, routed, _ = _choice(g)
    x, how = _beside(g, name)
    return g.op(name, w, id, *x, first=g.draw(st.integers(0, routed)), experts=g.draw(small), **how)


@draws("gather_rows")
def _gather_rows(g: Graph) -> Any:
    (slot, _), _, _, k = _sorted(g)
    x = g.x(N, g.draw(small))
    if g.draw(of([False, False, True])):
        x = g.op("quant", x, block=_row_block(g), scale=g.draw(FORMATS))
    return g.op("gather_rows", x, slot, per_row=k)


@draws("scatter_add")
def _scatter_add(g: Graph) -> Any:
    w, _, _, k = choice = _choice(g)
    slot, h = _expert_slots(g, choice), g.draw(small)
    rows = g.op("gather_rows", g.x(N, h), slot, per_row=k)
    return g.op("scatter_add", g.fresh(f32, N, h), rows, slot, w, per_row=k)


def _grouped(g: Graph) -> tuple[Value, Value, Value]:
    """Rows through the experts, their slots, and the weights of these."""
    (slot, off), w, experts, k = _sorted(g)
    x = g.x(N, g.draw(small))
    rows = g.op("gather_rows", x, slot, per_row=k)
    shape = experts, g.draw(small), x.type.shape[1]
    if g.draw(of([False, False, True])):
        rows = g.op("quant", rows, block=_row_block(g))
        product = g.op("grouped_linear", rows, _quantised_weight(g, *shape), off, to=g.draw(of([None, f32])))
        return product, slot, w
    return g.op("grouped_linear", rows, g.param(x.type.dtype, *shape), off), slot, w


@draws("grouped_linear")
def _grouped_linear(g: Graph) -> Any:
    rows, slot, _ = _grouped(g)
    return _by_slot(g, rows, slot) if g.draw(st.booleans()) else rows


def _by_slot(g: Graph, rows: Value, slot: Value) -> Value:
    """The product ``rows`` once more, stored in the order of the slots."""
    return g.op("grouped_linear", *rows.op.operands[:3], slot, to=rows.op.attrs["to"])


@draws("gather_grouped_linear")
def _gather_grouped_linear(g: Graph) -> Any:
    (slot, off), _, experts, k = _sorted(g)
    x, inner = g.x(N, g.draw(small)), g.draw(small)
    if g.draw(st.booleans()):
        how, width = {"epilogue": "swiglu"} | _gate(g), 2 * inner
    else:
        how, width = {}, inner
    if g.draw(of([False, False, True])):
        x, w = g.op("quant", x, block=_row_block(g)), _quantised_weight(g, experts, width, x.type.shape[1])
    else:
        w = g.param(x.type.dtype, experts, width, x.type.shape[1])
    if g.draw(of([False, False, True])):
        how |= {"quant": _row_block(g), "scale": g.draw(FORMATS)}
    elif x.type.scale:
        how |= {"to": g.draw(of([None, f32, bf16]))}
    return g.op("gather_grouped_linear", x, w, slot, off, per_row=k, **how)


@draws("combine")
def _combine(g: Graph) -> Any:
    rows, slot, w = _grouped(g)
    if g.draw(st.booleans()):
        rows, slot = _by_slot(g, rows, slot), None
    plus = g.x(N, rows.type.shape[1]) if g.draw(st.booleans()) else None
    return g.op("combine", rows, slot, w, plus, to=g.draw(of([None, f32])))


@draws("grouped_linear_combine")
def _grouped_linear_combine(g: Graph) -> Any:
    rows, slot, w = _grouped(g)
    plus = g.x(N, rows.type.shape[1]) if g.draw(st.booleans()) else None
    how = {"rows": rows.op.attrs["to"], "to": g.draw(of([None, f32]))}
    return g.op("grouped_linear_combine", *rows.op.operands[:3], slot, w, plus, **how)


@draws("experts", "routed_experts")
def _experts(g: Graph, name: str = "experts") -> Any:
    w, _, slot, off = _route(g, "route_sort")
    experts, inner, width = int(off.type.shape[0]) - 1, g.draw(small), g.draw(small)
    x = g.x(N, g.draw(small))
    w13 = g.param(x.type.dtype, experts, 2 * inner, x.type.shape[1])
    w2 = g.param(x.type.dtype, experts, width, inner)
    plus = g.x(N, width) if g.draw(st.booleans()) else None
    how = {"act": g.draw(of(["silu", "gelu", "gelu_tanh"])), "limit": g.draw(of([None, 0.5]))}
    how |= {"to": g.draw(of([None, bf16]))}  # never finer than what lies between the products
    if name == "routed_experts":
        return g.op(name, x, w13, w2, *w.op.operands, plus, **w.op.attrs, **how)
    return g.op(name, x, w13, w2, off, slot, w, plus, **how)


# Weights.
@draws("stack")
def _stack(g: Graph) -> Any:
    name, count = f"family.{len(g.weights)}", g.draw(small)
    for n in range(count):
        g.weights[f"{name}.{n}.w"] = g.data(f32, 2, 3)
    return g.op(
        "stack", g.function.param(f"{name}.*.w", TensorType(f32, (2, 3))), experts=Range(0, count - 1)
    )


# Scaled values.
FORMATS = of(["fp32", "ue8m0"])


def _block(g: Graph, rank: int) -> tuple[int, ...]:
    return tuple(g.draw(of([0, 1, 2, 3])) for _ in range(rank))


def _row_block(g: Graph) -> tuple[int, int]:
    return g.draw(of([0, 1])), g.draw(of([0, 1, 2, 4]))


@draws("quant")
def _quant(g: Graph) -> Any:
    x = g.x()
    return g.op("quant", x, block=_block(g, g.draw(st.integers(1, x.type.rank))), scale=g.draw(FORMATS))


@draws("scaled")
def _scaled(g: Graph) -> Any:
    shape, block = [g.draw(small) for _ in range(g.draw(st.integers(2, 3)))], _block(g, 2)
    scales = [block_count(n, b) for n, b in zip(shape[-2:], block, strict=True)]
    q, scale = g.param(DTYPES["f8e4m3"], *shape), g.param(f32, *shape[:-2], *scales)
    return g.op("scaled", q, scale, block=block)


@draws("dequant")
def _dequant(g: Graph) -> Any:
    return g.op("dequant", g.draw(of([_quant, _scaled]))(g), to=g.draw(of([f32, bf16])))


@draws("refine")
def _refine(g: Graph) -> Any:
    x = g.draw(of([_quant, _scaled]))(g)
    finer = {0: [0, 1, 2, 5], 1: [1], 2: [1, 2], 3: [1, 3]}
    return g.op("refine", x, block=tuple(g.draw(of(finer[size])) for size in x.type.scale))


def _quantised_weight(g: Graph, *shape: int) -> Value:
    return g.op("quant", g.param(f32, *shape), block=_block(g, 2), scale=g.draw(FORMATS))


@draws("bind")
def _bind(g: Graph) -> Any:
    return g.op("bind", g.x(), param=g.draw(of(["layers.0.w", "proj.weight"])))


# Loops.
@draws("call", "for_each")
def _loop(g: Graph, kind: str) -> Any:
    """A body of one or two plain ops that ends by adding to what it carries."""
    x, scale = g.fresh(f32, N, 3), g.fresh(f32, N, 3)
    name = f"{kind}.{len(g.module.functions)}.{g.depth}"
    inner = Function(name, [("number", IndexType()), ("x", x.type), ("scale", scale.type)])
    numbers = Range(g.draw(st.integers(0, 2)), g.draw(st.integers(2, 3)))
    prefix = f"loop.{len(g.weights)}"
    for n in numbers:
        g.weights[f"{prefix}.{n}.w"] = g.data(f32, 3, 3)
    g.module.add(inner)
    body = Graph(g.draw, g.module, inner, g.lengths)
    _, held, factor = inner.args
    turned = body.op("linear", held, inner.param("w", TensorType(f32, (3, 3))))
    inner.ret(body.op("add", body.op("mul", turned, factor), held))
    attrs = {"callee": name, "carry": 1, "scope": f"{prefix}.*"}
    return g.op(kind, x, scale, **attrs, **{"layers" if kind == "call" else "experts": numbers})


@st.composite
def cases(draw: Draw, ops: tuple[str, ...] = (), most: int = 6) -> Case:
    """A module of a few ops, ``ops`` among them, that runs on its inputs and returns every tensor."""
    module = Module("tests", draw(of(["", "cpu", "sm_90a"])), draw(of([{}, {"N": 8}, {"N": 4096, "B": 3}])))
    g = Graph(draw, module, Function("main"), draw(st.lists(st.integers(0, 3), max_size=3)))
    g.argument(TensorType(f32, (N, 3)), g.data(f32, g.tokens, 3))
    g.argument(TensorType(i32, (B,)), torch.tensor(g.lengths, dtype=torch.int32))
    for name in (*ops, *draw(st.lists(of(sorted(DRAW)), min_size=0 if ops else 1, max_size=most - len(ops)))):
        DRAW[name](g)
    tensors = [v for v in g.function.values() if isinstance(v.type, TensorType)]
    g.function.ret(*tensors)
    module.add(g.function)
    if draw(st.booleans()) and len(module.functions) == 1:
        module.name = "main"  # the one-line header
    return Case(module, g.args, g.weights)
