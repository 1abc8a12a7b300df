"""Selection: its model's parts by hand, and what it must pick where that is beyond doubt."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.kernels.triton_grouped import Sums
from moec.codegen.kernels.triton_grouped_combine import few_tokens
from moec.codegen.ladders import parse_ladder
from moec.codegen.schedules import Problem, Schedule, reasons_against, space
from moec.codegen.select import band, choose, explain, ladder, row_tiles, terms, tiles_of
from moec.codegen.targets import TARGETS
from moec.ir.devices import GPUS

H100 = GPUS["sm_90a"]
V3_UP = Problem(256, 2048, 7168, "bf16", 2, matrices=2, gathered=True)
V3_DOWN = Problem(256, 7168, 2048, "bf16", 2)

PROBLEMS = st.builds(
    Problem,
    experts=st.integers(1, 512),
    columns=st.integers(1, 20000),
    depth=st.integers(1, 10000).map(lambda k: 2 * k),
    dtype=st.sampled_from(["bf16", "f16"]),
    itemsize=st.just(2),
    matrices=st.sampled_from([1, 2]),
    gathered=st.booleans(),
) | st.builds(
    Problem, st.integers(1, 64), st.integers(1, 500), st.integers(1, 500), st.just("f32"), st.just(4)
)


def test_gpu_targets_have_devices() -> None:
    assert {t for t in TARGETS if t.startswith("sm_")} <= GPUS.keys()


@given(PROBLEMS, st.sampled_from(list(GPUS)))
def test_every_shape_has_a_ladder(problem: Problem, target: str) -> None:
    """Ascending, ending with any number of rows, and only of schedules that may be picked."""
    device = GPUS[target]
    allowed = space(problem, device)
    rungs = ladder(problem, device)
    bounds = [below for below, _ in rungs]
    assert bounds == sorted(bounds) and bounds[-1] == math.inf
    assert all(s in allowed for _, s in rungs)
    assert all(few != many for (_, few), (_, many) in pairwise(rungs))
    assert len({s for _, s in rungs}) <= 8  # each is compiled


@given(PROBLEMS, st.sampled_from(list(GPUS)), st.floats(0.01, 5000))
def test_terms_are_seconds(problem: Problem, target: str, rows: float) -> None:
    device = GPUS[target]
    for choice in explain(problem, device, rows):
        assert all(t >= 0 and math.isfinite(t) for t in choice.terms.values()), choice
        # No schedule beats moving the active weights once.
        active = problem.experts * (1 - math.exp(-rows))
        floor = active * problem.matrices * problem.columns * problem.depth * problem.itemsize
        assert choice.seconds >= floor / device.bandwidth


@pytest.mark.parametrize("rows, block", [(0.03, 16), (3.0, 16), (40.0, 16), (40.0, 64), (700.0, 128)])
def test_row_tiles_are_the_mean_of_many_routings(rows: float, block: int) -> None:
    counts = torch.poisson(torch.full((200_000,), rows), generator=torch.Generator().manual_seed(0))
    assert row_tiles(rows, block) == pytest.approx((counts / block).ceil().mean().item(), rel=0.02)


@pytest.mark.parametrize("problem", [V3_UP, V3_DOWN])
def test_hopper_swaps_for_few_rows_and_only_for_few(problem: Problem) -> None:
    assert choose(problem, H100, 0.03).schedule.form == "swapped"
    assert choose(problem, H100, 4.0).schedule.form == "swapped"
    assert choose(problem, H100, 256.0).schedule.form == "rows"
    assert choose(problem, H100, 4096.0).schedule.block_m == 128


def test_model_at_the_roofline() -> None:
    """V3 with one token: 8 experts' weights through DRAM; with 16384: the products, at Triton's rate."""
    one = choose(V3_UP, H100, 8 / 256)
    weights = 256 * (1 - math.exp(-8 / 256)) * 4096 * 7168 * 2 / 3.0e12
    assert one.terms["weights"] == pytest.approx(weights)
    assert one.seconds < 1.2 * weights
    many = choose(V3_UP, H100, 512.0)
    products = 2 * 512 * 256 * 4096 * 7168 / 798e12
    assert 1.2 * products < many.seconds < 2 * products


def test_shared_memory_is_enforced() -> None:
    """What fits one device is refused on another, with the reason."""
    big = Schedule("rows", 128, 128, 64, 8, 4)
    assert not reasons_against(big, V3_UP, H100)
    assert any("bytes of shared memory" in r for r in reasons_against(big, V3_UP, GPUS["sm_89"]))
    assert any("bytes of shared memory" in r for r in reasons_against(replace(big, stages=5), V3_UP, H100))
    for device in GPUS.values():
        assert all(V3_UP.shared_memory(s, device) <= device.smem_per_block for s in space(V3_UP, device))


@pytest.mark.parametrize("text", ["rows 0x64x64 w4 s3", "rows 64x64x64 w0 s3", "rows 64x64x64 w4 s3 split0"])
def test_numbers_of_a_schedule_are_positive(text: str) -> None:
    with pytest.raises(ValueError, match="every number is 1 or more"):
        parse_ladder(text, V3_UP, H100)


@pytest.mark.parametrize("text", ["rows ٦٤x64x64 w4 s3", "<٣ rows: rows 64x64x64 w4 s3; rows 64x64x64 w4 s3"])
def test_numbers_of_a_schedule_are_digits(text: str) -> None:
    with pytest.raises(ValueError, match=r"is none|is no number of rows"):
        parse_ladder(text, V3_UP, H100)


def test_slow_or_spilling_schedules_are_refused() -> None:
    def reasons(*schedule: object, problem: Problem = V3_UP) -> str:
        return "; ".join(reasons_against(Schedule(*schedule), problem, H100))  # type: ignore[arg-type]

    assert "slow path" in reasons("rows", 32, 128, 64, 4, 4)
    assert "slow path" in reasons("swapped", 16, 32, 64, 4, 4)
    assert "spill" in reasons("rows", 128, 128, 64, 4, 3)
    assert not reasons("rows", 128, 128, 64, 4, 3, problem=V3_DOWN)
    pieces = replace(V3_DOWN, depth=2050)
    assert "16 bytes" in reasons("rows", 128, 128, 64, 8, 3, problem=pieces)
    swapped = Schedule("swapped", 16, 64, 64, 4, 4)
    assert reasons_against(swapped, V3_DOWN, GPUS["sm_80"])


def test_terms_name_what_bounds() -> None:
    small, big = Schedule("swapped", 16, 64, 64, 4, 4), Schedule("rows", 128, 128, 64, 8, 4)
    few, many = terms(small, V3_UP, H100, 1.0), terms(big, V3_UP, H100, 2048.0)
    assert max(few, key=lambda t: few[t]) == "weights"
    assert max(many, key=lambda t: many[t]) == "matrix unit"
    # Too few rows for the tile: the padding is multiplied too.
    assert terms(big, V3_UP, H100, 1.0)["matrix unit"] > few["matrix unit"]


# What one of eight GPUs that share DeepSeek-V3's experts by columns multiplies; attention's first product.
SLICE = Problem(256, 256, 7168, "bf16", 2, matrices=2, gathered=True)
DENSE = Problem(1, 2112, 7168, "f8e4m3", 1)


def test_k_is_split_where_tiles_do_not_fill_the_chip() -> None:
    """One token's 8 experts have 32 tiles, a dense product's rows 33; V3's own 8 experts have 256."""
    for problem, parts in ((SLICE, True), (DENSE, True), (V3_UP, False)):
        few = ladder(problem, H100)[0][1]
        assert (few.split > 1) == parts, few
    assert all(s.split == 1 for below, s in ladder(SLICE, H100) if below > 1.0)
    assert choose(SLICE, H100, 16.0).schedule.split == 1


def test_terms_of_parts() -> None:
    """More SMs take part, more bytes are on their way; what is exchanged is each part's sums, twice."""
    one = Schedule("swapped", 16, 64, 64, 4, 4)
    whole, parts = (terms(s, SLICE, H100, 8 / 256) for s in (one, replace(one, split=4)))
    assert parts["weights"] == whole["weights"] and whole["parts"] == 0
    assert parts["in flight"] < whole["in flight"]
    exchanged = 2 * 4 * 8 * 2 * 256 * 4 / min(H100.l2_bandwidth, tiles_of(one, SLICE, 8 / 256) * 4 * 100e9)
    assert parts["parts"] == pytest.approx(2e-6 + exchanged)


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (Schedule("swapped", 16, 64, 64, 4, 4, split=4), ""),
        (Schedule("swapped", 16, 64, 64, 4, 4, split=3), "2, 4, 8 parts"),
        (Schedule("swapped", 16, 64, 64, 4, 4, split=8), "K has 20 steps: a part is 4 or more"),
        (Schedule("rows", 64, 64, 64, 4, 4, split=2), "tiles of 32 of them or fewer"),
        (Schedule("rows", 64, 128, 64, 4, 4, split=2, persistent=True), "K in one"),
    ],
    ids=lambda v: v.text if isinstance(v, Schedule) else "",
)
def test_parts_that_are_refused(schedule: Schedule, reason: str) -> None:
    found = "; ".join(reasons_against(schedule, Problem(64, 256, 1280, "bf16", 2), H100))
    assert reason in found and bool(found) == bool(reason)
    wide = Problem(64, 14336, 1280, "bf16", 2)
    assert "one row's tiles" in "; ".join(reasons_against(replace(schedule, split=4), wide, H100))


def test_persistent_programs_start_once_and_share_tiles_out() -> None:
    """Two hundred waves: one prologue, the stores of all; what idles in the last wave counts in full."""
    one, many = Schedule("rows", 128, 128, 64, 8, 4), Schedule("rows", 128, 128, 64, 8, 4, persistent=True)
    alone, shared = terms(one, V3_UP, H100, 1024.0), terms(many, V3_UP, H100, 1024.0)
    waves = math.ceil(256 * 8.5 * 16 / 132)
    assert alone["prologue"] == pytest.approx(2e-6 * waves)
    assert shared["prologue"] == pytest.approx(2e-6 + 0.5e-6 * (waves - 1))
    assert shared["last wave"] == pytest.approx(2 * alone["last wave"])
    assert all(alone[t] == shared[t] for t in alone.keys() - {"prologue", "last wave"})


def test_what_does_not_persist_says_why() -> None:
    def reasons(s: Schedule, problem: Problem = V3_UP, target: str = "sm_90a") -> str:
        return "; ".join(reasons_against(replace(s, persistent=True), problem, GPUS[target]))

    big = Schedule("rows", 128, 128, 64, 8, 4)
    assert "wait for each other" in reasons(big)
    assert not reasons(big, V3_DOWN) and not reasons(big, target="sm_100a")
    assert "in the form rows" in reasons(Schedule("swapped", 16, 128, 64, 4, 4))
    assert "in the form rows" in reasons(Schedule("rows", 64, 64, 64, 4, 4))
    assert "in the form rows" in reasons(replace(big, split=2))
    assert "64 rows at once" in reasons(Schedule("rows", 64, 128, 64, 8, 3), target="sm_80")
    assert "64 divides K" in reasons(big, replace(V3_UP, depth=7200))
    assert "128 the columns" in reasons(big, replace(V3_UP, columns=2112))
    assert "share their scales" in reasons(big, replace(V3_UP, column_scales=True))
    # The result is laid out for its stores beside the ring, not in its place.
    deep = Schedule("rows", 128, 256, 64, 8, 4)
    assert not reasons_against(deep, V3_DOWN, H100) and "bytes of shared memory" in reasons(deep, V3_DOWN)


def read(rows: int, columns: int, high: int, at_once: int, tiles_of_l2: int) -> int:
    """Operand tiles that L2 lacks, last used first out, when ``at_once`` programs go through a band's tiles.

    A tile of rows counts one, so does one of columns; ``high`` row tiles a band.
    """
    order = [
        (m, n)
        for first in range(0, rows, high)
        for n in range(columns)
        for m in range(first, min(first + high, rows))
    ]
    held: dict[tuple[str, int], None] = {}
    missed = 0
    for start in range(0, len(order), at_once):
        for kind, places in (
            ("x", {m for m, _ in order[start : start + at_once]}),
            ("w", {n for _, n in order[start : start + at_once]}),
        ):
            for place in sorted(places):
                missed += (kind, place) not in held
                held.pop((kind, place), None)
                held[kind, place] = None
        while len(held) > tiles_of_l2:
            held.pop(next(iter(held)))
    return missed


@pytest.mark.parametrize("rows, columns", [(8, 16), (40, 16), (64, 56), (13, 100)])
def test_bands_read_about_as_little_as_any(rows: int, columns: int) -> None:
    """Against a cache that holds half of L2 in whole tiles, of K = 4096 in bf16, 1 MiB each: 25 of them."""
    problem = Problem(8, 128 * columns, 4096, "bf16", 2)
    chosen = band(Schedule("rows", 128, 128, 64, 8, 4, persistent=True), problem, H100)
    assert chosen == 25
    by_height = {h: read(rows, columns, h, at_once=16, tiles_of_l2=42) for h in range(1, 65)}
    assert by_height[chosen] <= 1.35 * min(by_height.values())
    assert by_height[1] > 1.5 * by_height[chosen] or rows < 2 * chosen


def test_bands_where_no_rows_stay_are_square() -> None:
    """K = 65536: a row tile takes 16 MiB. 132 programs: 16 by 8 tiles of 128 rows and 2 * 128 columns."""
    assert band(Schedule("rows", 128, 128, 64, 8, 4), replace(V3_UP, depth=65536), H100) == 16
    assert band(Schedule("rows", 128, 128, 64, 8, 4), V3_UP, H100) == 25 * 2**20 // (128 * 7168 * 2)


def test_how_many_tokens_are_few() -> None:
    """A step of tokens is 1024 elements of a row tile; four waits are taken for a launch of 3 µs and one."""
    tile, wide = Schedule("swapped", 16, 64, 64, 4, 4), Schedule("rows", 64, 256, 64, 8, 3)
    assert few_tokens([(math.inf, tile)], Sums(8, False), 256, H100) == 4 * 16
    assert few_tokens([(math.inf, tile)], Sums(20, False), 256, H100) == 2 * 16
    assert few_tokens([(math.inf, wide)], Sums(8, False), 256, H100) == 4 * 4
    # Below 1 row an expert: 31 tokens of 8 choices among 256, then tiles whose steps are fewer.
    assert few_tokens([(1.0, tile), (math.inf, wide)], Sums(8, False), 256, H100) == 31
