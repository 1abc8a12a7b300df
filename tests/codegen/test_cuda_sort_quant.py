"""route_sort_and_quant in CUDA C++: the bits of the two ops that it is, whatever the order of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.codegen.kernels import select, serving
from moec.codegen.kernels.cuda import CudaKernel as Record
from moec.ir.devices import GPUS
from moec.ir.op import Op
from moec.ir.scaled import quantize
from moec.ir.types import DTYPES
from moec.runtime.compile import compile_many
from tests.codegen.cuda_kernels import (
    Launches,
    ends_well,
    files,
    forget,
    module,
    needs_gxx,
    run,
)
from tests.codegen.routers import inputs, router
from tests.codegen.rows import KINDS, equal_bits, rows
from tests.codegen.triton_kernels import and_quant, route_op

TARGETS = [name for name, device in GPUS.items() if device.fp8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("cuda")
    forget()


def operands(sort: Op, dtype: str, depth: int, tokens: int, kind: str, seed: int) -> list[Tensor]:
    return [
        *inputs(sort, tokens, "steps", seed),
        rows(DTYPES[dtype].torch, tokens, depth, kind, seed),
    ]


def judge(
    name: str, given: list[Tensor], folder: Path, launches: Launches, scale: str = "fp32", **constants: Any
) -> None:
    """Fails unless the bits are those of ``route_sort``'s own kernel and of ``quant``'s reference."""
    sort, x = router(name), given[-1]
    op = and_quant(sort, str(x.dtype).removeprefix("torch."), x.shape[1], scale)
    *chosen, q = run(op, folder, given, launches, **constants)
    alone = run(sort, folder, given[:-1], Launches(launches.seed, launches.multiprocessors))
    for have, want in zip(chosen, alone, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)
    equal_bits(q, quantize(x, (1, 128), scale))


@needs_gxx
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("name", ["mixtral", "groups of 11"])
@given(
    depth=st.sampled_from([8, 128, 136, 384, 1000]),
    tokens=st.sampled_from([0, 1, 5, 16, 17, 40]),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from(["fp32", "ue8m0"]),
    multiprocessors=st.sampled_from([1, 3, 9]),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=12)
def test_the_bits_of_the_two(
    name: str, depth: int, dtype: str, tokens: int, kind: str, scale: str, multiprocessors: int, seed: int,
    folder: Path,
) -> None:  # fmt: skip
    given = operands(router(name), dtype, depth, tokens, kind, seed)
    judge(name, given, folder, Launches(seed, multiprocessors), scale)


@needs_gxx
def test_deepseek_v3s_rows(folder: Path) -> None:
    for tokens in (1, 16):
        launches = Launches(tokens)
        judge(
            "deepseek-v3", operands(router("deepseek-v3"), "bf16", 7168, tokens, "odd", 0), folder, launches
        )
        assert launches.made[0] == ("alone", 1 + -(-tokens * 56 // 32))


@needs_gxx
def test_rows_that_lie_apart(folder: Path) -> None:
    logits, x = operands(router("qwen2-moe"), "bf16", 256, 9, "normal", 0)
    judge("qwen2-moe", [logits, x.T.contiguous().T], folder, Launches())


@needs_gxx
def test_one_launch_unless_there_is_much_to_quantise(folder: Path) -> None:
    """Of 640 columns a block quantises 32 pieces of 128 at once: 6.4 rows."""
    op = and_quant(router("mixtral"), "bf16", 640)
    for tokens, multiprocessors, made in [
        (0, 9, [("alone", 1)]),
        (1, 9, [("alone", 2)]),
        (16, 9, [("alone", 4)]),
        (17, 9, [("together", 3 + 3)]),
        (50, 9, [("together", 7 + 2)]),  # which quantise four times each
        (52, 9, [("together", 7), ("rows", 9)]),
        (90, 5, [("together", 5), ("rows", 15)]),
    ]:
        launches = Launches(multiprocessors=multiprocessors)
        run(op, folder, operands(router("mixtral"), "bf16", 640, tokens, "normal", 0), launches)
        assert launches.made == made


BREAKS = {
    "infinity counts": ("if (fabsf(v[i]) < INF) amax", "if (v[i] == v[i]) amax"),
    "half of the lanes": ("int step = LANES / 2; step;", "int step = LANES / 4; step;"),
    "no least scale": ("fmaxf(amax, 1e-4f)", "amax"),
    "a quotient of two roundings": ("q = fmaf(fmaf(-q, scale, x), inverse, q)", "q = q"),
    "0 without its sign": ("copysignf(q, x)", "q"),
    "the other order": ("e4m3x2(v[4 * i], v[4 * i + 1])", "e4m3x2(v[4 * i + 1], v[4 * i])"),
    "the row's end": (" && column < DEPTH", ""),
    "the last row": ("piece < pieces && ", ""),
    "scales of every second piece": ("y_scale[piece] = scale", "y_scale[piece & ~1ll] = scale"),
    "blocks that quantise are waited for": ("meet(here, blocks);", "meet(here, gridDim.x);"),
    "the first quantises nothing": ("blockIdx.x - blocks, gridDim.x - blocks", "blockIdx.x, gridDim.x"),
}


@needs_gxx
@pytest.mark.parametrize("name", BREAKS)
def test_a_planted_bug_is_found(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = BREAKS[name]
    render = Record.render_source

    def broken(self: Record, *args: Any) -> str:
        text = render(self, *args)
        if not self.op.endswith("_and_quant"):
            return text
        assert before in text
        return text.replace(before, after)

    def use() -> None:
        for tokens in (3, 40):
            for kind in KINDS:
                judge(
                    "qwen2-moe",
                    operands(router("qwen2-moe"), "bf16", 136, tokens, kind, 0),
                    folder,
                    Launches(0, 9),
                )

    assert ends_well(use)
    monkeypatch.setattr(Record, "render_source", broken)
    assert not ends_well(use)


def test_the_cpu_runs_the_functions_that_stand_in(folder: Path) -> None:
    for scale in ("fp32", "ue8m0"):
        sort = router("deepseek-v3")
        op, given = and_quant(sort, "bf16", 200, scale), operands(sort, "bf16", 200, 7, "odd", 0)
        *chosen, q = getattr(module(op, folder), op.name)(*given)
        for have, want in zip(chosen, module(sort, folder).route_sort(*given[:-1]), strict=True):
            assert torch.equal(have, want)
        equal_bits(q, quantize(given[-1], (1, 128), scale))


def test_generated_files_read_as_before(golden: Callable[[str, str], None]) -> None:
    python, source = files(and_quant(router("deepseek-v3"), "bf16", 7168))
    golden("cuda_route_sort_and_quant.deepseek-v3.cu.txt", source)
    golden("cuda_route_sort_and_quant.deepseek-v3.py.txt", python)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("name", ["deepseek-v3", "all experts", "qwen3"])
def test_sources_are_tidy(name: str, dtype: str) -> None:
    for scale in ("fp32", "ue8m0"):
        for text in files(and_quant(router(name), dtype, 7168, scale)):
            assert text.endswith("\n") and not text.endswith("\n\n") and "\n\n\n\n" not in text
            for line in text.splitlines():
                assert len(line) <= 110 and line == line.rstrip(), line
            assert "#include" not in text


@pytest.mark.parametrize("target", TARGETS)
def test_what_nvrtc_makes_of_it(target: str, folder: Path) -> None:
    """Nothing spills; where nobody chooses, three blocks or more share a multiprocessor."""
    names = ["deepseek-v3", "mixtral", "qwen3-next"] if target == "sm_90a" else ["deepseek-v3"]
    requests = []
    for name in names:
        for dtype, scale in [("bf16", "fp32"), ("f32", "ue8m0")]:
            op = and_quant(router(name), dtype, 7168, scale)
            requests += getattr(module(op, folder, target), op.name.upper()).requests(target)
    cubins = compile_many(requests, cache=folder / "cache").check()
    for request, cubin in zip(requests, cubins, strict=True):
        found = cubin.facts
        assert found.spills == 0 and found.stack_bytes == 0, f"{request}: {found}"
        assert found.shared_static <= 48 * 1024 and found.shared_dynamic == 0, request
        assert found.registers * 32 * cubin.metadata["warps"] <= 65536
        if cubin.metadata["variant"] == "rows":
            assert found.registers * 32 * cubin.metadata["warps"] * 3 <= 65536 and not found.shared_static
            assert found.loads == {"LDG.128": 1} and not found.barriers
        assert cubin.metadata["cooperative"] == (cubin.metadata["variant"] == "together"), request


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (lambda: and_quant(router("mixtral"), "bf16", 104), None),
        (lambda: and_quant(router("mixtral"), "bf16", 100), "K is 100, no multiple of 8"),
        (lambda: and_quant(router("mixtral"), "f32", 100), None),
        (lambda: and_quant(router("mixtral"), "f32", 102), "K is 102, no multiple of 4"),
        (lambda: and_quant(router("mixtral"), "bf16", 0), "K is 0"),
        (lambda: and_quant(router("mixtral"), "f64", 128), "f64 is none of"),
        (lambda: and_quant(router("mixtral"), "bf16", 128, block=(1, 64)), "quant is 1x64"),
        (lambda: and_quant(route_op("route_sort", 1025, 2, score="softmax"), "bf16", 128), "1025 experts"),
    ],
)
def test_what_is_not_supported_says_why(op: Callable[[], Op], reason: str | None) -> None:
    record = next(k for k in serving("route_sort_and_quant", "sm_90a") if isinstance(k, Record))
    found = record.supports(op())
    assert (not found) if reason is None else any(reason in r for r in found)


def test_no_kernel_where_nothing_multiplies_fp8() -> None:
    """There PyTorch's two functions serve."""
    op = and_quant(router("mixtral"), "bf16", 128)
    assert select(op, "sm_90a").family == "cuda"
    assert select(op, "sm_80").family == select(op, "cpu").family == "torch"
