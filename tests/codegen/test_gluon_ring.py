"""The ring of Gluon's kernels: a model of its barriers, its partitions taken from the generated source."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from moec.codegen.kernels.triton_grouped import problem
from moec.codegen.specialised import specialised
from tests.codegen.test_gluon_kernels import H100, OTHERS, SUMMED, V3
from tests.codegen.triton_kernels import gluon_source


@dataclass
class Barrier:
    """PTX's mbarrier: a phase completes when all arrivals have come and all bytes that they expect."""

    count: int
    phase: int = 0
    pending: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, expected: int = 0) -> None:
        assert self.pending > 0, "more arrivals than the barrier counts"
        self.pending, self.bytes = self.pending - 1, self.bytes + expected
        self._complete()

    def copied(self, size: int) -> None:
        self.bytes -= size
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passed(self, parity: int) -> bool:
        """What try_wait.parity asks: whether the phase of that parity, this one or the last, is over."""
        return self.phase % 2 != parity


@dataclass
class Ring:
    """The operands' stages: what is in each, who still reads it, and copies on their way."""

    stages: int
    full: list[Barrier]
    empty: list[Barrier]
    held: dict[int, Any] = field(default_factory=dict)
    reading: dict[int, set[int]] = field(default_factory=dict)
    flying: list[Callable[[], None]] = field(default_factory=list)


def expression(text: str, pattern: str) -> str:
    """The one text that ``pattern`` finds in the source: the model computes with what the kernel says."""
    found = set(re.findall(pattern, text))
    assert len(found) == 1, (pattern, found)
    return found.pop()


def partitions(text: str, ring: Ring, tiles: list[int], threads: int) -> list[Iterator[None]]:
    """The loading partition and both warpgroups, each a generator that yields where others may run.

    ``tiles``: steps along K of each tile. Waits and arrivals are those of ``text``.
    """
    stages = {"STAGES": ring.stages}
    stage_of = compile(expression(text, r"stage = (.*)\n"), "stage", "eval")
    load_wait = compile(expression(text, r"wait\(empty\.index\(stage\), (.*)\)\n"), "load", "eval")
    full_wait = compile(expression(text, r"wait\(full\.index\(stage\), (.*)\)\n"), "multiply", "eval")
    given_back = re.findall(r"mbarrier\.arrive\(empty\.index\((.*?)\)(?:, pred=(.*))?\)\n", text)
    arrivals = [
        (compile(stage, "arrive", "eval"), compile(pred or "True", "pred", "eval"))
        for stage, pred in given_back
    ]
    assert len(arrivals) in (1, 2)

    def loads() -> Generator[None]:
        step = 0
        for tile, steps in enumerate(tiles):
            for k in range(steps):
                stage = eval(stage_of, stages, {"step": step})
                while not ring.empty[stage].passed(eval(load_wait, stages, {"step": step})):
                    yield
                assert not ring.reading.get(stage), f"stage {stage} is overwritten while it is read"
                ring.held[stage] = None
                full, content = ring.full[stage], (tile, k)

                def arrived(stage: int = stage, content: Any = content, full: Barrier = full) -> None:
                    ring.held[stage] = content
                    full.copied(1)

                full.arrive(expected=1)
                ring.flying.append(arrived)
                ring.flying += [full.arrive] * threads
                step += 1
                yield

    def multiplies(half: int) -> Generator[None]:
        step = 0
        pending: list[int] = []  # stages whose products are under way
        for tile, steps in enumerate(tiles):
            for k in range(steps):
                stage = eval(stage_of, stages, {"step": step})
                while not ring.full[stage].passed(eval(full_wait, stages, {"step": step})):
                    yield
                assert ring.held.get(stage) == (tile, k), f"{(tile, k)} is not in stage {stage}"
                ring.reading.setdefault(stage, set()).add(half)
                pending.append(stage)
                yield
                arrive(0, {"step": step, "stage": stage, "k0": k}, pending, half)
                step += 1
                yield
            if len(arrivals) == 2:  # the last step's stage; the others are given back one step later
                arrive(1, {"step": step, "depth": steps}, pending, half)
        assert not pending

    def arrive(which: int, at: dict[str, int], pending: list[int], half: int) -> None:
        stage, when = arrivals[which]
        if eval(when, stages, at):
            given = eval(stage, stages, at)
            assert given == pending.pop(0), "another stage is given back than the one whose products are done"
            ring.reading[given].discard(half)
            ring.empty[given].arrive()

    return [loads(), multiplies(0), multiplies(1)]


def run(text: str, stages: int, tiles: list[int], seed: int) -> None:
    """All partitions to their ends, interleaved at random, copies arriving in any order."""
    threads = int(expression(text, r"full\.index\(stage\), count=1(?: \+ (\d+))?\)") or 0)
    readers = int(expression(text, r"empty\.index\(stage\), count=(\d+)\)"))
    full, empty = ([Barrier(count) for _ in range(stages)] for count in (1 + threads, readers))
    ring = Ring(stages, full, empty)
    chance = random.Random(seed)
    alive = partitions(text, ring, tiles, threads)
    idle = 0
    while alive:
        before = (repr(ring.full), repr(ring.empty), len(ring.flying))
        if ring.flying and chance.random() < 0.5:
            ring.flying.pop(chance.randrange(len(ring.flying)))()
        which = chance.choice(alive)
        if next(which, alive) is alive:
            alive.remove(which)
        idle = idle + 1 if before == (repr(ring.full), repr(ring.empty), len(ring.flying)) else 0
        assert idle < 300, "everybody waits: the kernel would hang"
    assert not ring.flying


@pytest.mark.parametrize("name", V3 | SUMMED | OTHERS)
def test_a_stage_waits_for_what_is_copied(name: str) -> None:
    """The bytes that ``full`` expects are those of the descriptors' copies, its count that of who copies."""
    op = (V3 | SUMMED | OTHERS)[name]()
    p = problem(op)
    text, s = gluon_source(op), specialised(p, H100)[0]
    sizes = {"BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k}
    copied = (
        s.block_k
        * p.itemsize
        * sum(
            {"w": s.block_n, "x": s.block_m}[operand]
            for operand in re.findall(r"hopper\.tma\.async_copy_global_to_shared\((\w), \[", text)
        )
    )
    assert eval(expression(text, r"mbarrier\.expect\(ready, (.*)\)\n"), sizes) == copied
    warps = int(expression(text, r"\[4, (\d+)\],\n"))
    copying = "async_copy.mbarrier_arrive(ready, increment_count=False)" in text
    assert copying == (p.gathered or p.fp8)
    assert expression(text, r"full\.index\(stage\), count=(.*)\)\n") == ("1" + f" + {32 * warps}" * copying)
    assert warps == (4 if p.gathered else 1)


@pytest.mark.parametrize("name", V3 | SUMMED)
@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_the_ring_neither_hangs_nor_overwrites(name: str, stages: int) -> None:
    text = gluon_source((V3 | SUMMED)[name]())
    for seed, tiles in enumerate([[1], [5], [2, 0, 3], [7, 7, 7], [1] * 12, []]):
        run(text, stages, tiles, seed)


@pytest.mark.parametrize(
    "wrong",
    [
        ("step // STAGES & 1 ^ 1", "step // STAGES & 1"),  # the loads wait for what nobody gives back yet
        ("full.index(stage), step // STAGES & 1)", "full.index(stage), step // STAGES & 1 ^ 1)"),
        ("empty.index(stage), count=2", "empty.index(stage), count=1"),
        ("empty.index((step + STAGES - 1) % STAGES)", "empty.index(step % STAGES)"),
        ("pred=k0 > 0", "pred=k0 >= 0"),
        (", pred=depth > 0)", ", pred=False)"),
    ],
)
def test_a_wrong_ring_is_found(wrong: tuple[str, str]) -> None:
    text = gluon_source(V3["up"]())
    assert wrong[0] in text
    with pytest.raises(AssertionError):
        for seed in range(40):
            run(text.replace(*wrong), 3, [5, 4], seed)
