"""Whole small models for the tests of passes: a strategy over them, and a ragged step in the interpreter."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from hypothesis import strategies as st

from moec import models
from moec.ir import CacheType, Interpreter, Module
from moec.ir.ops.attention import PagedCache
from moec.ir.ops.control import Loop
from tests.passes.modules import close, random_weights

HIDDEN, VOCAB, PAGE = 16, 11, 4

ropes = st.sampled_from(
    [models.RoPE(), models.RoPE(layout="interleaved"), models.YaRN(original=8, theta=100)]
)
gqa = st.builds(
    models.GQA,
    heads=st.sampled_from([2, 4]),
    kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([2, 8]),
    rope=ropes,
    qkv_bias=st.booleans(),
    qk_norm=st.sampled_from([None, "head", "full"]),
    clip=st.sampled_from([None, 0.3]),
    window=st.sampled_from([0, 3]),
    eps=st.sampled_from([1e-6, 1e-2]),
)
mla = st.builds(
    models.MLA,
    heads=st.sampled_from([1, 3]),
    qk_nope_head_dim=st.sampled_from([3, 4]),
    qk_rope_head_dim=st.sampled_from([2, 4]),
    v_head_dim=st.sampled_from([3, 5]),
    kv_lora_rank=st.sampled_from([5, 8]),
    q_lora_rank=st.sampled_from([None, 6, 8]),
    rope=ropes,
    bias=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-2]),
)


@st.composite
def moe(draw: Any) -> models.MoE:
    groups, each = draw(st.sampled_from([(1, 4), (2, 3), (1, 1)]))
    kept = draw(st.integers(1, groups))
    router = models.Router(
        experts=groups * each,
        top_k=draw(st.integers(1, kept * each)),
        score=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        renorm=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        bias=draw(st.booleans()),
        groups=groups,
        topk_groups=kept,
        fp32=draw(st.booleans()),
    )
    width = draw(st.sampled_from([3, 4]))
    wide = draw(st.sampled_from([width, 2 * width, 5]))
    shared = draw(st.sampled_from([None, models.SwiGLU(wide, name="shared")]))
    gate = draw(st.sampled_from(["", "shared_gate"])) if shared else ""
    return models.MoE(router, models.Experts(groups * each, width), shared, gate)


@st.composite
def whole_models(draw: Any, **fixed: Any) -> models.Model:
    """One to three layers, each like the first or of its own kind, in fp32."""
    layer = st.builds(
        models.Decoder,
        attn=fixed.get("attn", gqa | mla),
        mlp=fixed.get("mlp", moe() | st.just(models.SwiGLU(6))),
    )
    first = draw(layer)
    layers = [first, *draw(st.lists(layer | st.just(first), max_size=2))]
    return models.Model(
        vocab=VOCAB, hidden=HIDDEN, layers=layers, dtype="f32", page=PAGE, max_positions=16, name="tiny"
    )


batches = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=3)  # new tokens, cached ones


def step(m: Module, weights: dict[str, torch.Tensor], batch: list[tuple[int, int]]) -> list[Any]:
    """What @step makes of a batch: hidden states, then the caches, whose old entries are random."""
    news, lens = [n for n, _ in batch], [n + old for n, old in batch]
    table = torch.arange(4 * len(batch), dtype=torch.int32).view(len(batch), 4).flip(0)
    positions = [p for new, old in batch for p in range(old, old + new)]
    places = [
        int(table[b, p // PAGE]) * PAGE + p % PAGE
        for b, (n, old) in enumerate(batch)
        for p in range(old, old + n)
    ]
    ids = torch.tensor([(7 * p + 3) % VOCAB for p in range(len(positions))], dtype=torch.int64)
    given = {
        "ids": ids,
        "positions": torch.tensor(positions, dtype=torch.int64),
        "cu_seqlens": torch.tensor([0, *accumulate(news)], dtype=torch.int32),
        "seq_lens": torch.tensor(lens, dtype=torch.int32),
        "block_table": table,
        "slot_mapping": torch.tensor(places, dtype=torch.int64),
    }
    numbers = {n for op in m["step"].ops if isinstance(op, Loop) for n in op.range}
    args = [given[a.name] if a.name in given else _cache(a.type, numbers, len(batch)) for a in m["step"].args]
    return list(Interpreter(m, weights).run("step", *args))


def _cache(type: Any, layers: set[int], sequences: int) -> PagedCache:
    assert isinstance(type, CacheType)
    generator = torch.Generator().manual_seed(5)
    shape = (4 * PAGE * max(sequences, 1), *type.entry)
    return PagedCache(PAGE, {n: torch.randn(shape, generator=generator).to(type.dtype.torch) for n in layers})


def same_step(before: list[Any], after: list[Any], tolerance: float = 1e-5) -> None:
    """Hidden states and caches agree."""
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        if isinstance(a, PagedCache):
            for n, pages in a.layers.items():
                close(pages.float(), b.layers[n].float(), tolerance)
        else:
            close(a.float(), b.float(), tolerance)


def lowered(model: models.Model) -> tuple[Module, dict[str, torch.Tensor]]:
    """A model's naive IR, and a checkpoint of random weights, its norms among them."""
    m = models.lower(model)
    return m, random_weights(m, seed=3)
