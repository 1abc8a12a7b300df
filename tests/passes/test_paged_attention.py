"""paged-attention: the cache is read in place, and only where keys and values are all that is behind it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import print_module
from tests.passes.cached import BATCHES, Grouped, grouped
from tests.passes.modules import close, op_names, random_weights, reasons, run


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
