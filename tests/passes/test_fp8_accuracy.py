"""What fp8 costs: floors for data that is normally distributed, and bounds for each element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir import parse_module, print_module
from moec.passes.fp8_recipes import RECIPES
from tests.passes.fp8_layer import GROUP, layer, sqnr
from tests.passes.modules import (
    MoE,
    interpret,
    moe_blocks,
    random_weights,
    run,
    tokens,
)

FLOORS = {"deepseek-v3": 28.0, "deepseek-v3.1": 28.0, "per-row": 28.0, "per-tensor": 27.0}
PRODUCT = """\
moec.ir 1 func @forward(%x: f32[N,512], %off: i32[5]) -> f32[N~4,256] target=cpu
  param $w: f32[4,256,512]
  %y = grouped_linear(%x, $w, %off) : f32[N~4,256]
  return %y
end
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_gaussian_data_keeps_its_floor(recipe: str) -> None:
    """16,384 outputs of one grouped product."""
    m = parse_module(PRODUCT)
    weights, x = random_weights(m), tokens(64, 512)
    off = torch.tensor([0, 10, 10, 50, 64], dtype=torch.int32)
    before = interpret(m, weights, x, off)
    run(f"fp8-cast{{recipe={recipe}}}", m)
    after = interpret(m, weights, x, off)
    assert before.numel() >= 4096 and sqnr(before, after) > FLOORS[recipe]
    coarse = interpret(m, weights, x * 2.0 ** torch.randint(-2, 3, x.shape).float(), off)
    assert sqnr(before, coarse) < FLOORS[recipe]  # the floor is one: a scale read wrongly falls through it


def test_every_recipe_has_a_floor() -> None:
    assert set(FLOORS) == set(RECIPES)


def test_outliers_cost_their_block_only() -> None:
    m = parse_module(PRODUCT)
    weights, off = random_weights(m), torch.tensor([0, 10, 10, 50, 64], dtype=torch.int32)
    x = tokens(64, 512)
    x[:, 7] *= 3000
    x[3] *= 1e4
    before = interpret(m, weights, x, off)
    for recipe, low in (("deepseek-v3", 25.0), ("per-row", 10.0)):
        n = m.clone()
        run(f"fp8-cast{{recipe={recipe}}}", n)
        assert sqnr(before, interpret(n, weights, x, off)) > low


@given(
    rows=st.integers(0, 3),
    depth=st.integers(1, 40),
    columns=st.integers(1, 20),
    recipe=st.sampled_from(sorted(RECIPES)),
    block=st.sampled_from([None, 4, 16]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_elements_stay_within_their_bound(
    rows: int, depth: int, columns: int, recipe: str, block: int | None, scale: float, seed: int
) -> None:
    """|y - exact| <= Σ_k (2^-4 + 2^-4 + 2^-8) |x w|, and what tiny values lose below the smallest step."""
    columns += columns == 1  # one column is a gate
    m = parse_module(
        f"moec.ir 1 func @forward(%x: f32[N,{depth}]) -> f32[N,{columns}] target=cpu\n"
        f"  param $w: f32[{columns},{depth}]\n  %y = linear(%x, $w) : f32[N,{columns}]\n  return %y\nend\n"
    )
    weights, x = random_weights(m, seed), tokens(rows, depth, seed) * scale
    before = interpret(m, weights, x)
    given_block = f",block={block}" if block else ""
    assert run(f"fp8-cast{{recipe={recipe}{given_block}}}", m)[-1].changed
    after = interpret(m, weights, x)
    w = weights["w"].abs()
    step_x = (
        max(float(x.abs().max()) if x.numel() else 0.0, 1e-4) / 448 * 2**-9
    )  # half the smallest step, doubled
    step_w = max(float(w.max()), 1e-4) / 448 * 2**-9
    size = x.abs() @ w.T
    small = 4 * (step_x * w.sum(1) + step_w * x.abs().sum(1, keepdim=True) + depth * step_x * step_w)
    assert after.shape == before.shape and bool(((after - before).abs() <= 0.13 * size + small + 1e-30).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_that_is_not_finite_stays_alone(recipe: str, bad: float) -> None:
    m = layer()
    weights, x = random_weights(m), tokens(5, 40)
    run(f"fp8-cast{{recipe={recipe}}},permute-fusion", m)
    clean = interpret(m, weights, x)
    x[2, 3] = bad
    dirty = interpret(m, weights, x)
    assert not bool(dirty[2].isfinite().any()) and bool(dirty[[0, 1, 3, 4]].isfinite().all())
    if recipe.startswith("deepseek"):  # elsewhere a scale of all rows may have been its
        assert torch.equal(clean[[0, 1, 3, 4]], dirty[[0, 1, 3, 4]])


@given(
    block=moe_blocks(hidden=8),
    count=st.integers(0, 5),
    seed=st.integers(0, 9),
    recipe=st.sampled_from(sorted(RECIPES)),
)
def test_blocks_of_every_kind(block: MoE, count: int, seed: int, recipe: str) -> None:
    """Before and after grouping: the same numbers, where rows are quantised alike."""
    m = block.build()
    weights, x = random_weights(m, seed), tokens(count, block.hidden, seed)
    naive = m.clone()
    run(f"fp8-cast{{recipe={recipe}}}", naive)
    run(f"{GROUP},fp8-cast{{recipe={recipe}}},permute-fusion", m)
    assert print_module(parse_module(print_module(m))) == print_module(m)
    got, want = interpret(m, weights, x), interpret(naive, weights, x)
    assert got.shape == want.shape == (count, block.hidden) and bool(got.isfinite().all())
