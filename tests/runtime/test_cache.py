"""Pages of the cache, and batches made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec import models
from moec.codegen.package import caches
from moec.errors import BadInput, CacheFull
from moec.runtime import Batch, KVCache
from moec.runtime.batch import next_batch
from moec.runtime.cache import CachedSequence, CacheSpec

SPEC = CacheSpec("kv", "f32", (2, 3), 4, (0, 1))


def new_cache(pages: int) -> KVCache:
    return KVCache([SPEC], pages)


def test_deepseek_v3_keeps_576_elements_a_token_and_layer() -> None:
    """Of the allocation, at the published size: 61 layers, 70,272 bytes a token in bf16."""
    specs = [CacheSpec.of(c) for c in caches(models.lower(models.preset("deepseek-v3")))]
    assert sum(s.bytes_per_token for s in specs) == 61 * 576 * 2 == 70_272
    cache = KVCache(specs, 3)
    tensors = [t for layers in cache.tensors.values() for t in layers if t is not None]
    assert len(tensors) == 61
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    tokens = (3 + 1) * cache.page  # a spare page
    assert {t.numel() // tokens for t in tensors} == {576}
    assert cache.nbytes == sum(t.numel() * 2 for t in tensors) == 70_272 * tokens


def test_layers_without_a_cache_allocate_nothing() -> None:
    cache = KVCache([CacheSpec("kv", "bf16", (8,), 16, (2, 5))], 1)
    assert [t is not None for t in cache.tensors["kv"]] == [False, False, True, False, False, True]
    assert cache.nbytes == 2 * 2 * 16 * 8 * 2


def test_a_model_without_a_cache_needs_none() -> None:
    cache = KVCache([], 4)
    assert cache.nbytes == 0
    assert cache.page == 1


@given(st.lists(st.integers(-6, 6), max_size=30), st.integers(0, 20))
def test_no_page_has_two_owners(moves: list[int], pages: int) -> None:
    """n > 0 takes n pages, n < 0 gives the pages of the -n-th owner back."""
    cache, owned = new_cache(pages), []
    for move in moves:
        if move > 0 and move > cache.free_pages:
            before = cache.free_pages
            with pytest.raises(CacheFull, match=f"{move} pages .*{before} are free"):
                cache.take(move)
            assert cache.free_pages == before
        elif move > 0:
            owned.append(cache.take(move))
        elif -move < len(owned):
            cache.give_back(owned.pop(-move))
        held = [p for pages in owned for p in pages]
        assert len(set(held)) == len(held)
        assert all(0 <= p < pages for p in held)
        assert cache.free_pages == pages - len(held)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_a_sequence_has_pages_for_its_tokens(steps: list[int]) -> None:
    cache = new_cache(100)
    sequence, other = CachedSequence(cache), CachedSequence(cache)
    for step in steps:
        next_batch([sequence, other], [[1] * step, [2]])
        assert len(sequence.pages) == -(-sequence.length // 4)
    slots = sequence.slots(0, sequence.length)
    assert len(set(slots)) == sum(steps)
    assert [s % 4 for s in slots] == [p % 4 for p in range(sum(steps))]
    assert not {s // 4 for s in slots} & set(other.pages)
    sequence.release()
    assert (sequence.pages, sequence.length) == ([], 0)
    assert cache.free_pages == 100 - len(other.pages)


@given(st.lists(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=3, max_size=3), max_size=4))
def test_batches_describe_their_sequences(steps: list[list[list[int]]]) -> None:
    cache = new_cache(60)
    sequences = [CachedSequence(cache) for _ in range(3)]
    texts: list[list[int]] = [[], [], []]
    stored: dict[int, int] = {}
    for new in steps:
        batch = next_batch(sequences, new)
        assert batch.ids.tolist() == [t for tokens in new for t in tokens]
        assert batch.cu_seqlens.diff().tolist() == [len(tokens) for tokens in new]
        stored |= dict(zip(batch.slot_mapping.tolist(), batch.ids.tolist(), strict=True))
        for b, tokens in enumerate(new):
            texts[b] += tokens
            rows = slice(int(batch.cu_seqlens[b]), int(batch.cu_seqlens[b + 1]))
            assert batch.positions[rows].tolist() == list(range(len(texts[b]) - len(tokens), len(texts[b])))
            table = batch.block_table[b].tolist()
            assert [stored[table[p // 4] * 4 + p % 4] for p in range(len(texts[b]))] == texts[b]
        assert batch.seq_lens.tolist() == [len(t) for t in texts]
        batch.check(vocab=10, max_positions=100, pages=60, page=4)


def test_a_full_cache_leaves_all_sequences_as_they_were() -> None:
    cache = new_cache(2)
    first, second = CachedSequence(cache), CachedSequence(cache)
    next_batch([first, second], [[1], [2]])
    with pytest.raises(CacheFull, match="M0602"):
        next_batch([first, second], [[1, 1], [2] * 9])
    assert (first.length, second.length) == (1, 1)
    first.release()
    assert next_batch([second], [[2] * 4]).positions.tolist() == [1, 2, 3, 4]


def test_no_sequences_make_an_empty_batch() -> None:
    batch = next_batch([], [])
    assert [list(t.shape) for t in batch.tensors()] == [[0], [0], [1], [0], [0, 0], [0]]


# What a batch must be.
def fields(**changes: Any) -> dict[str, torch.Tensor]:
    """Two sequences: three tokens of a prompt, then the fifth token of another; pages of 4."""
    return {
        "ids": torch.tensor([1, 2, 3, 4]),
        "positions": torch.tensor([0, 1, 2, 4]),
        "cu_seqlens": torch.tensor([0, 3, 4], dtype=torch.int32),
        "seq_lens": torch.tensor([3, 5], dtype=torch.int32),
        "block_table": torch.tensor([[0, 99], [2, 1]], dtype=torch.int32),
        "slot_mapping": torch.tensor([0, 1, 2, 4]),
    } | changes


def check(batch: Batch) -> None:
    batch.check(vocab=10, max_positions=6, pages=3, page=4)


def test_a_good_batch_passes() -> None:
    check(Batch(**fields()))
    check(Batch(**fields(slot_mapping=torch.tensor([0, -1, 2, -1]))))


def test_sequences_may_share_the_pages_of_a_common_beginning() -> None:
    shared = {"block_table": i32([2, 0], [2, 1]), "slot_mapping": torch.tensor([-1, -1, -1, 4])}
    check(Batch(**fields(**shared)))


@pytest.mark.parametrize("field", list(fields()))
def test_a_field_that_is_no_tensor(field: str) -> None:
    with pytest.raises(BadInput, match=rf"batch\.{field} must be a tensor, not list"):
        Batch(**fields(**{field: fields()[field].tolist()}))


@pytest.mark.parametrize("field", list(fields()))
def test_shapes_and_dtypes_of_a_batch(field: str) -> None:
    good = fields()[field]
    wrong_dtype = good.to(torch.int32 if good.dtype == torch.int64 else torch.int64)
    for wrong in (wrong_dtype, good.float(), good[None], torch.cat([good, good[:1]])):
        with pytest.raises(BadInput, match=r"batch\."):
            Batch(**fields(**{field: wrong}))


def i32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": torch.tensor([1, 2, 10, 4])}, "token id 10 is outside the vocabulary of 10"),
        ({"ids": torch.tensor([1, -1, 3, 4])}, "token id -1 is outside"),
        ({"positions": torch.tensor([0, 1, 2, 6])}, "positions holds 6"),
        ({"positions": torch.tensor([-1, 1, 2, 4])}, "positions holds -1"),
        ({"slot_mapping": torch.tensor([0, 1, 2, 12])}, "slot_mapping holds 12"),
        ({"slot_mapping": torch.tensor([0, 1, 2, -2])}, "slot_mapping holds -2"),
        ({"cu_seqlens": i32(1, 3, 4)}, "start at 0"),
        ({"cu_seqlens": i32(0, 4, 3)}, "never fall"),
        ({"cu_seqlens": i32(0, 3, 5)}, "cu_seqlens holds 5"),
        ({"cu_seqlens": i32(0, 2, 3)}, "no sequence owns"),
        ({"seq_lens": i32(2, 5)}, "count the new tokens"),
        ({"seq_lens": i32(3, 9)}, "seq_lens holds 9"),
        ({"seq_lens": i32(3, -1)}, "seq_lens holds -1"),
        ({"seq_lens": i32(3, 7)}, "seq_lens holds 7, not in 0..6"),  # positions end at 6, pages at 8
        ({"seq_lens": i32(4, 5)}, "positions must be each sequence's last"),
        ({"positions": torch.tensor([0, 2, 1, 4])}, "positions must be each sequence's last"),
        ({"positions": torch.tensor([0, 1, 2, 3])}, "positions must be each sequence's last"),
        ({"slot_mapping": torch.tensor([0, 1, 2, 11])}, "another slot than its block table"),
        ({"slot_mapping": torch.tensor([0, 2, 1, 4])}, "another slot than its block table"),
        (
            {
                "positions": torch.tensor([0, 1, 2, 1]),
                "seq_lens": i32(3, 2),
                "block_table": i32([0, 99], [0, 1]),
                "slot_mapping": torch.tensor([0, 1, 2, 1]),
            },
            "two tokens the same slot",
        ),
        ({"block_table": i32([0, 99], [2, 3])}, "block_table holds 3"),
        ({"block_table": i32([-1, 99], [2, 1])}, "block_table holds -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_of_a_batch(changes: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        check(Batch(**fields(**changes)))
