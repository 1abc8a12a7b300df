"""Fields of the DSL's blocks: whatever is put into one is refused where the block is made, or it compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import moec.models as m
from moec.errors import SpecError
from moec.models.blocks.base import Declared

LATENT = m.MLA(heads=2, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, kv_lora_rank=8)
ATTN = m.GQA(heads=2, kv_heads=1, head_dim=8)
MOE = m.MoE(m.Router(4, 2), m.Experts(4, 8), m.SwiGLU(8), shared_gate="gate2")
YARN = m.YaRN(factor=2.0, original=64)


def model(**fields: Any) -> m.Model:
    return m.Model(**{"vocab": 11, "hidden": 16, "layers": [m.Decoder(ATTN, MOE)]} | fields)


# Each block, and a spec that it is part of.
BLOCKS: list[tuple[Declared, Callable[[Any], m.Model | m.Layer]]] = [
    (model(), lambda x: x),
    (m.Layer(MOE, 16), lambda x: x),
    (m.Decoder(ATTN, MOE), lambda x: m.Layer(x, 16)),
    (ATTN, lambda x: m.Layer(x, 16)),
    (LATENT, lambda x: m.Layer(x, 16)),
    (MOE, lambda x: m.Layer(x, 16)),
    (MOE.router, lambda x: m.Layer(m.MoE(x, m.Experts(x.experts, 8)), 16)),
    (MOE.experts, lambda x: m.Layer(m.MoE(m.Router(x.count, 1), x), 16)),
    (m.SwiGLU(8), lambda x: m.Layer(x, 16)),
    (m.RMSNorm(), lambda x: m.Layer(x, 16)),
    (m.BlockFP8((4, 4)), lambda x: model(quantization=x)),
    *((r, lambda x: m.Layer(m.GQA(2, 1, 8, rope=x), 16)) for r in (m.RoPE(), m.LinearRoPE(), YARN)),
    (m.Llama3RoPE(), lambda x: m.Layer(m.GQA(2, 1, 8, rope=x), 16)),
]
STRANGE = [
    *("a", "", "x y", "(", "a.*", "1"),
    *(-1, 0, 1, 3, -1.0, 0.5, 10**400, float("nan"), float("inf"), True, None),
    *((), (1,), ("a",), (("(", "bad"),), (("a", 3),), [], [3], {}, object(), b"a", ATTN, m.RoPE),
]


def fields() -> Iterator[Any]:
    for block, spec in BLOCKS:
        for field in dataclasses.fields(block):  # type: ignore[arg-type]
            yield pytest.param(block, spec, field.name, id=f"{type(block).__name__}.{field.name}")


@pytest.mark.parametrize(("block", "spec", "field"), [*fields()])
def test_a_strange_value_is_refused_at_the_users_line_or_compiles(
    block: Any, spec: Callable[[Any], m.Model | m.Layer], field: str
) -> None:
    m.lower(spec(block))
    refused = 0
    for value in STRANGE:
        try:
            changed = dataclasses.replace(block, **{field: value})
        except SpecError as error:
            assert field.split("_")[-1] in error.message or "expert" in error.message, error
            assert error.loc is not None and error.loc.file == __file__, error
            refused += 1
            continue
        hash(changed)
        m.lower(spec(changed))
    assert refused > len(STRANGE) / 3  # no field takes anything


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(eps="a"), "Model: eps must be a finite number above 0, not 'a'"),
        (lambda: model(eps=-1.0), "eps must be a finite number above 0, not -1.0"),
        (lambda: model(name=3), "name must be a text, not 3"),
        (lambda: model(eos="x"), "eos must be a token id or a tuple of them, not 'x'"),
        (lambda: model(eos=11), "eos names 11, which is no id of a vocabulary of 11"),
        (lambda: model(eos=(2, -1)), "eos names -1"),
        (lambda: model(eos=(True,)), "eos names True"),
        (lambda: model(ignored=(("(", "bad"),)), r"'\(' in ignored is no regex"),
        (lambda: model(tied=1), "tied must be True or False, not 1"),
        (lambda: model(first_layer=-1), "first_layer must be an integer of 0 or more"),
        (lambda: model(quantization="fp8"), "quantization must be a BlockFP8"),
        (lambda: model(dtype=["f32"]), "dtype is one of f32, bf16, f16"),
        (lambda: model(vocab=2**41), "vocab must be an integer of 1 to"),
        (lambda: m.Router(4, 2, scale="x"), "Router: scale must be a finite number, not 'x'"),
        (lambda: m.Router(4, 2, scale=float("inf")), "scale must be a finite number, not inf"),
        (lambda: m.GQA(2, 1, 8, window="a"), "window must be an integer of 0 or more, not 'a'"),
        (lambda: m.GQA(2, 1, 8, window=1.5), "window must be an integer"),
        (lambda: m.GQA(2, 1, 8, clip=0), "clip must be a finite number above 0"),
        (lambda: m.GQA(2, 1, 8, name="a b"), "name must be a name"),
        (lambda: m.RoPE(theta="x"), "theta must be a finite number above 1, not 'x'"),
        (lambda: m.RoPE(theta=1.0), "theta must be a finite number above 1"),
        (lambda: m.YaRN(factor=0.5), "factor must be a finite number of 1 or more"),
        (lambda: m.YaRN(beta_fast=1.0, beta_slow=2.0), "beta_fast is 1.0, below beta_slow, 2.0"),
        (lambda: m.Llama3RoPE(low=4.0, high=4.0), "low is 4.0, not below high"),
        (lambda: m.Experts(4, 8, weights=("a", "a", "b")), "weights names three projections"),
        (lambda: m.BlockFP8((8, 8), keep=(3,)), "keep must hold texts, not 3"),
        (lambda: m.BlockFP8((8, 8), scale_fmt="e8m0"), "scale_fmt is one of fp32, ue8m0, not 'e8m0'"),
        (lambda: m.BlockFP8(8), "block is two positive integers, not 8"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        make()
    assert caught.value.loc is not None and caught.value.loc.file == __file__


def test_what_is_taken() -> None:
    assert model(eos=2).eos == model(eos=[2]).eos == (2,)
    assert model(eos=(0, 10)).eos == (0, 10)
    assert model(ignored=[(r"a\.b", "why")]).ignores("a.b") == "why"
    assert m.Experts(4, 8, weights=["w1", "w3", "w2"]).weights == ("w1", "w3", "w2")
    assert m.BlockFP8([8, 8], keep=["lm_head"]) == m.BlockFP8((8, 8), ("lm_head",))
    m.YaRN(factor=1, beta_fast=1, beta_slow=1)
    whole = m.GQA(
        2, 1, 8, window=3, clip=2, scale=1, eps=1, rope=m.RoPE(theta=10)
    )  # integers serve as numbers
    m.lower(m.Layer(whole, 16))
