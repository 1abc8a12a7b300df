"""fp8-cast{kv=...}: caches in 8 bits, in all functions that they go through, in any order with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadOption, ToleranceExceeded, TypeMismatch
from moec.ir import CacheType, Interpreter, Module, parse_module, print_module
from moec.ir.cached import PagedCache
from moec.passes import Oracle, fp8_cache, parse_pipeline
from moec.passes.manager import PassManager
from tests.passes.cached import Cached, Grouped, Latent
from tests.passes.modules import golden_text, random_weights, reasons, run

KV = "fp8-cast{{ops=[],kv={kv}}}"
PACKED, ONE = KV.format(kv="packed"), KV.format(kv="per-tensor")
batches = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=3)
kinds = st.sampled_from(
    [(Latent(), PACKED), (Latent(bodies=2, rank=130), PACKED), (Latent(rope=4), ONE), (Grouped(), ONE)]
)


def cache_types(m: Module) -> set[str]:
    return {str(a.type) for f in m for a in f.args if isinstance(a.type, CacheType)}


def interpret(m: Module, weights: Any, args: list[Any]) -> tuple[torch.Tensor, PagedCache]:
    y, cache = Interpreter(m, weights).run("forward", *args)
    return y, cache


@given(batch=batches, kind=kinds, seed=st.integers(0, 99), absorbed=st.booleans())
def test_what_is_read_is_what_was_kept(
    batch: list[tuple[int, int]], kind: tuple[Cached, str], seed: int, absorbed: bool
) -> None:
    """The plain module over entries that the other one kept, writing none, gives the same; and these are
    near the plain ones. Entries that nothing wrote are NaN all along."""
    made, cast = kind
    plain, m = made.build(), made.build()
    run(f"mla-absorb{{absorb_below=3}},paged-attention,{cast}" if absorbed else cast, m)
    assert print_module(parse_module(print_module(m))) == print_module(m)
    (type,) = {a.type for f in m for a in f.args if isinstance(a.type, CacheType)}
    weights, args = random_weights(m, seed), made.inputs(batch, seed)
    *given, slots, old = args
    got, kept = interpret(m, weights, [*given, slots, old.stored_as(type)])
    assert bool(got.isfinite().all())
    (usual,) = {a.type for f in plain for a in f.args if isinstance(a.type, CacheType)}
    want, _ = interpret(plain, weights, [*given, torch.full_like(slots, -1), kept.stored_as(usual)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    _, entries = interpret(plain, weights, args)
    x, y = entries.layers[0], kept.meant(0)  # what the first layer writes hangs on no cache
    assert torch.equal(x.isnan(), y.isnan())
    amax = x.nan_to_num().abs().flatten(1).amax(1).view(-1, *[1] * (x.dim() - 1))
    least = amax / 448 / 1024 if type.rank else torch.tensor(2.0**-10)
    limit = (x.abs() / 16).maximum(least.clamp(min=1e-9)) * 1.001
    assert bool(((x - y).abs() <= limit).logical_or(x.isnan()).all())


ORDERS = [
    ("mla-absorb{absorb_below=3}", Latent(), PACKED),
    ("mla-absorb{absorb_below=3},canonicalise", Latent(bodies=2), ONE),
    ("mla-absorb{absorb_below=9999999999}", Latent(), PACKED),
    ("paged-attention", Grouped(), ONE),
    ("canonicalise,merge-projections", Latent(), PACKED),
]


@pytest.mark.parametrize(("others", "made", "cast"), ORDERS)
def test_any_order_gives_the_same(others: str, made: Cached, cast: str) -> None:
    before, after = made.build(), made.build()
    run(f"{cast},{others}", before)
    run(f"{others},{cast}", after)
    assert print_module(before, derived=False) == print_module(after, derived=False)
    assert len(cache_types(before)) == 1


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = Latent(dtype="bf16").build()
    golden("kv.before.moec", golden_text(m))
    run(PACKED, m)
    golden("kv.packed.moec", golden_text(m))
    m = Grouped().build()
    run("paged-attention,fp8-cast{ops=[],kv=per-tensor,kv_scale=0.5}", m)
    golden("kv.one.moec", golden_text(m))


def test_negative_twins() -> None:
    """No cache of latents; one that is cut in two ways; off."""
    for made in (Latent(), Grouped()):
        m = made.build()
        text = print_module(m)
        run("fp8-cast{ops=[grouped_linear]}", m)
        assert print_module(m) == text
    with pytest.raises(BadOption, match=r"kv=packed: %kv is cache<f32.*>, no cache of latents"):
        run(PACKED, Grouped().build())
    kept = parse_module(
        """moec.ir 1 module @t target=cpu

func @forward(%x: f32[N,7], %table: i32[B,P], %lens: i32[B], %slots: i64[N], %layer: index, \
%kv: cache<f32[7], page=4>) -> f32[S,5], f32[S,4], cache<f32[7], page=4>
  %kv.1 = cache_write(%kv, %layer, %x, %slots) : cache<f32[7], page=4>
  %a = cache_read(%kv.1, %layer, %table, %lens) : f32[S,7]
  %c, %d = split(%a) {sizes=[5,2]} : f32[S,5], f32[S,2]
  %b = cache_read(%kv.1, %layer, %table, %lens) : f32[S,7]
  %e, %f = split(%b) {sizes=[4,3]} : f32[S,4], f32[S,3]
  return %c, %e, %kv.1
end
"""
    )
    text = print_module(kept)
    with pytest.raises(BadOption, match=r"kv=packed: %kv is read otherwise by %a = .* than by %b = "):
        run(PACKED, kept)
    assert print_module(kept) == text
    run(ONE, kept)
    assert cache_types(kept) == {"cache<f8e4m3[7], page=4>"}


def test_a_cache_that_cannot_be_packed_beside_one_that_can() -> None:
    """Is left as it is, and says why."""
    m = parse_module(
        """moec.ir 1 module @t target=cpu

func @forward(%x: f32[N,7], %y: f32[N,2,3], %table: i32[B,P], %lens: i32[B], %slots: i64[N], %layer: index, \
%a: cache<f32[7], page=4>, %b: cache<f32[2,3], page=4>) \
-> f32[S,5], cache<f32[7], page=4>, cache<f32[2,3], page=4>
  %a.1 = cache_write(%a, %layer, %x, %slots) : cache<f32[7], page=4>
  %b.1 = cache_write(%b, %layer, %y, %slots) : cache<f32[2,3], page=4>
  %r = cache_read(%a.1, %layer, %table, %lens) : f32[S,7]
  %c, %d = split(%r) {sizes=[5,2]} : f32[S,5], f32[S,2]
  return %c, %a.1, %b.1
end
"""
    )
    runs = run(PACKED, m)
    assert runs[-1].fired == {"kv-packed": 1}
    assert cache_types(m) == {"cache<u8[13], page=4, rank=5>", "cache<f32[2,3], page=4>"}
    assert reasons(runs, "kv-packed") == ["%b is cache<f32[2,3], page=4>, no cache of latents"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("kv=pakced", "kv=pakced: no cache is kept so; did you mean packed"),
        ("kv=fp4", "there are off, per-tensor, packed"),
        ("kv=per-tensor,kv_scale=0", "kv_scale is 0.0; it must be a positive number"),
        ("kv=per-tensor,kv_scale=nan", "kv_scale is nan"),
        ("kv=per-tensor,kv_scale=inf", "kv_scale is inf"),
        ("kv=packed,kv_scale=2", "kv_scale is of kv=per-tensor, not of kv=packed"),
        ("ops=[]", "the recipe names no op"),
        ("ops=[],kv=off", "the recipe names no op"),
    ],
)
def test_bad_options(options: str, message: str) -> None:
    with pytest.raises(BadOption, match=message) as raised:
        parse_pipeline(f"fp8-cast{{{options}}}")
    assert raised.value.code == "M0701"


def test_retyping_an_argument_that_an_op_refuses_changes_nothing() -> None:
    m = Latent().build()
    text = print_module(m)
    body = m["layer0"]
    (arg,) = [a for a in body.args if isinstance(a.type, CacheType)]
    with pytest.raises(TypeMismatch, match="doesn't fit"):
        body.retype(arg, replace(arg.type, entry=(9,)))
    assert print_module(m) == text


def test_the_oracle_catches_a_scale_that_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Latent()
    args = made.inputs([(3, 2), (1, 4)])

    def caught() -> bool:
        m = made.build()
        oracle = Oracle({"forward": args}, random_weights(m), tolerance=0.2)
        try:
            PassManager(parse_pipeline(ONE), [oracle]).run(m)
        except ToleranceExceeded:
            return True
        return False

    assert not caught()
    sound = fp8_cache._quantised

    def planted(*given: Any) -> Any:
        new, why = sound(*given)
        return replace(new, scale=1e-4), why

    monkeypatch.setattr(fp8_cache, "_quantised", planted)
    assert caught()
