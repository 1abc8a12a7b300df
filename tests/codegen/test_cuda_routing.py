"""route_sort in CUDA C++: right on emulated threads in any order, and what NVRTC makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.kernels.cuda import CudaKernel as Record
from moec.ir.devices import GPUS
from moec.ir.op import Op
from moec.ir.ops.route import RouteSort
from moec.runtime.compile import compile_many
from tests.codegen.cuda_kernels import RECORDS, Launches, ends_well, files, forget, module, needs_gxx, run
from tests.codegen.routers import KINDS, ROUTERS, admissible, check, inputs, router
from tests.codegen.triton_kernels import route_op


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("cuda")
    forget()


@needs_gxx
@pytest.mark.parametrize("name", ROUTERS)
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 16, 17, 40]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1 << 16),
    multiprocessors=st.sampled_from([1, 2, 5]),
)
@settings(max_examples=8)
def test_every_router(
    name: str, tokens: int, kind: str, seed: int, multiprocessors: int, folder: Path
) -> None:
    """As the reference has it, in one launch, whatever the order of threads and blocks."""
    op = router(name)
    operands = inputs(op, tokens, kind, seed)
    launches = Launches(seed, multiprocessors)
    check(op, run(op, folder, operands, launches), operands)
    assert len(launches.made) == 1


@needs_gxx
@pytest.mark.parametrize("name", ["deepseek-v3", "qwen2-moe"])
@given(tokens=st.integers(0, 700), seed=st.integers(0, 1 << 16), multiprocessors=st.integers(1, 4))
@settings(max_examples=10)
def test_many_tokens_a_block(name: str, tokens: int, seed: int, multiprocessors: int, folder: Path) -> None:
    """More rounds than one, with two warps a block; counts of blocks that have none."""
    op = router(name)
    operands = inputs(op, tokens, "steps", seed)
    check(op, run(op, folder, operands, Launches(seed, multiprocessors), warps=2, tokens_a_block=1), operands)


@needs_gxx
@pytest.mark.parametrize("name", ROUTERS)
@given(tokens=st.sampled_from([0, 1, 8, 19]), kind=st.sampled_from(KINDS), seed=st.integers(0, 1 << 16))
@settings(max_examples=4)
def test_the_choice_alone(name: str, tokens: int, kind: str, seed: int, folder: Path) -> None:
    """The bits that choice and sort in one give."""
    op, both = router(name, "route"), router(name)
    operands = inputs(op, tokens, kind, seed)
    found = run(op, folder, operands, Launches(seed))
    check(op, found, operands)
    for have, want in zip(found, run(both, folder, operands, Launches(seed)), strict=False):
        torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)


@needs_gxx
def test_the_order_of_threads_changes_no_bit(folder: Path) -> None:
    op = router("deepseek-v3")
    operands = inputs(op, 50, "steps", 3)
    first = run(op, folder, operands, Launches(1, 4))
    for seed in range(2, 6):
        for have, want in zip(run(op, folder, operands, Launches(seed, 4)), first, strict=True):
            assert torch.equal(have, want)


@needs_gxx
def test_a_transposed_input(folder: Path) -> None:
    op = router("qwen2-moe")
    (logits,) = inputs(op, 9, "normal", 0)
    found = run(op, folder, [logits.T.contiguous().T], Launches())
    check(op, found, [logits])


@needs_gxx
def test_few_tokens_take_one_block_and_many_as_many_as_there_is_room_for(folder: Path) -> None:
    op = router("mixtral")
    for tokens, launch in [
        (1, ("alone", 1)),
        (16, ("alone", 1)),
        (17, ("together", 3)),
        (90, ("together", 5)),
    ]:
        launches = Launches(multiprocessors=5)
        run(op, folder, inputs(op, tokens, "normal", 0), launches)
        assert launches.made == [launch]


# What each of these breaks, a test above must see.
BREAKS = {
    "equal scores to the higher id": ("if (key[i] > best) best", "if (key[i] >= best) best"),
    "NaN below all": ("return x != x ? ALL", "return x != x ? 1u"),
    "a group's second best is its best": ("lane == winner ? second : best", "best"),
    "a rank that counts the token itself": ("(1u << t % 32) - 1", "(2u << t % 32) - 1"),
    "blocks that don't meet": ("    meet(here);\n", "    __syncthreads();\n"),
    "no barrier before counting": (
        "        __syncthreads();\n#pragma unroll 1\n        for (int e = thread; e < E; e += THREADS)\n"
        "            for (int c = 0; c < WORDS; c++) {\n",
        "#pragma unroll 1\n        for (int e = thread; e < E; e += THREADS)\n"
        "            for (int c = 0; c < WORDS; c++) {\n",
    ),
    "counters that stay": ("here[0] = here[1] = 0", "here[0] = 0"),
    "shared experts weigh nothing": (": 1.0f;\n}", ": 0.0f;\n}"),
    "choices of rounds before": ("if (end - begin > ROUND)", "if (false)"),
    "places of rounds before": ("start[e] += __popc(chose[c][e])", "start[e] += 0"),
}


@needs_gxx
@pytest.mark.parametrize("name", BREAKS)
def test_a_planted_bug_is_found(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which a wild store may end."""
    before, after = BREAKS[name]
    render = Record.render_source

    def broken(self: Record, *args: Any) -> str:
        text = render(self, *args)
        assert before in text
        return text.replace(before, after)

    assert ends_well(lambda: use_v3(folder))
    monkeypatch.setattr(Record, "render_source", broken)
    assert not ends_well(lambda: use_v3(folder))


def use_v3(folder: Path) -> None:
    """What a planted bug must not survive."""
    op = router("deepseek-v3")
    for seed, (tokens, kind, warps) in enumerate([(40, k, 16) for k in KINDS] + [(700, "steps", 2)]):
        counters = torch.zeros(2, dtype=torch.int32)
        made = module(op, folder, warps=warps)
        made.zeroed = lambda *_, c=counters: c  # type: ignore[attr-defined]
        operands = inputs(op, tokens, kind, seed)
        with Launches(seed, 3):
            check(op, getattr(made, op.name)(*operands), operands)
        assert counters.tolist() == [0, 0]


def test_the_judge_lets_only_rounding_pass() -> None:
    op = router("qwen2-moe")
    (logits,) = inputs(op, 1, "normal", 1)
    w, id, slot, off = RouteSort.reference(logits, **op.attrs)
    assert admissible(op, id[0], [logits])
    assert not admissible(op, id[0].flip(0), [logits])
    other = id.clone()
    other[0, -1] = logits.argmin()
    assert not admissible(op, other[0], [logits])
    with pytest.raises(AssertionError):
        check(op, (w, other, slot, off), [logits])
    with pytest.raises(AssertionError):
        check(op, (w, id, slot.flip(0), off), [logits])


def test_the_cpu_runs_the_function_that_stands_in(folder: Path) -> None:
    """That is what a package runs with device="interpret"; nothing is launched."""
    for name in ROUTERS:
        for op in (router(name), router(name, "route")):
            operands = inputs(op, 7, "steps", 0)
            check(op, getattr(module(op, folder), op.name)(*operands), operands)


@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral"])
def test_generated_files_read_as_before(name: str, golden: Callable[[str, str], None]) -> None:
    python, source = files(router(name))
    golden(f"cuda_route_sort.{name}.cu.txt", source)
    if name == "deepseek-v3":
        golden(f"cuda_route_sort.{name}.py.txt", python)
        python, source = files(router(name, "route"))
        golden(f"cuda_route.{name}.cu.txt", source)
        golden(f"cuda_route.{name}.py.txt", python)


@pytest.mark.parametrize("name", ROUTERS)
def test_sources_are_tidy(name: str) -> None:
    for text in (*files(router(name)), *files(router(name, "route"))):
        assert text.endswith("\n") and not text.endswith("\n\n") and "\n\n\n\n" not in text
        for line in text.splitlines():
            assert len(line) <= 110 and line == line.rstrip(), line
    assert "#include" not in text


def facts(names: list[str], targets: list[str], folder: Path) -> None:
    """Nothing spills, and no array lies in local memory; a block's shared memory needs no asking for."""
    requests = []
    for name in names:
        for op in (router(name), router(name, "route")):
            for target in targets:
                made = getattr(module(op, folder, target), op.name.upper())
                requests += made.requests(target)
    cubins = compile_many(requests, cache=folder / "cache").check()
    for request, cubin in zip(requests, cubins, strict=True):
        found = cubin.facts
        assert found.spills == 0 and found.stack_bytes == 0, f"{request}: {found}"
        assert found.shared_static <= 48 * 1024 and found.shared_dynamic == 0, request
        assert found.registers * 32 * cubin.metadata["warps"] <= 65536
        together = cubin.metadata["variant"] == "together"
        assert cubin.metadata["cooperative"] == together == bool(found.atomics), request


@pytest.mark.parametrize("target", GPUS)
def test_what_nvrtc_makes_of_it(target: str, folder: Path) -> None:
    facts(["deepseek-v3"], [target], folder)


def test_what_nvrtc_makes_of_others(folder: Path) -> None:
    facts([name for name in ROUTERS if name != "deepseek-v3"], ["sm_90a"], folder)


@pytest.mark.slow
def test_what_nvrtc_makes_of_all(folder: Path) -> None:
    facts(list(ROUTERS), list(GPUS), folder)


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (lambda: route_op("route_sort", 1024, 32, score="softmax"), None),
        (lambda: route_op("route_sort", 1025, 2, score="softmax"), "1025 experts, more than 1024"),
        (
            lambda: route_op("route_sort", 64, 32, score="softmax", shared=1),
            "33 experts a token, more than 32",
        ),
        (
            lambda: route_op("route_sort", 99, 2, score="softmax", groups=33, topk_groups=2),
            "33 groups, more than 32",
        ),
        (lambda: route_op("route_sort", 8, 2, "f64", score="softmax"), "f64 is none of"),
        (lambda: route_op("route_sort", 8, 2, score="softmax", to="f64"), "weights are f64"),
    ],
)
def test_what_is_not_supported_says_why(op: Callable[[], Op], reason: str | None) -> None:
    found = RECORDS["route_sort"].supports(op())
    assert (not found) if reason is None else any(reason in r for r in found)
