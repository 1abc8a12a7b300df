"""local_experts and local_sort against a loop over the choices."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ir.helpers import ints, reference

CHOICE = st.tuples(
    st.integers(-9, 9) | st.sampled_from([-(2**31), 2**31 - 1]), st.sampled_from([0.5, math.nan, math.inf])
)


@given(st.lists(CHOICE, max_size=12), st.integers(0, 4), st.integers(1, 5))
def test_each_choice_is_kept_or_left_out(choices: list[tuple[int, float]], first: int, experts: int) -> None:
    id = ints(*(i for i, _ in choices)).view(-1, 1)
    w = torch.tensor([w for _, w in choices]).view(-1, 1)
    kept, local = reference("local_experts", w, id, first=first, experts=experts)
    expected = [(w, i - first) if first <= i < first + experts else (0.0, experts) for i, w in choices]
    assert local.flatten().tolist() == [i for _, i in expected]
    torch.testing.assert_close(kept.flatten(), torch.tensor([w for w, _ in expected]), equal_nan=True)


@given(st.lists(CHOICE, max_size=12), st.integers(0, 4), st.integers(1, 5))
def test_those_kept_are_sorted(choices: list[tuple[int, float]], first: int, experts: int) -> None:
    id = ints(*(i for i, _ in choices)).view(-1, 1)
    w = torch.ones(id.shape)
    kept, local, slot, off = reference("local_sort", w, id, first=first, experts=experts)
    by_expert = [[s for s, (i, _) in enumerate(choices) if i == first + e] for e in range(experts)]
    order = [s for each in by_expert for s in each]
    others = [s for s in range(len(choices)) if s not in order]
    assert slot.tolist() == order + others
    assert off.tolist() == [sum(map(len, by_expert[:e])) for e in range(experts + 1)]
    assert kept.flatten().tolist() == [float(s in order) for s in range(len(choices))]
    assert (local.flatten()[others] == experts).all()
