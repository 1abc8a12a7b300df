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


def test_padding_is_no_new_token(model: LanguageModel) -> None:
    cache = poisoned(model)
    batch = next_batch([CachedSequence(cache)], [[]])
    zeros = torch.zeros(2, dtype=torch.int64)
    padded = replace(batch, ids=zeros, positions=zeros, slot_mapping=zeros - 1)
    with pytest.raises(BadInput, match="no sequence of the batch has a new token"):
        model.step(padded, cache)


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


# Which entry runs a batch.
def batch_of(model: LanguageModel, new: list[int], max_new: int | None = None) -> tuple[Batch, KVCache]:
    cache = poisoned(model)
    batch = next_batch([CachedSequence(cache) for _ in new], [[7] * n for n in new])
    return replace(batch, max_new=max_new), cache


def entries_run(
    model: LanguageModel, batch: Batch, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    found = []
    for name in ("step", "decode"):
        entry = getattr(model._code, name, None)
        if entry is not None:
            monkeypatch.setattr(model._code, name, lambda *a, n=name, e=entry: (found.append(n), e(*a))[1])
    model.step(batch, cache)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize(
    ("new", "max_new", "entry"),
    [
        ([8, 1, 3], None, "decode"),
        ([1], None, "decode"),
        ([8, 0, 8], None, "decode"),
        ([9, 1], None, "step"),
        ([9], None, "step"),
        ([8, 1], 8, "decode"),
        ([8, 1], 9, "step"),  # more than there are: the host has been told no better
        ([1, 1], 100, "step"),
    ],
)
def test_decode_runs_what_is_known_to_fit(
    model: LanguageModel, new: list[int], max_new: int | None, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, cache = batch_of(model, new, max_new)
    assert model.entry(batch) == entry
    assert entries_run(model, batch, cache, monkeypatch) == [entry]


@pytest.mark.parametrize(("new", "fits"), [([8], True), ([3, 5], True), ([3, 6], False), ([1] * 9, False)])
def test_of_a_batch_on_a_gpu_its_size_says_something(new: list[int], fits: bool) -> None:
    """Nothing is read back: so few tokens in all that no sequence can have more."""
    total, sequences = sum(new), len(new)

    def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch = Batch(
        ids=meta(torch.int64, total),
        positions=meta(torch.int64, total),
        cu_seqlens=meta(torch.int32, sequences + 1),
        seq_lens=meta(torch.int32, sequences),
        block_table=meta(torch.int32, sequences, 1),
        slot_mapping=meta(torch.int64, total),
    )
    assert batch.adds_at_most(8) == fits
    assert replace(batch, max_new=1).adds_at_most(8), "the caller knows"
    assert not replace(batch, max_new=9).adds_at_most(8)


def test_keys_and_values_have_one_entry(windowed: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, cache = batch_of(windowed, [1, 1])
    assert entries_run(windowed, batch, cache, monkeypatch) == ["step"]
    with pytest.raises(BadInput, match="has no entry 'decode' for a batch; it has step"):
        windowed.hidden(batch, cache, "decode")


def test_both_entries_compute_the_same(model: LanguageModel) -> None:
    batch, cache = batch_of(model, [3, 8, 1])
    same(model.hidden(batch, cache, "decode"), model.hidden(batch, cache, "step"))


def test_a_batch_that_says_too_little_of_itself_is_refused(model: LanguageModel) -> None:
    batch, cache = batch_of(model, [9, 1], 8)
    with pytest.raises(BadInput, match=r"batch\.max_new is 8, but a sequence has 9 new tokens"):
        model.step(batch, cache)
    for wrong, message in ((-1, "must be a number, 0 or more"), ("8", "max_new")):
        with pytest.raises(BadInput, match=message):
            replace(batch, max_new=wrong)  # type: ignore[arg-type]


def test_an_entry_that_takes_no_such_batch_is_refused(model: LanguageModel) -> None:
    batch, cache = batch_of(model, [9, 1], 9)
    with pytest.raises(BadInput, match="decode takes 8 new tokens of a sequence; the batch's max_new is 9"):
        model.hidden(batch, cache, "decode")
    with pytest.raises(BadInput, match="has no entry 'prefill' for a batch; it has step and decode"):
        model.hidden(batch, cache, "prefill")
