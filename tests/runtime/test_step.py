"""One step over a paged cache, as engines call it: chunks, mixtures, permutations, poison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moec
from moec import models
from moec.errors import BadInput
from moec.runtime import Batch, KVCache, LanguageModel
from moec.runtime.batch import next_batch
from moec.runtime.cache import CachedSequence

VOCAB = 256
texts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), min_size=1, max_size=3)


def poisoned(model: LanguageModel, pages: int = 12) -> KVCache:
    """A cache whose entries are NaN until they are written, its pages in a scattered order."""
    cache = KVCache(model.cache_specs, pages)
    for layers in cache.tensors.values():
        for tensor in layers:
            if tensor is not None:
                tensor.fill_(torch.nan)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(3)).tolist()
    cache.give_back(sorted(cache.take(pages), key=order.index))
    return cache


def run(model: LanguageModel, *steps: list[list[int]]) -> list[torch.Tensor]:
    """Logits of each step; ``steps[i][b]`` are the new tokens of sequence b, which may be none."""
    cache = poisoned(model)
    sequences = [CachedSequence(cache) for _ in steps[0]]
    out = []
    for new in steps:
        going = [b for b, tokens in enumerate(new) if tokens]
        out.append(model.step(next_batch([sequences[b] for b in going], [new[b] for b in going]), cache))
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert b.isfinite().all()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@settings(max_examples=15)
@given(texts)
def test_a_prefill_gives_each_last_token_s_logits(model: LanguageModel, prompts: list[list[int]]) -> None:
    (logits,) = run(model, prompts)
    for row, prompt in zip(logits, prompts, strict=True):
        same(row, model(torch.tensor([prompt]))[0, -1])


@settings(max_examples=15)
@given(texts, st.data())
def test_a_prompt_in_pieces_is_the_prompt(
    model: LanguageModel, prompts: list[list[int]], data: st.DataObject
) -> None:
    cuts = [data.draw(st.integers(0, len(p) - 1)) for p in prompts]
    whole = run(model, prompts)[-1]
    first = [p[:c] for p, c in zip(prompts, cuts, strict=True)]
    rest = [p[c:] for p, c in zip(prompts, cuts, strict=True)]
    same(run(model, *([first] if any(cuts) else []), rest)[-1], whole)


def test_a_mixed_batch_is_its_parts(model: LanguageModel, windowed: LanguageModel) -> None:
    """One sequence decodes while another prefills and a third is between: a chunk."""
    for tested in (model, windowed):
        old, new, chunk = [1, 2, 3, 4, 5], [9, 8, 7], [20, 21, 22, 23]
        mixed = run(tested, [old, [], chunk[:2]], [[6], new, chunk[2:]])[-1]
        same(mixed[0], run(tested, [old], [[6]])[-1][0])
        same(mixed[1], run(tested, [new])[-1][0])
        same(mixed[2], run(tested, [chunk])[-1][0])


@settings(max_examples=10)
@given(texts, st.randoms())
def test_the_order_of_sequences_does_not_matter(model: LanguageModel, prompts, random) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(prompts)))
    random.shuffle(order)
    (logits,) = run(model, prompts)
    (permuted,) = run(model, [prompts[b] for b in order])
    same(permuted, logits[order])


@settings(max_examples=10)
@given(texts)
def test_the_same_batch_gives_the_same_bits(model: LanguageModel, prompts: list[list[int]]) -> None:
    steps = [prompts, [[p[0]] for p in prompts]]
    for a, b in zip(run(model, *steps), run(model, *steps), strict=True):
        assert torch.equal(a, b)


def test_which_pages_a_sequence_has_does_not_matter(model: LanguageModel) -> None:
    page = model.cache_specs[0].page
    prompt = [i % VOCAB for i in range(page + 3)]
    cache = poisoned(model)
    logits = []
    for _ in range(3):
        sequence = CachedSequence(cache)  # other pages each time: none is given back
        logits.append(model.step(next_batch([sequence], [prompt]), cache))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[1], logits[2])


def test_padded_tokens_change_nothing(model: LanguageModel) -> None:
    """Tokens behind the last sequence, with slot -1, as engines pad to a fixed size."""
    cache = poisoned(model)
    sequence = CachedSequence(cache)
    batch = next_batch([sequence], [[1, 2, 3]])
    padded = Batch(
        ids=torch.cat([batch.ids, torch.zeros(5, dtype=torch.int64)]),
        positions=torch.cat([batch.positions, torch.zeros(5, dtype=torch.int64)]),
        cu_seqlens=batch.cu_seqlens,
        seq_lens=batch.seq_lens,
        block_table=batch.block_table,
        slot_mapping=torch.cat([batch.slot_mapping, torch.full((5,), -1)]),
    )
    logits = model.step(padded, cache)
    same(logits, run(model, [[1, 2, 3]])[0])
    written = [t for layers in cache.tensors.values() for t in layers if t is not None]
    for tensor in written:
        slots = tensor[:-1].flatten(0, 1)
        assert int(slots.isfinite().flatten(1).all(1).sum()) == 3


def test_an_empty_batch(model: LanguageModel) -> None:
    assert model.step(next_batch([], []), poisoned(model)).shape == (0, VOCAB)


def test_what_the_cache_holds_of_others_is_never_read(model: LanguageModel) -> None:
    cache = poisoned(model)
    sequence = CachedSequence(cache)
    model.step(next_batch([sequence], [[1, 2, 3]]), cache)
    batch = next_batch([sequence], [[4]])
    table = torch.cat([batch.block_table, torch.tensor([[10**6, -5]], dtype=torch.int32)], dim=1)
    same(model.step(replace(batch, block_table=table), cache), run(model, [[1, 2, 3]], [[4]])[-1])


@pytest.mark.parametrize("token", [-1, 256, 2**40])
def test_ids_outside_the_vocabulary(token: int, model: LanguageModel) -> None:
    cache = poisoned(model)
    with pytest.raises(BadInput, match=f"M0601.*token id {token} is outside the vocabulary of 256"):
        model.step(next_batch([CachedSequence(cache)], [[1, token]]), cache)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_padded_sequences_change_nothing(place: int, model: LanguageModel, windowed: LanguageModel) -> None:
    """Sequences without a new token, as engines pad to a fixed size: the others' rows are as ever."""
    for tested in (model, windowed):
        new = [[1, 2, 3], [4]]
        want = run(tested, new)[0]
        cache = poisoned(tested)
        sequences = [CachedSequence(cache) for _ in range(3)]
        new.insert(place, [])
        logits = tested.step(next_batch(sequences, new), cache)
        assert logits.shape == (3, VOCAB)
        same(torch.cat([logits[:place], logits[place + 1 :]]), want)


def test_a_batch_without_any_new_token(model: LanguageModel) -> None:
    cache = poisoned(model)
    with pytest.raises(BadInput, match="no sequence of the batch has a new token"):
        model.step(next_batch([CachedSequence(cache)], [[]]), cache)


def test_another_model_s_cache(model: LanguageModel, windowed: LanguageModel) -> None:
    cache = poisoned(windowed)
    with pytest.raises(BadInput, match="cache is another model's"):
        model.step(next_batch([CachedSequence(cache)], [[1]]), cache)


def test_what_is_no_batch_or_no_cache(model: LanguageModel) -> None:
    cache = poisoned(model)
    batch = next_batch([CachedSequence(cache)], [[1]])
    with pytest.raises(BadInput, match=r"batch must be a moec\.Batch, not dict"):
        model.step({"ids": batch.ids}, cache)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="cache must be one that new_cache made, not NoneType"):
        model.step(batch, None)  # type: ignore[arg-type]


def test_a_batch_for_another_cache(model: LanguageModel) -> None:
    """Slots and pages of a larger cache: refused before anything is written elsewhere."""
    large, small = poisoned(model, 12), poisoned(model, 1)
    large.take(6)
    batch = next_batch([CachedSequence(large)], [[1, 2]])
    with pytest.raises(BadInput, match="slot_mapping"):
        model.step(batch, small)


def test_the_package_s_tensors_carry_no_gradient(model: LanguageModel) -> None:
    assert not model(torch.tensor([[1]])).requires_grad


def test_a_single_token_whose_rotary_part_starts_at_an_odd_place(tmp_path: Path) -> None:
    """kv_lora_rank 7: the shared key is elements 7 to 10 of its row."""
    attention = models.MLA(
        heads=2, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=5, kv_lora_rank=7, q_lora_rank=None
    )
    layer = models.Decoder(attn=attention, mlp=models.SwiGLU(intermediate=8))
    spec = models.Model(vocab=11, hidden=8, layers=[layer], dtype="f32")
    loaded = moec.load(moec.build(spec, out=tmp_path / "x"), "random:0")
    assert isinstance(loaded, LanguageModel)
    whole = loaded(torch.tensor([[5, 3, 1]]))
    torch.testing.assert_close(loaded(torch.tensor([[5]]))[:, 0], whole[:, 0], rtol=1e-5, atol=1e-6)
    assert loaded.generate(torch.tensor([[5]]), 3).shape == (1, 4)
