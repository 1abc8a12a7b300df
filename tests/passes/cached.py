"""Attention over a paged cache as a user could write it: of latents, or of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st

from moec.ir import Builder, CacheType, Function, Interpreter, Module, Range, TensorType, Value, verify
from moec.ir.ops.attention import PagedCache
from moec.ir.types import DTYPES, i32, i64, symbol
from moec.ir.weights import weights_of

N, B, S, P = (symbol(n) for n in "NBSP")
WIDTH, LAYERS = 8, 2


@dataclass(frozen=True)
class Cached:
    """``@forward(x [N,8], cu_q, lens, table, slots, kv) -> y, kv``: two layers that add attention to x."""

    heads: int = 2
    page: int = 4
    causal: bool = True
    window: int = 0
    dtype: str = "f32"
    offsets_inside: bool = False  # cu_k is made by each layer
    bodies: int = 1  # the two layers share a function, or have one each
    target: str = "cpu"

    @property
    def entry(self) -> tuple[int, ...]:
        raise NotImplementedError

    def attend(
        self, b: Builder, x: Value, through: Callable[[Value], Value], cu_k: Value, cu_q: Value
    ) -> Value:
        """x [N,8] to [N, heads, V]; ``through`` writes entries and reads all of them."""
        raise NotImplementedError

    def build(self) -> Module:
        m = Module("test", self.target, {"N": 64})
        kind = DTYPES[self.dtype]
        args: list[tuple[str, Any]] = [
            ("x", TensorType(kind, (N, WIDTH))),
            ("cu_q", TensorType(i32, (B + 1,))),
            ("lens", TensorType(i32, (B,))),
            ("table", TensorType(i32, (B, P))),
            ("slots", TensorType(i64, (N,))),
            ("kv", CacheType(kind, self.entry, self.page)),
        ]
        forward = m.add(Function("forward", args))
        b = Builder(m, forward, kind)
        x, cu_q, lens, table, slots, kv = forward.args
        shared = [cu_q, lens, table, slots]
        if not self.offsets_inside:
            shared.append(b.prefix_sum(lens, out="cu_k"))
        for i in range(self.bodies):
            layers = Range(0, LAYERS - 1) if self.bodies == 1 else Range(i, i)
            x, kv = b.loop("call", layers, "layers.*", f"layer{i}", [x, kv], shared, self._layer)
        forward.ret(x, kv)
        self.store(m)
        verify(m)
        return m

    def store(self, m: Module) -> None:
        """How a checkpoint holds the weights: as they are."""

    def _layer(
        self, b: Builder, layer: Value, x: Value, kv: Value, cu_q: Value, lens: Value, *more: Value
    ) -> list[Value]:
        table, slots, *cu_k = more
        written: list[Value] = []

        def through(entry: Value) -> Value:
            written.append(b.cache_write(kv, layer, entry, slots, out="kv"))
            seen: Value = b.cache_read(written[0], layer, table, lens, out="seen")
            return seen

        offsets = cu_k[0] if cu_k else b.prefix_sum(lens, out="cu_k")
        o = self.attend(b, x, through, offsets, cu_q)
        o = b.reshape(o, shape=(N, o.type.shape[1] * o.type.shape[2]), out="flat")  # type: ignore[union-attr]
        return [b.add(x, b.project(o, "out", WIDTH, out="attn"), out="y"), written[0]]

    def inputs(self, batch: list[tuple[int, int]], seed: int = 0) -> list[Any]:
        """For each sequence its new tokens and the older ones, whose entries are in the cache already."""
        news, lens = [n for n, _ in batch], [n + old for n, old in batch]
        pages = [-(-n // self.page) for n in lens]
        numbers = list(range(sum(pages) + 1))
        Random(seed).shuffle(numbers)
        starts = [0, *accumulate(pages)]
        width = max(pages, default=0) + 1
        tables = [numbers[s : s + n] for s, n in zip(starts, pages, strict=False)]
        generator = torch.Generator().manual_seed(seed)
        kind = DTYPES[self.dtype].torch
        layers, slots = {}, []
        for layer in range(LAYERS):
            layers[layer] = torch.full((len(numbers) * self.page, *self.entry), torch.nan, dtype=kind)
        for table, (new, old) in zip(tables, batch, strict=True):
            at = [table[p // self.page] * self.page + p % self.page for p in range(new + old)]
            slots += at[old:]
            for tensor in layers.values():
                tensor[at[:old]] = torch.randn(old, *self.entry, generator=generator).to(kind)
        rows = [t + [10**6] * (width - len(t)) for t in tables]
        return [
            torch.randn(sum(news), WIDTH, generator=generator).to(kind),
            torch.tensor([0, *accumulate(news)], dtype=torch.int32),
            torch.tensor(lens, dtype=torch.int32),
            torch.tensor(rows, dtype=torch.int32).view(len(batch), width),
            torch.tensor(slots, dtype=torch.int64),
            PagedCache(self.page, layers),
        ]

    def run(self, m: Module, weights: Any, args: list[Any], entry: str = "forward") -> torch.Tensor:
        """y, the cache's entries afterwards, and where it has none, as one row of numbers."""
        y, cache = Interpreter(m, weights).run(entry, *args)
        entries = torch.cat([t.flatten() for t in cache.layers.values()])
        return torch.cat([y.flatten(), entries.nan_to_num(0), entries.isnan().to(y.dtype)])


@dataclass(frozen=True)
class Latent(Cached):
    """Expanded attention over cached latents."""

    nope: int = 4
    rope: int = 2
    value: int = 3
    rank: int = 5
    cuts: int = 1  # c and k_pe may be cut from the latent by an op each
    negative: bool = True  # axes count from the end
    scale: float = 0.6
    fp8: tuple[int, int] | None = None  # "up" is stored in FP8 blocks of this shape

    @property
    def entry(self) -> tuple[int, ...]:
        return (self.rank + self.rope,)

    def attend(
        self, b: Builder, x: Value, through: Callable[[Value], Value], cu_k: Value, cu_q: Value
    ) -> Value:
        columns, within = (-1, -1) if self.negative else (1, 2)
        q = b.project(x, "q", self.heads * (self.nope + self.rope), out="q.flat")
        q = b.reshape(q, shape=(N, self.heads, self.nope + self.rope), out="q")
        latent = through(b.project(x, "down", self.rank + self.rope, out="latent"))
        cuts = [
            b.split(latent, sizes=(self.rank, self.rope), axis=columns, out=("c", "pe"))
            for _ in range(self.cuts)
        ]
        kv = b.project(cuts[0][0], "up", self.heads * (self.nope + self.value), out="kv")
        kv = b.reshape(kv, shape=(S, self.heads, self.nope + self.value), out="kv.heads")
        k_nope, v = b.split(kv, sizes=(self.nope, self.value), axis=within, out=("k_nope", "v"))
        k_pe = b.broadcast(cuts[-1][1], axis=within - 1, size=self.heads, out="pe.heads")
        k = b.concat(k_nope, k_pe, axis=within, out="k")
        how = {"scale": self.scale, "causal": self.causal, "window": self.window}
        o: Value = b.attention(q, k, v, cu_q, cu_k, out="o", **how)
        return o

    def store(self, m: Module) -> None:
        if self.fp8 is None:
            return
        for function in list(m):
            if "up.weight" not in function.params:
                continue
            load = weights_of(m, function.name)
            rows, columns = self.heads * (self.nope + self.value), self.rank
            q = load.param("up.weight", TensorType(DTYPES["f8e4m3"], (rows, columns)))
            blocks = (-(-rows // self.fp8[0]), -(-columns // self.fp8[1]))
            scale = load.param("up.weight_scale_inv", TensorType(DTYPES["f32"], blocks))
            lb = Builder(m, load, DTYPES[self.dtype])
            lb.bind(lb.dequant(lb.scaled(q, scale, block=self.fp8), to=DTYPES[self.dtype]), param="up.weight")


@dataclass(frozen=True)
class Grouped(Cached):
    """Attention over cached keys and values; query heads share key heads in equal groups."""

    kv_heads: int = 1
    width: int = 4
    cuts: int = 1
    values: int = 1  # which part of an entry attention takes for its values

    @property
    def entry(self) -> tuple[int, ...]:
        return (2 * self.kv_heads, self.width)

    def attend(
        self, b: Builder, x: Value, through: Callable[[Value], Value], cu_k: Value, cu_q: Value
    ) -> Value:
        q, k, v = (
            b.reshape(b.project(x, n, h * self.width, out=f"{n}.flat"), shape=(N, h, self.width), out=n)
            for n, h in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        seen = through(b.concat(k, v, axis=1, out="k_v"))
        parts = [
            b.split(seen, sizes=(self.kv_heads,) * 2, axis=1, out=("ks", "vs")) for _ in range(self.cuts)
        ]
        how = {"scale": 0.6, "causal": self.causal, "window": self.window}
        o: Value = b.attention(
            q, parts[0][1 - self.values], parts[-1][self.values], cu_q, cu_k, out="o", **how
        )
        return o


BATCHES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=4)
COMMON: dict[str, Any] = {
    "page": st.integers(1, 4),
    "causal": st.booleans(),
    "window": st.sampled_from([0, 2]),
    "offsets_inside": st.booleans(),
    "bodies": st.sampled_from([1, 2]),
    "cuts": st.sampled_from([1, 2]),
}
latents = st.builds(
    Latent,
    heads=st.integers(1, 4),
    nope=st.integers(1, 5),
    rope=st.integers(1, 4),
    value=st.integers(1, 5),
    rank=st.integers(1, 6),
    negative=st.booleans(),
    fp8=st.sampled_from([None, (4, 4), (3, 2)]),
    **COMMON,
)
grouped = st.integers(1, 2).flatmap(
    lambda kv: st.builds(
        Grouped, kv_heads=st.just(kv), heads=st.sampled_from([kv, 3 * kv]), width=st.integers(1, 4), **COMMON
    )
)
