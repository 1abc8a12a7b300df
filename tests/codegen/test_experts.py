"""The routed experts in one launch: what is generated, and what it compiles to."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.codegen.choosing import Choosing, choose_by
from moec.codegen.constants import Constants
from moec.codegen.kernels import select
from moec.codegen.kernels.triton_grouped import problem
from moec.codegen.select import programs_per_sm
from moec.codegen.together import together
from moec.codegen.tuned import Tuning
from moec.ir.devices import GPUS
from moec.ir.op import Op
from moec.ir.ops.experts import parts_of
from moec.runtime import sass
from moec.runtime.compile import compile_many
from moec.runtime.kernel_cache import Cubin
from moec.runtime.launch import Kernel
from tests.codegen.routers import router
from tests.codegen.triton_kernels import experts_op, load, record, routed_experts_op, source

BLOCKS = ("1x128", "128x128")
FLOATS: dict[str, Callable[[], Op]] = {
    "deepseek-v3": lambda: routed_experts_op(router("deepseek-v3"), "bf16", 2048, 7168),
    "mixtral": lambda: routed_experts_op(router("mixtral"), "bf16", 14336, 4096, plus="bf16"),
    "the most": lambda: routed_experts_op(router("the most"), "f16", 512, 2048),
    "qwen3": lambda: experts_op("bf16", 128, 768, 2048, 8),
    "tails": lambda: experts_op("bf16", 60, 75, 104, 6, act="gelu", limit=7.0, plus="f32"),
}
FP8: dict[str, Callable[[], Op]] = {
    "deepseek-v3": lambda: routed_experts_op(
        router("deepseek-v3"), "f8e4m3", 2048, 7168, scales=BLOCKS, quant="fp32"
    ),
    "blocks": lambda: experts_op("f8e4m3", 256, 2048, 7168, 8, scales=BLOCKS, quant="ue8m0", plus="bf16"),
    "rows": lambda: experts_op("f8e4m3", 64, 1408, 2048, 6, scales=("1x*", "1x*"), quant="fp32"),
}


def compiled(op: Op, folder: Path, target: str = "sm_90a") -> Cubin:
    """The launch for a few tokens."""
    (kernel,) = [
        k
        for k in vars(load(source(op, target), folder)).values()
        if isinstance(k, Kernel) and k.name.endswith("_at_once")
    ]
    (cubin,) = compile_many(kernel.requests(target), cache=folder / "cache").check()
    return cubin


@pytest.mark.parametrize(("name", "op"), [("bf16", FLOATS["qwen3"]), ("fp8", FP8["deepseek-v3"])])
def test_generated_files_read_as_before(
    name: str, op: Callable[[], Op], golden: Callable[[str, str], None]
) -> None:
    """But for the kernels of its parts for more tokens, which other tests show."""
    text, own = source(op()), op().name
    launch = text[text.index(f"@triton.jit\ndef {own}_up_tiles") : text.index("    },\n)\n")] + "    },\n)\n"
    golden(f"v3_experts_{name}.py.txt", f"{launch}\n\n{text[text.index(f'def {own}(') :]}")


@pytest.mark.parametrize("target", GPUS)
def test_lines_have_a_length(target: str) -> None:
    for make in (*FLOATS.values(), *(FP8.values() if GPUS[target].fp8 else ())):
        for line in source(make(), target).splitlines():
            assert len(line) <= 110 and line == line.rstrip(), line


@pytest.mark.parametrize("name", FLOATS)
def test_on_hopper(name: str, tmp_path: Path) -> None:
    check_hopper(FLOATS[name](), "HGMMA", tmp_path)


@pytest.mark.parametrize("name", FP8)
def test_fp8_on_hopper(name: str, tmp_path: Path) -> None:
    check_hopper(FP8[name](), "QGMMA", tmp_path)


def check_hopper(op: Op, instruction: str, folder: Path) -> None:
    """No spills; both products by the fast path; launched so that its programs may wait for each other."""
    cubin, device = compiled(op, folder), GPUS["sm_90a"]
    facts = cubin.facts
    assert not facts.spills and facts.shared_dynamic <= device.smem_per_block
    assert facts.matrix and all(m.startswith(f"{instruction}.64x") for m in facts.matrix)
    assert cubin.metadata["cooperative"] is True


@pytest.mark.parametrize("target", [t for t in GPUS if t != "sm_90a"])
def test_other_targets(target: str, tmp_path: Path) -> None:
    """A few registers are stored on some of them."""
    fp8 = GPUS[target].fp8
    for op in (FLOATS["deepseek-v3"](), *([FP8["deepseek-v3"]()] if fp8 else [])):
        facts = compiled(op, tmp_path, target).facts
        assert facts.matrix and facts.shared_dynamic <= GPUS[target].smem_per_block and facts.spills <= 10


def test_meetings_release_and_acquire_at_the_device(tmp_path: Path) -> None:
    """Counting waits for what was stored; asking forgets what the SM holds; h is copied past its cache."""
    file = tmp_path / "x.cubin"
    file.write_bytes(compiled(FP8["deepseek-v3"](), tmp_path).data)
    shown = subprocess.run([sass.tool("nvdisasm"), "-c", file], capture_output=True, text=True, check=True)
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", shown.stdout)
    counts = [i for i, name in enumerate(code) if name.startswith("REDG")]
    asks = [i for i, name in enumerate(code) if re.fullmatch(r"LDG\.E\.STRONG\.GPU", name)]
    assert len(counts) == len(asks) == 2  # behind choosing and behind the first products
    for count, ask in zip(counts, asks, strict=True):
        assert "MEMBAR.ALL.GPU" in code[count - 6 : count] and "CCTL.IVALL" in code[ask + 1 : ask + 3]
        assert any(name.startswith("BAR.SYNC") for name in code[count - 40 : count])
    copies = [name for name in code if name.startswith("LDGSTS") and "128" in name]
    assert copies and all("BYPASS" in name for name in copies)


def test_h_is_never_read_by_descriptor() -> None:
    """Its reads go another way than the stores that the meeting orders."""
    for make in (FLOATS["qwen3"], FP8["blocks"]):
        text = source(make())
        assert '"w2": "tensordesc<' in text and re.search(r'"h": "\*', text)


def test_both_schedules_fit_one_launch() -> None:
    device = GPUS["sm_90a"]
    for make in (*FLOATS.values(), *FP8.values()):
        _, up, down = parts_of(make())
        pair = together(problem(up), problem(down), 8, "sm_90a")
        assert pair and pair[0].warps == pair[1].warps
        assert all(s.split == 1 and not s.persistent for s in pair)
        assert all(
            programs_per_sm(s, p, device) >= 1 for s, p in zip(pair, map(problem, (up, down)), strict=True)
        )


def test_the_pair_goes_by_a_device_s_fitted_constants() -> None:
    """Memory that takes longer to answer asks for more stages."""
    op, slow = FLOATS["qwen3"](), Constants(latency=1e-5)
    pair = "-".join(s.tile for s in together(*map(problem, parts_of(op)[1:]), 8, "sm_90a", slow) or ())
    tuning = Tuning(Path("x.json"), "a GPU", "sm_90a", {}, slow, {}, {})
    with choose_by(Choosing(tuning=tuning)):
        fitted = source(op)
    assert f'"{pair}": Variant(' in fitted and f'"{pair}": Variant(' not in source(op)


def test_batch_invariant_builds_launch_step_by_step() -> None:
    """The pair of schedules is for a few tokens; what depends on M is what they promise not to be."""
    op = FLOATS["deepseek-v3"]()
    with choose_by(Choosing(batch_invariant=True)):
        text = source(op)
    assert "_at_once" not in text and "tokens > 16" not in text
    assert "_at_once" in source(op) and "if tokens > 16:" in source(op)


def test_phases_are_launches_of_their_own_only_in_the_interpreter(tmp_path: Path) -> None:
    (kernel,) = [
        k
        for k in vars(load(source(FLOATS["deepseek-v3"]()), tmp_path)).values()
        if isinstance(k, Kernel) and k.name.endswith("_at_once")
    ]
    ((_, variant),) = kernel.variants.items()
    assert variant.phases == 3 and variant.constants["PHASE"] == 0
    (request,) = kernel.requests("sm_90a")
    assert request.cooperative and request.constants["PHASE"] == 0


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (lambda: experts_op("bf16", 4, 16, 33, 2), "multiples of 4 bytes"),
        (lambda: experts_op("bf16", 4, 33, 32, 2), "multiples of 4 bytes"),
        (
            lambda: experts_op("f8e4m3", 4, 16, 32, 2, scales=("1x64", "128x128"), quant="fp32"),
            "x has scales of 1x64",
        ),
        (lambda: experts_op("bf16", 4, 16, 32, 2, plus="f64"), "f64 is none of"),
    ],
)
def test_what_is_not_supported_is_pytorchs(op: Callable[[], Op], reason: str) -> None:
    assert any(reason in found for found in record(op()).supports(op()))
    assert select(op(), "sm_90a").name == "torch.experts"


def test_where_there_is_no_fp8() -> None:
    assert select(FP8["blocks"](), "sm_80").name == "torch.experts"
    assert select(FP8["blocks"](), "sm_90a").name == "triton.fp8_experts"
