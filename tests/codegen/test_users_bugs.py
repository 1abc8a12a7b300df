"""What users of other MoE kernels ran into: each must not happen here. The reports stand with the tests.

Beside what users_bugs_interpreted.py computes, this is what compiled code, the IR and the cache must show.
Tuning has its own: test_tuned.py for configurations that are stale, damaged or another device's (vllm#34846,
#54500, sglang#5740), tests/moec/test_tune.py for tuning that takes 77 minutes, or ends with a candidate that
crashes (vllm#44830, Liger-Kernel#1246).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from moec.codegen.schedules import Schedule
from moec.ir.op import Op
from moec.ops import compiled, fused_experts
from moec.passes import PassManager, pipeline
from moec.runtime.compile import compile_many
from moec.runtime.compile_worker import jit_function
from moec.runtime.launch import Kernel
from tests.codegen.test_triton_kernels import V3, V3_FP8
from tests.codegen.triton_kernels import load, source
from tests.moec.experts import close, layer, loop

ROOT = Path(__file__).parents[2]
ONE = {  # of each form of a grouped product, a schedule
    "rows": Schedule("rows", 64, 128, 128, 8, 3),
    "swapped": Schedule("swapped", 16, 128, 128, 4, 3),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's, where a test compiles in this process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def test_in_the_interpreter() -> None:
    """users_bugs_interpreted.py, in a process of its own."""
    tests = Path(__file__).with_name("users_bugs_interpreted.py")
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# sglang#32340: top-6 in a range of a power of two.
@pytest.mark.parametrize("tokens", [0, 1, 2, 37])
def test_top_6(tokens: int) -> None:
    one = layer(tokens, k=6, experts=64)
    close(fused_experts(*one.args), loop(one), torch.float32)


# sglang#4727, vllm#5938, Liger-Kernel#1296: int32 overflow at about 37 thousand tokens.
WIDTHS = (7168, 2048, 4096, 14336)  # of V3's rows: what an expert, a token or a slot is multiplied by


def operations() -> Iterator[tuple[str, Op, Schedule | None]]:
    """V3's kernels in bf16 and fp8; of grouped products both forms."""
    bf16 = {f"bf16 {name}": make("bf16") for name, make in V3.items()}
    for name, op in (bf16 | {f"fp8 {name}": make() for name, make in V3_FP8.items()}).items():
        if op.name in ("grouped_linear", "gather_grouped_linear"):
            yield from ((f"{name} {form}", op, schedule) for form, schedule in ONE.items())
        else:
            yield name, op, None


OPERATIONS = {name: (op, schedule) for name, op, schedule in operations()}


@cache
def text_of(name: str) -> tuple[str, str]:
    """An operation's kernel file and target: weights by pointer, and in fp8 by descriptor."""
    op, schedule = OPERATIONS[name]
    target = "sm_90a" if name.startswith("fp8") else "sm_80"
    return source(op, target, None if schedule is None else [schedule]), target


def ttir(text: str, target: str, folder: Path) -> str:
    """What Triton makes of a file's kernels, one variant each, before they are laid out for a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = []
    for kernel in (value for value in vars(load(text, folder)).values() if isinstance(value, Kernel)):
        given = kernel.requests(target)[0].payload()
        function = jit_function(given["source"], given["function"], given["kernel"])
        code = ASTSource(function, given["signature"], given["constants"], {})
        made = triton.compile(code, GPUTarget("cuda", given["number"], 32), given["options"])
        found.append(made.asm["ttir"])
    assert found
    return "\n".join(found)


def products_by_widths(text: str, bits: int) -> list[str]:
    """The products in integers of ``bits`` bits by a constant that is the width of a row."""
    type = rf"(?:tensor<(?:\d+x)+i{bits}>|i{bits})(?=\s)"
    constants = re.findall(rf"(%[\w.]+) = arith\.constant (?:dense<)?(\d+)>? : {type}", text)
    widths = {name for name, value in constants if int(value) in WIDTHS}
    products = re.finditer(rf"arith\.muli (%[\w.]+), (%[\w.]+)[^:\n]*: {type}", text)
    return [m[0] for m in products if {m[1], m[2]} & widths]


def float_atomics(text: str) -> list[str]:
    return re.findall(r"tt\.atomic_rmw f\w+|atomic_rmw [^\n]*-> (?:tensor<[\dx]*)?(?:f|bf)\d+", text)


@pytest.mark.parametrize("name", OPERATIONS)
def test_offsets_past_int32_and_atomics_in_any_order(name: str, tmp_path: Path) -> None:
    """No expert's, token's or slot's number is multiplied by a row's width in 32 bits; and no atomic adds
    floats, of which the sum would depend on the order (transformers#43362, vllm#56887).
    """
    text = ttir(*text_of(name), tmp_path)
    assert not products_by_widths(text, 32)
    assert not float_atomics(text)
    if name in ("bf16 gather_grouped_linear rows", "bf16 grouped_linear swapped", "bf16 combine"):
        assert products_by_widths(text, 64)  # there are such products


def test_offsets_past_int32_would_be_seen(tmp_path: Path) -> None:
    text, target = text_of("bf16 gather_grouped_linear rows")
    wide, narrow = "source.to(tl.int64)[:, None] * K", "source[:, None] * K"
    assert wide in text
    assert products_by_widths(ttir(text.replace(wide, narrow), target, tmp_path), 32)


def test_atomics_in_any_order_would_be_seen(tmp_path: Path) -> None:
    text, target = text_of("bf16 combine")
    assert text.count("tl.store(y") == 1
    assert float_atomics(ttir(text.replace("tl.store(y", "tl.atomic_add(y"), target, tmp_path))


# DeepGEMM#98: every expert's rows padded to 128, a fifth of the work wasted.
@pytest.mark.parametrize("form", ["fused", "fused_fp8"])
def test_no_experts_rows_are_padded(form: str) -> None:
    """Of a layer on a GPU, no value has more rows than the tokens have choices."""
    sizes = {"experts": 256, "hidden": 7168, "width": 4096, "k": 8}
    blocks = ((128, 128), (128, 128)) if form == "fused_fp8" else ()
    key = compiled.Key(form, "sm_90a", False, torch.bfloat16, weights=torch.float32, blocks=blocks, **sizes)
    module = compiled.lower(key)
    PassManager(pipeline(2, "sm_90a")).run(module)
    rows = {str(r.type.shape[0]) for op in module["forward"].ops for r in op.results}
    assert rows <= {"T", "8*T", "257", "256"} and "8*T" in rows


def test_segments_begin_where_the_one_before_ends() -> None:
    one = layer(33, k=3, experts=8)
    _, _, _, slot, off = torch.ops.moec.experts_begin(one.x, one.w13, one.weights, one.ids)
    assert off.tolist() == [0, *one.ids.flatten().bincount(minlength=8).cumsum(0).tolist()]
    assert len(slot) == 33 * 3


# sglang#29170, flashinfer#4317: kernels compiled again at each start. flashinfer#4489, #4884: a cache that is
# keyed by when a file was written, or where it is.
SECOND_START = """
import os, sys
from pathlib import Path
from moec.runtime import workers
from moec.runtime.compile import compile_many
from moec.runtime.launch import Kernel
from tests.codegen.triton_kernels import load

folder = Path(sys.argv[1])
folder.mkdir()
module = load(Path(sys.argv[2]).read_text(), folder)
os.utime(module.__file__, (1, 1))
workers.Worker.ask = lambda *args: sys.exit("a compiler ran")
requests = [r for k in vars(module).values() if isinstance(k, Kernel) for r in k.requests("sm_90a")]
done = compile_many(requests, Path(sys.argv[3]))
assert (done.compiled, done.reused) == (0, len(requests)) and requests
"""


def test_a_second_start_compiles_nothing_whenever_and_wherever_its_files_were_written(tmp_path: Path) -> None:
    text = source(V3["combine"]("bf16"))
    (tmp_path / "kernel.py.txt").write_text(text)
    module, cache = load(text, tmp_path), tmp_path / "cache"
    kernels = [value for value in vars(module).values() if isinstance(value, Kernel)]
    first = compile_many([r for k in kernels for r in k.requests("sm_90a")], cache)
    assert first.compiled == len(first.check())
    for place in ("here", "a longer name, elsewhere"):
        command = [sys.executable, "-c", SECOND_START, tmp_path / place, tmp_path / "kernel.py.txt", cache]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
