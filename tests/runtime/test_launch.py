"""Launching, up to the driver's calls: which cubin, which parameters, which errors; and the interpreter."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moec.errors import (
    BadArgument,
    DeviceUnavailable,
    InterpreterOff,
    LaunchFailed,
    Misaligned,
    NotCompiled,
)
from moec.runtime import counters, driver, launch
from moec.runtime.compile import compile_many
from moec.runtime.sass import parameters
from tests.runtime.kernels import SOURCE

_numbers = itertools.count()
ROOT = Path(__file__).parents[2]
# The example of the module's docstring is the kernel file that these tests launch.
EXAMPLE = textwrap.dedent(str(launch.__doc__).split("such as::\n")[1].split("\n``signature``")[0])


def import_file(file: Path) -> ModuleType:
    name = f"package_{next(_numbers)}.kernels.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A package with the example's kernel, built for sm_90a."""
    folder = tmp_path_factory.mktemp("package")
    file = folder / "kernels" / "scale_rows.py"
    file.parent.mkdir()
    file.write_text(EXAMPLE)
    for cubin in compile_many(import_file(file).SCALE_ROWS.requests("sm_90a"), cache).check():
        cubin.write(folder / "cubin")
    return folder


class Driver:
    """Stands in for runtime/driver.py, on a device of one capability; records what it is asked to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
        self.loads: list[tuple[Any, ...]] = []
        self.launches: list[tuple[str, tuple[int, int, int], bytes]] = []
        monkeypatch.setattr(driver, "capability", lambda device: capability)
        monkeypatch.setattr(driver, "load", self.load)
        monkeypatch.setattr(driver, "launch", self.launch)
        monkeypatch.setattr(counters, "prepare", lambda device: None)
        # Tensors of the CPU count as the GPU's.
        monkeypatch.setattr(launch, "_device", lambda *_: torch.device("cuda", 0))

    def load(
        self,
        label: str,
        cubin: bytes,
        symbol: str,
        warps: int,
        shared: int,
        device: int,
        together: bool = False,
    ) -> Any:
        self.loads.append((label, cubin, symbol, warps, shared, device, *(["together"] if together else [])))
        return SimpleNamespace(label=label)

    def launch(self, loaded: Any, grid: tuple[int, int, int], values: list[Any]) -> None:
        self.launches.append((loaded.label, grid, b"".join(v.tobytes() for v in values)))


@pytest.fixture
def example(package: Path) -> ModuleType:
    return import_file(package / "kernels" / "scale_rows.py")


def tensors(tokens: int = 3, width: int = 1008) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.zeros(tokens, width, dtype=torch.bfloat16)
    return x, torch.zeros(tokens), torch.zeros_like(x)


def test_the_cubin_is_launched_with_the_arguments_in_order(
    example: ModuleType, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Driver(monkeypatch)
    x, s, y = tensors(3)
    for _ in range(2):
        example.SCALE_ROWS["rows1w4s2", (3,)](x, s, y, 3, x.stride(0))
    file = package / "cubin" / "scale_rows.rows1w4s2.sm_90a.cubin"
    assert fake.loads == [("scale_rows rows1w4s2", file.read_bytes(), "scale_rows", 4, 0, 0)]
    pointers = (x.data_ptr(), s.data_ptr(), y.data_ptr())
    layout = struct.pack("<QQQiiQQ", *pointers, 3, 1008, 0, 0)
    assert fake.launches == [("scale_rows rows1w4s2", (3, 1, 1), layout)] * 2
    assert [p.size for p in parameters(file.read_bytes())] == [8, 8, 8, 4, 4, 8, 8]


def test_the_examples_function_picks_a_variant(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Driver(monkeypatch)
    x, s, _ = tensors(70)
    example.scale(x, s)
    assert [(label, grid) for label, grid, _ in fake.launches] == [("scale_rows rows4w4s2", (18, 1, 1))]
    example.scale(*tensors(0)[:2])
    assert len(fake.launches) == 1  # nothing to do, nothing launched


def test_a_broken_promise_takes_the_twin_or_is_an_error(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Driver(monkeypatch)
    x, s, y = tensors(8)
    shifted = torch.zeros(9000, dtype=torch.bfloat16)[1:]
    kernel = example.SCALE_ROWS
    kernel["rows1w4s2", (8,)](shifted, s, y, 8, 1008)
    kernel["rows1w4s2", (8,)](x, s, y, 8, 1000)
    assert [label for label, *_ in fake.launches] == ["scale_rows rows1w4s2-unaligned"] * 2
    with pytest.raises(Misaligned, match=r"rows4w4s2: x: its address is \d+, no multiple of 16") as raised:
        kernel["rows4w4s2", (2,)](shifted, s, y, 8, 1008)
    assert raised.value.code == "M0804"
    with pytest.raises(Misaligned, match="stride: it is 1000, no multiple of 16"):
        kernel["rows4w4s2", (2,)](x, s, y, 8, 1000)
    kernel["rows4w4s2", (2,)](x, s, y, 7, 1008)  # tokens may be any number
    assert len(fake.launches) == 3


def test_the_twin_was_compiled_without_promises(package: Path) -> None:
    def promised(variant: str) -> Any:
        return json.loads((package / "cubin" / f"scale_rows.{variant}.sm_90a.json").read_text())["divisible"]

    assert promised("rows1w4s2") == ["x", "s", "y", "stride"]
    assert promised("rows1w4s2-unaligned") == []
    assert not (package / "cubin" / "scale_rows.rows4w4s2-unaligned.sm_90a.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:4], r"takes 5 arguments \(x, s, y, tokens, stride\), not 4"),
        (lambda a: [a[0].float(), *a[1:]], "x must be torch.bfloat16, not torch.float32"),
        (lambda a: [a[0].tolist(), *a[1:]], "x must be a tensor, not list"),
        (lambda a: [*a[:3], 3.0, a[4]], "tokens must be an integer, not float"),
        (lambda a: [*a[:3], 2**31, a[4]], "tokens is 2147483648, which is no i32"),
    ],
)
def test_arguments_that_cannot_be_meant(
    change: Callable[[list[Any]], list[Any]],
    message: str,
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Driver(monkeypatch)
    args = change([*tensors(), 3, 1008])
    with pytest.raises(BadArgument, match=f"scale_rows:? {message}"):
        example.SCALE_ROWS["rows1w4s2", (3,)](*args)
    assert not fake.launches


def test_what_there_is_no_cubin_for(
    example: ModuleType, package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x, s, y = tensors()
    Driver(monkeypatch, capability=(8, 0))
    with pytest.raises(
        DeviceUnavailable, match=r"compiled for sm_90a; this device has compute capability 8\.0"
    ):
        example.SCALE_ROWS["rows1w4s2", (3,)](x, s, y, 3, 1008)
    with pytest.raises(NotCompiled, match="no variant 'rows1w4'; did you mean rows1w4s2"):
        example.SCALE_ROWS["rows1w4", (3,)](x, s, y, 3, 1008)
    with pytest.raises(BadArgument, match="a grid is 1 to 3 numbers"):
        example.SCALE_ROWS["rows1w4s2", (3, -1)](x, s, y, 3, 1008)
    unbuilt = tmp_path / "kernels" / "scale_rows.py"
    unbuilt.parent.mkdir()
    unbuilt.write_text(EXAMPLE)
    with pytest.raises(NotCompiled, match="holds no cubin of scale_rows rows1w4s2"):
        import_file(unbuilt).SCALE_ROWS["rows1w4s2", (3,)](x, s, y, 3, 1008)


def test_preloading_leaves_nothing_to_load(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Driver(monkeypatch)
    launch.preload(example.__name__.partition(".")[0], 0)
    variants = ("rows1w4s2", "rows1w4s2-unaligned", "rows4w4s2")
    assert [label for label, *_ in fake.loads] == [f"scale_rows {v}" for v in variants]
    x, s, y = tensors()
    example.SCALE_ROWS["rows1w4s2", (3,)](x, s, y, 3, 1000)
    assert len(fake.loads) == 3 and len(fake.launches) == 1


def test_scratch_is_allocated_for_every_block(
    example: ModuleType, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Driver(monkeypatch)
    compiled = launch._Compiled(driver.load("x", b"", "", 4, 0, 0), (), 1, (128, 0))
    monkeypatch.setattr(type(example.SCALE_ROWS), "load", lambda *_: compiled)
    made: list[int] = []

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(size)
        return torch.zeros(size, dtype=dtype)

    x, s, y = tensors()
    monkeypatch.setattr(torch, "empty", empty)
    example.SCALE_ROWS["rows1w4s2", (3, 2)](x, s, y, 3, 1008)
    assert made == [128 * 3 * 2]
    *_, scratch, none = struct.unpack("<QQQiiQQ", fake.launches[0][2])
    assert scratch != 0 and none == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_the_drivers_refusal_names_the_kernel() -> None:
    with pytest.raises(LaunchFailed, match="k v: "):
        driver.load("k v", b"", "k", 4, 0, 0)


# The interpreter ------------------------------------------------------------------------------------------


def run(code: str, **variables: str) -> str:
    """What a new process prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreter_must_be_on_before_the_process_starts(example: ModuleType) -> None:
    with pytest.raises(InterpreterOff, match="scale_rows is to run on the CPU") as raised:
        example.scale(*tensors()[:2])
    assert raised.value.code == "M0807" and "TRITON_INTERPRET=1 before the process starts" in str(
        raised.value
    )


def test_a_kernel_file_imports_no_triton_unless_it_interprets(package: Path) -> None:
    told = run(f"""
        import os, sys
        from pathlib import Path
        from tests.runtime.test_launch import import_file, InterpreterOff, tensors
        module = import_file(Path({str(package)!r}, "kernels", "scale_rows.py"))
        module.SCALE_ROWS.requests("sm_90a")
        print("triton" in sys.modules)
        import triton.language  # it compiles from here on, whatever is set later
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            module.scale(*tensors()[:2])
        except InterpreterOff as error:
            print(error.code)
    """)
    assert told.split() == ["False", "M0807"]


def test_the_same_file_runs_in_the_interpreter(package: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "product.py").write_text(
        SOURCE.replace("import triton\nimport triton.language as tl\n", "")
        .replace(
            "import torch\n", "import torch\n\nfrom moec.runtime.launch import Kernel, Variant, tl, triton\n"
        )
        .replace("bfloat16", "float16")
        + textwrap.dedent("""
            PRODUCT = Kernel(
                product_tma,
                signature={
                    "a": "tensordesc<fp16[BM, BK]>", "b": "tensordesc<fp16[BN, BK]>",
                    "c": "tensordesc<fp16[BM, BN]>",
                    "K": "i32", "scale": "fp32", "BM": "constexpr", "BN": "constexpr", "BK": "constexpr",
                },
                variants={"v": Variant({"BM": 16, "BN": 32, "BK": 16}, warps=4, stages=2)},
            )
            COPY = Kernel(
                copy,
                signature={"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"},
                arbitrary=("n",),
                variants={"v": Variant({"BLOCK": 16}, warps=1, stages=1)},
            )
        """)
    )
    told = run(
        f"""
        from pathlib import Path
        import torch
        from tests.runtime.test_launch import Misaligned, import_file
        scale = import_file(Path({str(package)!r}, "kernels", "scale_rows.py"))
        torch.manual_seed(0)
        for tokens in (0, 1, 65):
            x = torch.randint(-8, 8, (tokens, 1008)).bfloat16()
            s = torch.randint(-4, 4, (tokens,)).float()
            got = scale.scale(x, s)
            print(torch.equal(got[:, :1000], (x * s[:, None].bfloat16())[:, :1000]))
        module = import_file(Path({str(tmp_path)!r}, "kernels", "product.py"))
        a, b = torch.randn(20, 48).half(), torch.randn(40, 48).half()
        c = torch.full((20, 40), float("nan")).half()
        module.PRODUCT["v", (2, 2)](a, b, c, 48, 0.25)
        torch.testing.assert_close(c.float(), 0.25 * a.float() @ b.float().T, rtol=2e-3, atol=2e-3)
        x, y = torch.randn(20), torch.full((20,), float("nan"))
        module.COPY["v", (2,)](x, y, 20)
        print(torch.equal(y, x / 2))
        try:
            module.COPY["v", (1,)](x[1:], y, 16)
        except Misaligned as error:
            print(error.code)
        """,
        TRITON_INTERPRET="1",
    )
    assert told.split() == ["True"] * 4 + ["M0804"]
