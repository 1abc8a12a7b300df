"""Attention over pages where they lie: evenly or not, shared, half written, none at all."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moec.ir import CacheType, Module, TensorType
from moec.ir.ops.attention import PagedCache
from moec.ir.types import DTYPES, IndexType, i32, symbol
from tests.codegen.emission import Emitted, agree, emitted, forward, pages_of

N, B, P = (symbol(n) for n in "NBP")
PAGES = 12


def attending(
    heads: int, entry: tuple[int, ...], page: int, dtype: str = "f32", rank: int = 0, **attrs: Any
) -> Module:
    kind = DTYPES[dtype]
    how = {"scale": entry[-1] ** -0.5} | attrs | ({"rank": rank} if rank else {})
    name = "latent_attention" if rank else "paged_attention"
    return forward(
        lambda b, *args: getattr(b, name)(*args, **how),
        TensorType(kind, (N, heads, entry[-1])),
        CacheType(kind, entry, page),
        IndexType(),
        TensorType(i32, (B, P)),
        TensorType(i32, (B + 1,)),
        TensorType(i32, (B,)),
    )


def inputs(
    queries: list[int],
    lens: list[int],
    tables: list[list[int]],
    heads: int,
    entry: tuple[int, ...],
    page: int,
    dtype: str = "f32",
) -> list[Any]:
    """Queries and a cache in which nothing but these sequences' entries is a number."""
    generator = torch.Generator().manual_seed(sum(lens))
    slots = torch.full((PAGES * page, *entry), torch.nan)
    for table, n in zip(tables, lens, strict=True):
        at = [table[j // page] * page + j % page for j in range(n)]
        slots[at] = torch.randn(n, *entry, generator=generator)
    q = torch.randn(sum(queries), heads, entry[-1], generator=generator)
    width = max(map(len, tables), default=0) + 1
    rows = [[*t, *[10**6] * (width - len(t))] for t in tables]
    kind = DTYPES[dtype].torch
    return [
        q.to(kind),
        PagedCache(page, {0: slots.to(kind)}),
        0,
        torch.tensor(rows, dtype=torch.int32).view(len(tables), width),
        torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        torch.tensor(lens, dtype=torch.int32),
    ]


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[list[int], list[list[int]], int]:
    """Lengths of sequences and the pages of each, apart: in runs, at even distances, anyhow."""
    page, count = draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, 3))
    lens = [draw(st.integers(0, (PAGES // max(count, 1)) * page)) for _ in range(count)]
    kind = draw(st.sampled_from(["runs", "even", "any"]))
    needed = [-(-n // page) for n in lens]
    if kind == "even":
        tables = [list(range(i, PAGES, count))[:k] for i, k in enumerate(needed)]
    else:
        order = list(range(PAGES)) if kind == "runs" else draw(st.permutations(range(PAGES)))
        ends = [0, *accumulate(needed)]
        tables = [list(order[a:z]) for a, z in pairwise(ends)]
    return lens, tables, page


SHAPES = st.sampled_from(
    [(1, (1,), 1), (3, (5,), 4), (2, (4,), 4), (1, (2, 3), 0), (4, (4, 2), 0), (6, (2, 4), 0)]
)


@settings(max_examples=120)
@given(
    laid=laid_out(),
    shape=SHAPES,
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 2, 9]),
    data=st.data(),
)
def test_ragged_batches(
    laid: tuple[list[int], list[list[int]], int],
    shape: tuple[int, tuple[int, ...], int],
    causal: bool,
    window: int,
    data: st.DataObject,
) -> None:
    """Prefill, decode, chunks and empty sequences; queries that see no key."""
    lens, tables, page = laid
    heads, entry, rank = shape
    most = [n + 1 if data.draw(st.booleans()) else 1 for n in lens]
    queries = [data.draw(st.integers(0, n)) for n in most]
    module = attending(heads, entry, page, rank=rank, causal=causal, window=window)
    agree(module, {}, inputs(queries, lens, tables, heads, entry, page))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize(("entry", "rank"), [((40,), 32), ((4, 16), 0)])
@pytest.mark.parametrize("even", [False, True])
def test_16_bits(dtype: str, window: int, entry: tuple[int, ...], rank: int, even: bool) -> None:
    """PyTorch's kernel rounds the softmax: a unit in the last place or two of the largest result."""
    tables = [[0, 2, 4, 6, 8], [1, 3]] if even else [[0, 1, 2, 3, 4], [7, 5]]
    args = inputs([1, 5], [20, 7], tables, 4, entry, 4, dtype)
    tolerance = {"bf16": 2**-6, "f16": 2**-9}[dtype]
    agree(attending(4, entry, 4, dtype, rank, window=window), {}, args, tolerance)


def test_one_sequence_never_sees_another() -> None:
    module = attending(2, (4,), 2, rank=3)
    args = inputs([1, 2, 4], [5, 3, 4], [[0, 1, 2], [3, 4], [5, 9]], 2, (4,), 2)
    pages = pages_of(args[1])
    (clean,) = emitted(module, {}, args[0], pages, *args[2:])
    pages[0][3:5] = torch.nan
    (dirty,) = emitted(module, {}, args[0], pages, *args[2:])
    assert dirty[1:3].isnan().all()
    assert torch.equal(clean[[0, 3, 4, 5, 6]], dirty[[0, 3, 4, 5, 6]])


def test_rows_that_no_sequence_owns_are_zeros() -> None:
    args = inputs([2, 2], [2, 2], [[0], [1]], 1, (4,), 2)
    args[3:] = [args[3][:1], args[4][:2], args[5][:1]]
    (out,) = emitted(attending(1, (4,), 2, rank=4), {}, *[pages_of(a) if a is args[1] else a for a in args])
    assert out[2:].eq(0).all() and out[:2].ne(0).any()


class ReadsOf(TorchDispatchMode):
    """Notes the calls that make a new tensor of what they read of ``memory``, products aside."""

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__()
        self.memory = memory.untyped_storage().data_ptr()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for a in args for t in (a if isinstance(a, list | tuple) else [a])]
        name = func.overloadpacket.__name__
        if (
            any(map(self._inside, given))
            and not self._inside(out)
            and not name.endswith(("attention", "mm", "mm_"))
        ):
            self.copies.append(name)
        return out

    def _inside(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == self.memory


@pytest.mark.parametrize(("entry", "rank"), [((4,), 4), ((4, 4), 0)])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("page", [1, 2])
@pytest.mark.parametrize("table", [[0, 1, 2, 3, 4], [1, 3, 5, 7, 9], [5, 1, 0, 8, 7], [0, 1, 4, 6, 8]])
def test_no_page_is_copied(
    entry: tuple[int, ...], rank: int, queries: int, page: int, table: list[int], tmp_path: Path
) -> None:
    """Wherever they lie, products read the pages themselves (below fp32, several places are widened)."""
    args = inputs([queries], [5 * page - page // 2], [table], 4, entry, page)
    pages = pages_of(args[1])
    package = Emitted(tmp_path, attending(4, entry, page, rank=rank), {})
    with ReadsOf(pages[0]) as reads:
        package.run(args[0], pages, *args[2:])
    assert not reads.copies


def test_a_copy_would_be_noticed(tmp_path: Path) -> None:
    args = inputs([1], [5], [[5, 1, 0]], 2, (2, 4), 2)
    pages = pages_of(args[1])
    package = Emitted(
        tmp_path,
        forward(
            lambda b, *a: b.cache_read(*a),
            *[v.type for v in attending(2, (2, 4), 2)["forward"].args[1:4]],
            TensorType(i32, (B,)),
        ),
        {},
    )
    with ReadsOf(pages[0]) as reads:
        package.run(pages, *args[2:4], args[5])
    assert reads.copies
