"""route and route_sort in CUDA C++ on the GPU: against their reference, in graphs, in any order of blocks.

In a self-test the functions run that stand in for the kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.codegen.kernels import KERNELS, cuda
from moec.codegen.kernels.cuda import CudaKernel as Record
from moec.ir.op import Op
from moec.runtime import counters
from moec.runtime.compile import compile_many
from moec.runtime.kernel_cache import default_folder
from tests.codegen.routers import KINDS, ROUTERS, check, inputs, router
from tests.codegen.triton_kernels import load
from tests.gpu.device import Device

Run = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(scope="module")
def kernels(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Op], Run]:
    """The kernel function of an op, compiled for this device and loaded."""

    @cache
    def built(name: str, key: str, target: str) -> ModuleType:
        op = _ops[key]
        record = next(k for k in KERNELS if isinstance(k, Record) and k.op == name)
        folder: Path = tmp_path_factory.mktemp(name)
        text = cuda.kernel_file(name, [record.render(op, name, target)], target)
        module = load(text, folder)
        source = record.render_source(op, name, target)
        (folder / "kernels" / f"{name}.cu").write_text(source, encoding="utf-8")
        if device.real:
            kernel = getattr(module, name.upper())
            for cubin in compile_many(kernel.requests(target), default_folder()).check():
                cubin.write(folder / "cubin")
            kernel.preload(torch.cuda.current_device())
            counters.prepare(torch.cuda.current_device())
        return module

    _ops: dict[str, Op] = {}

    def function(op: Op) -> Run:
        target = device.target if device.real else "sm_90a"
        key = repr((op.name, sorted(op.attrs.items(), key=str), [str(v.type) for v in op.operands if v]))
        _ops[key] = op
        run: Run = getattr(built(op.name, key, target), op.name)
        return run

    return function


def here(operands: list[Tensor], device: Device) -> list[Tensor]:
    return [o.to(device.type) for o in operands]


def bits(found: tuple[Tensor, ...]) -> Tensor:
    """All results in one tensor."""
    return torch.cat([f.contiguous().view(torch.uint8).flatten() for f in found])


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 16, 17, 300, 5000])
def test_every_router(tokens: int, name: str, device: Device, kernels: Callable[[Op], Run]) -> None:
    op, alone = router(name), router(name, "route")
    for kind in KINDS:
        operands = inputs(op, tokens, kind, seed=tokens)
        given = here(operands, device)
        found, choice = kernels(op)(*given), kernels(alone)(*given)
        check(op, tuple(f.cpu() for f in found), operands)
        assert torch.equal(bits(choice), bits(found[:2])), "route chooses as route_sort does, bit for bit"


def test_more_tokens_than_a_block_holds_choices_of(device: Device, kernels: Callable[[Op], Run]) -> None:
    op = router("deepseek-v3")
    operands = inputs(op, 100_000 if device.real else 3000, "normal", seed=0)
    check(op, tuple(f.cpu() for f in kernels(op)(*here(operands, device))), operands)


@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_equal_bits(tokens: int, device: Device, kernels: Callable[[Op], Run]) -> None:
    """However its blocks happen to run, also while another stream keeps the device busy."""
    op = router("deepseek-v3")
    given = here(inputs(op, tokens, "steps", seed=1), device)
    first = bits(kernels(op)(*given))
    busy = torch.randn(2048 if device.real else 8, 2048 if device.real else 8, device=device.type)
    side = torch.cuda.Stream() if device.real else None
    for _ in range(20):
        if side is not None:
            with torch.cuda.stream(side):
                busy @ busy
        assert torch.equal(bits(kernels(op)(*given)), first)


def test_launches_of_all_sizes_in_a_row(device: Device, kernels: Callable[[Op], Run]) -> None:
    """Each finds the counters as the one before was to leave them."""
    op = router("qwen3")
    for tokens in (300, 1, 17, 2000, 16, 129, 5000, 18):
        operands = inputs(op, tokens, "normal", seed=tokens)
        check(op, tuple(f.cpu() for f in kernels(op)(*here(operands, device))), operands)


@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_a_graph_is_replayed_with_other_inputs(
    tokens: int, device: Device, kernels: Callable[[Op], Run]
) -> None:
    op = router("deepseek-v3")
    held = here(inputs(op, tokens, "normal", seed=0), device)
    kernels(op)(*held)
    with device.without_synchronising():
        kernels(op)(*held)
    replay = device.record(lambda: bits(kernels(op)(*held)), warm=False)
    for seed in (1, 2, 3):
        other = here(inputs(op, tokens, "normal", seed=seed), device)
        for into, value in zip(held, other, strict=True):
            into.copy_(value)
        assert torch.equal(replay(), bits(kernels(op)(*other)))


def test_graphs_side_by_side(device: Device, kernels: Callable[[Op], Run]) -> None:
    """Two that one stream recorded, replayed on two streams at once: they share no counters."""
    op = router("deepseek-v3")
    given = [here(inputs(op, 200, "normal", seed=seed), device) for seed in (0, 1)]
    wanted = [bits(kernels(op)(*operands)) for operands in given]
    replays: list[Any] = [
        device.record(lambda operands=operands: bits(kernels(op)(*operands))) for operands in given
    ]
    if not device.real:
        assert all(torch.equal(replay(), want) for replay, want in zip(replays, wanted, strict=True))
        return
    streams = [torch.cuda.Stream() for _ in replays]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for stream, replay in zip(streams, replays, strict=True):
            with torch.cuda.stream(stream):
                found.append(replay())
    torch.cuda.synchronize()
    assert all(torch.equal(have, want) for have, want in zip(found, wanted, strict=True))
