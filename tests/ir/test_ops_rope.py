"""rope_table against transformers' frequencies, rope against its two ways of turning pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from moec.ir.ops.rope import RopeTable, rope_frequencies
from tests.ir.helpers import reference

DEFAULTS = {key: spec.default for key, spec in RopeTable.attr_specs.items() if not spec.required}


def frequencies(**how: Any) -> torch.Tensor:
    how = {k: v for k, v in (DEFAULTS | how).items() if k != "magnitude"}
    return torch.tensor(rope_frequencies(**how))


def theirs(kind: str, dim: int, theta: float, **parameters: Any) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=int(parameters.get("original_max_position_embeddings", 64) * 4),
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )
    inv, magnitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv, magnitude


heads = st.sampled_from([2, 8, 64, 128])
thetas = st.sampled_from([100.0, 1e4, 5e5])
factors = st.sampled_from([1.5, 8.0, 40.0])


@given(heads, thetas, factors)
def test_linear(dim: int, theta: float, factor: float) -> None:
    expected, _ = theirs("linear", dim, theta, factor=factor)
    torch.testing.assert_close(
        frequencies(dim=dim, theta=theta, scaling="linear", factor=factor).float(), expected
    )


@given(
    heads,
    thetas,
    factors,
    st.sampled_from([64, 4096]),
    st.booleans(),
    st.sampled_from([(32.0, 1.0), (4.0, 0.5)]),
)
def test_yarn(
    dim: int, theta: float, factor: float, original: int, truncate: bool, beta: tuple[float, float]
) -> None:
    expected, _ = theirs(
        "yarn",
        dim,
        theta,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=beta[0],
        beta_slow=beta[1],
        truncate=truncate,
    )
    found = frequencies(
        dim=dim,
        theta=theta,
        scaling="yarn",
        factor=factor,
        original=original,
        truncate=truncate,
        beta_fast=beta[0],
        beta_slow=beta[1],
    )
    torch.testing.assert_close(found.float(), expected)


@given(heads, thetas, factors, st.sampled_from([64, 8192]), st.sampled_from([(1.0, 4.0), (2.0, 3.0)]))
def test_llama3(dim: int, theta: float, factor: float, original: int, limits: tuple[float, float]) -> None:
    low, high = limits
    expected, _ = theirs(
        "llama3",
        dim,
        theta,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )
    found = frequencies(
        dim=dim, theta=theta, scaling="llama3", factor=factor, original=original, low=low, high=high
    )
    torch.testing.assert_close(found.float(), expected)


def test_deepseek_s_yarn_blends_between_pairs_10_and_23() -> None:
    plain = frequencies(dim=64, theta=1e4)
    found = frequencies(dim=64, theta=1e4, scaling="yarn", factor=40.0, original=4096)
    ratio = found / plain
    assert ratio[10] == 1.0 and ratio[11] < 1.0  # low = 10
    assert ratio[22] > 1 / 40 and ratio[23] == pytest.approx(1 / 40)  # high = 23
    for i in range(11, 23):
        ramp = (i - 10) / 13
        assert ratio[i].item() == pytest.approx(1 - ramp + ramp / 40)


def test_the_table() -> None:
    positions = torch.tensor([0, 1, 7])
    cos, sin = reference("rope_table", positions, dim=4, theta=100.0, magnitude=0.5)
    assert cos.dtype == sin.dtype == torch.float32
    for row, position in enumerate([0, 1, 7]):
        for pair, frequency in enumerate([1.0, 0.1]):
            assert cos[row, pair].item() == pytest.approx(0.5 * math.cos(position * frequency), abs=1e-6)
            assert sin[row, pair].item() == pytest.approx(0.5 * math.sin(position * frequency), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_turns_as_transformers_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8).to(dtype)
    cos, sin = reference("rope_table", torch.arange(5) * 3, dim=8, theta=1e4)
    as_theirs = x.transpose(0, 1)[None].float()  # [1, heads, tokens, d]

    wide = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    half, _ = apply_rotary_pos_emb(as_theirs, as_theirs, *wide)
    found = reference("rope", x, cos, sin, layout="half")
    torch.testing.assert_close(found, half[0].transpose(0, 1).to(dtype))

    turned, _ = apply_rotary_emb(as_theirs, as_theirs, torch.complex(cos, sin)[None])
    interleaved = reference("rope", x, cos, sin, layout="interleaved")
    torch.testing.assert_close(interleaved, turned[0].transpose(0, 1).to(dtype))

    assert not torch.allclose(found, interleaved)
    # Without heads it's the same, head by head.
    assert torch.equal(reference("rope", x[:, 1], cos, sin, layout="half"), found[:, 1])
