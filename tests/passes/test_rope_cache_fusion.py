"""rope-cache-fusion: the same queries and the same cache, each rule by itself, and why it stays away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec import models
from moec.errors import ToleranceExceeded
from moec.ir import Interpreter, Module, Value, parse_module, print_module
from moec.ir.ops.attention import PagedCache
from moec.ir.types import CacheType, IndexType, symbol
from moec.passes import Oracle, parse_pipeline, pipeline
from moec.passes import rope_cache_fusion as rcf
from moec.passes.manager import PassManager
from moec.passes.pattern import Match
from tests.passes.modules import golden_text, op_names, random_weights, reasons, replaced, run, tensor_type
from tests.passes.rope_cache_blocks import LATENT, MISSES, SOURCES
from tests.passes.whole import batches, gqa, lowered, mla, same_step, step, whole_models

RULES = {**rcf.TURNS, **rcf.TAKEN_IN, **rcf.BEHIND, **rcf.WRITES, **rcf.CLAMPED}

FIRED = {
    "latent": ["latent"],
    "keys": ["rope", "head-norm", "clamp-rows", "keys-and-values", "clamp-value-rows"],
    "queries": ["rope", "partial", "head-norm"],
    "last": ["rope", "partial-last"],
    "absorbed": ["rope", "before"],
    "full": ["rope", "clamp", "full-norm"],
    "values": ["rope", "head-norm", "clamp-rows", "keys-and-values", "clamp-values"],
}
LEFT = {
    "latent": ["latent_cache_write"],
    "keys": ["reshape", "reshape", "kv_cache_write"],
    "queries": ["norm_rope"],
    "last": ["norm_rope"],
    "absorbed": ["norm_rope"],
    "full": ["reshape", "norm_rope"],
    "values": ["reshape", "reshape", "kv_cache_write"],
}
# Of the largest result, where roundings in between are left out.
TOLERANCE = {"f32": 1e-6, "bf16": 2 * 2**-7, "f16": 2 * 2**-10}


def inputs(m: Module, count: int, seed: int = 0) -> list[Any]:
    """Arguments of @forward: a layer's number, a cache of random entries, slots of which one is none."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Any] = []
    for arg in m["forward"].args:
        if isinstance(arg.type, IndexType):
            made.append(0)
        elif isinstance(arg.type, CacheType):
            pages = torch.randn((16, *arg.type.entry), generator=generator)
            made.append(PagedCache(4, {0: pages.to(arg.type.dtype.torch)}))
        else:
            type = tensor_type(arg)
            shape = [d if isinstance(d, int) else int(d.subs(symbol("N"), count)) for d in type.shape]
            if type.dtype.is_float:
                made.append(torch.randn(shape, generator=generator).to(type.dtype.torch))
            else:
                slots = [(5 * i) % 16 if i else -1 for i in range(count)]
                made.append(torch.tensor(slots, dtype=torch.int64))
    return made


def outcome(m: Module, weights: dict[str, torch.Tensor], args: list[Any]) -> list[Any]:
    return list(Interpreter(m, weights).run("forward", *args))


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("name", SOURCES)
def test_same_result(name: str, count: int, dtype: str) -> None:
    text = SOURCES[name].replace("f32", dtype)
    for table in ("%cos", "%sin"):
        text = text.replace(f"{table}: {dtype}", f"{table}: f32")
    m = parse_module(text)
    weights, args = random_weights(m), inputs(m, count)
    before = outcome(m, weights, args)
    (done,) = run("rope-cache-fusion", m)
    assert set(done.fired) == set(FIRED[name])
    assert op_names(m) == LEFT[name]
    same_step(before, outcome(m, weights, args), TOLERANCE[dtype])
    assert print_module(parse_module(print_module(m))) == print_module(m)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["latent", "last", "absorbed"])
def test_without_a_norm_of_heads_it_is_right_bit_for_bit(name: str, dtype: str) -> None:
    text = SOURCES[name].replace("f32", dtype)
    for table in ("%cos", "%sin"):
        text = text.replace(f"{table}: {dtype}", f"{table}: f32")
    m = parse_module(text)
    weights, args = random_weights(m), inputs(m, 7)
    before = outcome(m, weights, args)
    run("rope-cache-fusion", m)
    same_step(before, outcome(m, weights, args), tolerance=0.0)


PASSES = ["canonicalise", "expert-grouping", "mla-absorb", "merge-projections{align=1}", "norm-fusion"]


@given(model=whole_models(), batch=batches, order=st.permutations(PASSES))
def test_whole_models_after_any_order(
    model: models.Model, batch: list[tuple[int, int]], order: list[str]
) -> None:
    m, weights = lowered(model)
    before = step(m, weights, batch)
    run("rope-cache-fusion", m)
    same_step(before, step(m, weights, batch))
    assert not any(op.name in ("rope", "cache_write") for f in m for op in f.ops)
    m, weights = lowered(model)
    run(",".join([*order, "rope-cache-fusion"]), m)
    same_step(before, step(m, weights, batch))
    assert not any(op.name in ("rope", "cache_write", "clamp") for f in m for op in f.ops)


@given(attn=gqa | mla, batch=batches)
def test_every_kind_of_attention(attn: Any, batch: list[tuple[int, int]]) -> None:
    """Norms, clamps, both layouts, with and without q_lora."""
    layer = models.Decoder(attn, models.SwiGLU(3))
    m, weights = lowered(models.Model(vocab=11, hidden=16, layers=[layer, layer], dtype="f32", page=4))
    before = step(m, weights, batch)
    run("rope-cache-fusion", m)
    same_step(before, step(m, weights, batch))
    written = [op.name for op in m["layer.dense"].ops if op.name.endswith("cache_write")]
    assert written == ["latent_cache_write" if isinstance(attn, models.MLA) else "kv_cache_write"]


@pytest.mark.parametrize("name", SOURCES)
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    m = parse_module(SOURCES[name])
    golden(f"rope_cache_{name}.before.moec", golden_text(m))
    run("rope-cache-fusion", m)
    golden(f"rope_cache_{name}.after.moec", golden_text(m))


def test_goldens_show_every_rule() -> None:
    assert {rule for fired in FIRED.values() for rule in fired} == {*RULES}


@pytest.mark.parametrize(
    ("name", "rule", "edits", "reason"), MISSES, ids=[f"{r}: {why}" for _, r, _, why in MISSES]
)
def test_near_miss(name: str, rule: str, edits: list[tuple[str, str]], reason: str) -> None:
    m = parse_module(replaced(*edits)(SOURCES[name]) if edits else SOURCES[name])
    weights, args = random_weights(m), inputs(m, 4)
    before = outcome(m, weights, args)
    runs = run("rope-cache-fusion", m)
    assert any(reason in found for found in reasons(runs, rule)), reasons(runs, rule)
    same_step(before, outcome(m, weights, args), TOLERANCE["f32"])


def test_every_rule_has_a_near_miss() -> None:
    assert {rule for _, rule, _, _ in MISSES} == {*RULES}


def test_a_reason_names_the_user_s_line() -> None:
    (done,) = run(
        "rope-cache-fusion", parse_module(replaced(("concat(%a.n, %b.r)", "concat(%a, %b.r)"))(LATENT))
    )
    assert any(miss["line"] == "mine.py:6" for miss in done.misses if miss["rule"] == "latent")


@pytest.mark.parametrize(
    ("table", "rule", "name", "wrong"),
    [
        (rcf.TAKEN_IN, "partial-last", "last", rcf.first_turns),
        (rcf.WRITES, "latent", "latent", "eps"),
        (rcf.WRITES, "keys-and-values", "keys", "w"),
    ],
)
def test_the_oracle_catches(
    table: Any, rule: str, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong columns turned; the norm of another eps; the write without its norm."""
    right = table[rule][1]

    def mistaken(m: Match) -> Value:
        if callable(wrong):
            return wrong(m)  # type: ignore[no-any-return]
        op = right(m).op
        attrs, operands = dict(op.attrs), list(op.operands)
        if wrong == "eps":
            attrs["eps"] = 0.5
        else:
            operands[7], attrs["eps"] = None, 0.0
        m.function.erase(op)
        m.created.remove(op)
        (out,) = m.create(op.name, *operands, **attrs).op.results
        return out  # type: ignore[no-any-return]

    monkeypatch.setitem(table, rule, (table[rule][0], mistaken))
    m = parse_module(SOURCES[name])
    oracle = Oracle({"forward": inputs(m, 4)}, random_weights(m), tolerance=1e-5)
    with pytest.raises(ToleranceExceeded, match="rope-cache-fusion changed forward"):
        PassManager(parse_pipeline("rope-cache-fusion"), [oracle]).run(m)


def test_where_it_runs() -> None:
    names = [p.name for p in pipeline(2, "sm_90a")]
    assert names.index("norm-fusion") < names.index("rope-cache-fusion")
