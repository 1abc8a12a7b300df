"""paged-attention: the cache is read in place, and only where keys and values are all that is behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import parse_module, print_module
from tests.passes.cached import BATCHES, Grouped, grouped
from tests.passes.modules import close, golden_text, op_names, random_weights, reasons, run


@settings(max_examples=15)
@given(block=grouped, batch=BATCHES, seed=st.integers(0, 99))
def test_same_result(block: Grouped, batch: list[tuple[int, int]], seed: int) -> None:
    m = block.build()
    weights, args = random_weights(m, seed), block.inputs(batch, seed)
    before = block.run(m, weights, args)
    run("paged-attention,canonicalise", m)
    assert "paged_attention" in op_names(m, "layer0") and "cache_read" not in op_names(m, "layer0")
    close(before, block.run(m, weights, args), tolerance=1e-5)


def test_values_before_keys_are_left_alone() -> None:
    m = Grouped(values=0).build()
    before = print_module(m)
    (reason,) = reasons(run("paged-attention", m), "paged", "layer0")
    assert reason == "%vs is result 1 of split"
    assert print_module(m) == before


def test_offsets_of_other_lengths_are_left_alone() -> None:
    """The near miss: keys are cut by what another input counts."""
    text = print_module(Grouped().build(), derived=False)
    m = parse_module(
        text.replace("%lens: i32[B],", "%lens: i32[B], %others: i32[B],", 1).replace(
            "prefix_sum(%lens)", "prefix_sum(%others)"
        )
    )
    before = print_module(m)
    (reason,) = reasons(run("paged-attention", m), "paged", "layer0")
    assert reason == "%cu_k isn't known to be the prefix_sum of %lens, by which the cache is read"
    assert print_module(m) == before


@pytest.mark.parametrize("kind", ["keys_and_values", "window"])
def test_golden(kind: str, golden: Callable[[str, str], None]) -> None:
    m = (
        Grouped(heads=4, kv_heads=2) if kind == "keys_and_values" else Grouped(window=2, causal=True)
    ).build()
    golden(f"paged_{kind}.before.moec", golden_text(m))
    run("paged-attention", m)
    golden(f"paged_{kind}.after.moec", golden_text(m))
