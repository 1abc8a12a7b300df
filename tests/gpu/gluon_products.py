"""What test_gluon.py runs in a process of its own: ``python gluon_products.py cuda up``.

A kernel of Gluon's, or a ladder with rungs of Triton's too (``mixed``), against Triton's of the same op, and
both against double precision. A barrier's phase that is wrong hangs, and what hangs holds the GPU until its
process ends. On the CPU (``cpu``, with TRITON_INTERPRET=1) the twins run in the interpreter, on smaller
shapes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.codegen.kernels.triton_grouped import problem
from moec.codegen.schedules import Schedule, space
from moec.codegen.specialised import specialised
from moec.ir.devices import GPUS
from moec.ir.op import Op
from moec.ir.ops.moe import SortByExpert
from moec.ir.scaled import Scaled, quantize
from moec.runtime.compile import compile_many
from moec.runtime.launch import Kernel
from tests.codegen import triton_kernels
from tests.codegen.triton_kernels import fp8_op, gluon_source, grouped_combine_op, grouped_op, source

TARGET = "sm_90a"
EXPERTS, TOP = 6, 2
# Columns and depth: several column tiles, and more steps along K than the ring has stages.
SIZES = {"cuda": (512, 1152), "cpu": (256, 256)}
TOKENS = {"cuda": (1, 63, 64, 65, 129, 1000, 6000), "cpu": (1, 65)}
MIXED_TOKENS = (4, 7)  # of the rungs between
ROUTINGS = ("random", "one", "skew", "skip", "none")
# Of the result's norm: bf16 keeps 8 bits; e4m3 keeps 4, and what is quantised is a product of quantised ones.
TOLERANCE = {"up": 4e-3, "down": 4e-3, "up-fp8": 4e-2, "down-fp8": 4e-3, "mixed": 4e-3}
TOLERANCE |= {"sum": 4e-3, "sum-fp8": 4e-3, "mixed-sum": 4e-3}


def op_of(case: str, columns: int, depth: int) -> Op:
    if case == "up":
        return grouped_op("bf16", EXPERTS, columns, depth, gather=True, per_row=TOP, act="silu")
    if "sum" in case:
        how = {"scales": ("1x128", "128x128")} if case == "sum-fp8" else {}
        dtype = "f8e4m3" if how else "bf16"
        return grouped_combine_op(dtype, EXPERTS, columns, depth, TOP, plus="bf16", **how)
    if case in ("down", "mixed"):
        return grouped_op("bf16", EXPERTS, columns, depth, scatter=True)
    if case == "up-fp8":
        return fp8_op(EXPERTS, columns, depth, gather=True, per_row=TOP, act="silu", quant="fp32")
    return fp8_op(EXPERTS, columns, depth, scatter=True)


def built(op: Op, text: str, folder: Path, device: str) -> Callable[..., Any]:
    """The function of a kernel file, its kernels compiled where there is a GPU."""
    folder.mkdir()
    module = triton_kernels.load(text, folder)
    if device == "cuda":
        kernels = [v for v in vars(module).values() if isinstance(v, Kernel)]
        for cubin in compile_many([r for k in kernels for r in k.requests(TARGET)], cache=None).check():
            cubin.write(folder / "cubin")
    function: Callable[..., Any] = getattr(module, op.name)
    return function


def routed(kind: str, tokens: int) -> Tensor:
    low, high = {
        "random": (0, EXPERTS),
        "one": (EXPERTS - 1, EXPERTS),
        "skew": (0, 2),
        "skip": (-2, EXPERTS + 2),
        "none": (EXPERTS, EXPERTS + 1),
    }[kind]
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(low, high, (tokens, TOP), generator=generator, dtype=torch.int32)


def exact(op: Op, x: Tensor, w: Tensor, slot: Tensor, off: Tensor) -> Tensor:
    """The product in double precision, its rows where the op puts them."""
    p, bounds = problem(op), off.tolist()
    rows = x[slot.long() // TOP] if p.gathered else x
    y = torch.zeros(len(rows), p.columns, dtype=torch.float64, device=x.device)
    for e in range(EXPERTS):
        mine = slice(bounds[e], bounds[e + 1])
        y[mine] = product(rows[mine].double(), w[e].double(), p.matrices == 2)
    if p.gathered:
        return y
    return torch.empty_like(y).index_copy_(0, slot.long(), y)


def product(x: Tensor, w: Tensor, swiglu: bool) -> Tensor:
    if not swiglu:
        return x @ w.T
    gate, up = (x @ w.T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def operands(case: str, op: Op, tokens: int, device: str) -> Iterator[tuple[str, list[Any], Tensor]]:
    """What to give the kernels for each routing, and what they should make of it."""
    p = problem(op)
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(EXPERTS, p.matrices * p.columns, p.depth, generator=generator) / p.depth**0.5
    for kind in ROUTINGS:
        ids = routed(kind, tokens)
        slot, off = (t.to(device) for t in SortByExpert.reference(ids, experts=EXPERTS))
        x = torch.randn(tokens if p.gathered else tokens * TOP, p.depth, generator=generator)
        if p.fp8:
            qx, qw = (onto(quantize(t, b), device) for t, b in ((x, (1, 128)), (w, (128, 128))))
            given, meant = [*qx[:2], *qw[:2]], (qx.float(), qw.float())
        else:
            given = [x.to(device, torch.bfloat16), w.to(device, torch.bfloat16)]
            meant = (given[0], given[1])
        given += [slot, off] if p.gathered else [off, slot]
        wanted = exact(op, *meant, slot, off)
        if "sum" in case:
            weights = torch.rand(tokens, TOP, generator=generator).to(device)
            plus = torch.randn(tokens, p.columns, generator=generator).to(device, torch.bfloat16)
            given += [weights, plus]
            rows = wanted.view(tokens, TOP, p.columns)
            wanted = (weights.double()[:, :, None] * rows).sum(1) + plus.double()
        yield kind, given, wanted


def onto(v: Scaled, device: str) -> Scaled:
    return Scaled(v.q.to(device), v.scale.to(device), v.block)


def values(found: Any) -> Tensor:
    if isinstance(found, tuple):
        return Scaled(found[0], found[1], (1, 128)).float().double()
    return found.double()


def check(case: str, device: str) -> None:
    op = op_of(case, *SIZES[device])
    every = specialised(problem(op), GPUS[TARGET])
    schedules = every[:1]
    if "mixed" in case:  # by rows an expert: below 1, 2 and 3 of them, and all others
        few, some = Schedule("swapped", 16, 64, 64, 4, 3), Schedule("rows", 64, 128, 64, 4, 4)
        schedules = [few, every[-1], some, every[0]]
    rows = [s for s in space(problem(op), GPUS[TARGET]) if s.form == "rows" and s.split == 1]
    most = sorted(rows, key=lambda s: s.persistent)[-1:]  # persistent where they may be
    with tempfile.TemporaryDirectory() as folder:
        gluon = built(op, gluon_source(op, schedules), Path(folder) / "gluon", device)
        triton = built(op, source(op, TARGET, most), Path(folder) / "triton", device)
        for tokens in TOKENS[device] + MIXED_TOKENS * ("mixed" in case):
            for kind, given, wanted in operands(case, op, tokens, device):
                found, twice, peer = gluon(*given), gluon(*given), triton(*given)
                norm = wanted.norm()
                for name, made in (("gluon", found), ("triton", peer)):
                    error = (values(made) - wanted).norm() / norm if norm else values(made).norm()
                    assert error <= TOLERANCE[case], (case, tokens, kind, name, float(error))
                same = torch.equal(values(found), values(twice))
                assert same, (case, tokens, kind, "the same call gives other bits")
            print(f"{case}: {tokens} tokens", flush=True)  # of a test that hangs this is what is left


if __name__ == "__main__":
    if sys.argv[1] == "cpu":
        from tests.codegen import interpreter_casts

        interpreter_casts.install()
    check(sys.argv[2], sys.argv[1])
    print("checked")
