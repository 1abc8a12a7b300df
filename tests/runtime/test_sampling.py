"""From logits to a token, against a plain implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from moec.errors import BadInput
from moec.runtime.sampling import Sampling

values = st.lists(st.floats(-20, 20, width=32) | st.just(-math.inf), min_size=1, max_size=12).filter(
    lambda logits: max(logits) > -math.inf
)


def plain(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Token by token, in double precision."""
    best = max(logits)
    weights = [math.exp((x - best) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    total = sum(weights[i] for i in kept)
    chosen, reached = [], 0.0
    for i in kept:
        if reached >= top_p:
            break
        chosen.append(i)
        reached += weights[i] / total
    total = sum(weights[i] for i in (chosen if top_p < 1.0 else kept))
    return [weights[i] / total if i in (chosen if top_p < 1.0 else kept) else 0.0 for i in range(len(logits))]


@given(
    logits=values,
    temperature=st.sampled_from([0.01, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
)
def test_probabilities(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    # Where p is reached all but exactly, either answer is right.
    near = [
        Sampling(temperature, top_k, min(top_p * f, 1.0)).probabilities(torch.tensor(logits))
        for f in (1 - 1e-9, 1 + 1e-9)
    ]
    assume(torch.equal(*(n > 0 for n in near)))
    got = Sampling(temperature, top_k, top_p).probabilities(torch.tensor(logits))
    want = plain(logits, temperature, top_k, top_p)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=1e-5, atol=1e-7)
    assert [p > 0 for p in got.tolist()] == [p > 1e-45 for p in want] or min(p for p in want if p) < 1e-37


@given(values, st.integers(0, 99))
def test_greedy_takes_the_best_and_the_lowest_of_equals(logits: list[float], seed: int) -> None:
    token = Sampling().pick(torch.tensor(logits), torch.Generator().manual_seed(seed))
    assert token == logits.index(max(logits))


@given(values, st.sampled_from([1e-300, 1e-40, 1e-8]))
def test_a_temperature_near_zero_is_all_but_greedy(logits: list[float], temperature: float) -> None:
    logits = [math.trunc(x) if math.isfinite(x) else x for x in logits]
    token = Sampling(temperature).pick(torch.tensor(logits, dtype=torch.float32), torch.Generator())
    assert logits[token] == max(logits)


@given(values, st.integers(0, 99), st.integers(1, 3))
def test_only_what_is_kept_is_drawn(logits: list[float], seed: int, top_k: int) -> None:
    token = Sampling(1.0, top_k).pick(torch.tensor(logits), torch.Generator().manual_seed(seed))
    assert sum(x > logits[token] for x in logits) < top_k
    assert logits[token] > -math.inf


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.5), Sampling(2.0, top_k=3), Sampling(1.0, top_p=0.8)], ids=str
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling) -> None:
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, 2.0])
    generator, draws = torch.Generator().manual_seed(1), 3000
    counts = torch.bincount(
        torch.tensor([sampling.pick(logits, generator) for _ in range(draws)]), minlength=len(logits)
    )
    expected = torch.tensor(plain(logits.tolist(), sampling.temperature, sampling.top_k, sampling.top_p))
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4 * deviation + 1e-9).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, 2, 0.5)], ids=str)
@pytest.mark.parametrize(
    "logits", [[0.0, math.nan], [math.inf, 0.0], [math.nan] * 3, [-math.inf, -math.inf]], ids=str
)
def test_logits_that_say_nothing_are_refused(sampling: Sampling, logits: list[float]) -> None:
    with pytest.raises(BadInput, match=r"M0601.*best logit"):
        sampling.pick(torch.tensor(logits), torch.Generator())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=dtype)
    got = Sampling(1.0).probabilities(logits)
    torch.testing.assert_close(got, torch.tensor([0.0900, 0.2447, 0.6652]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(BadInput, match=f"M0601.*{name} is"):
        Sampling(**options)
