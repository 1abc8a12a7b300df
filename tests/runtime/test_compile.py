"""Compiling ahead of time, without a GPU: what comes out, what is kept, what is refused."""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moec.config import BuildOptions
from moec.errors import BadArgument, CompileFailed, CompilerMissing, TooMuchSharedMemory, UnknownTarget
from moec.runtime import sass, workers
from moec.runtime.compile import Request, Results, compile_many, compiler_version
from moec.runtime.device_source import device_source
from moec.runtime.kernel_cache import Cubin, KernelCache, default_folder
from tests.runtime.kernels import COPY, PRODUCT, REQUESTS, SOURCE, TMA


def test_every_target_compiles_and_the_order_is_kept(first_build: Results, built: dict[str, Cubin]) -> None:
    assert (first_build.compiled, first_build.reused) == (len(REQUESTS), 0)
    for request, cubin in zip(REQUESTS.values(), built.values(), strict=True):
        assert cubin.data.startswith(b"\x7fELF")
        assert cubin.stem == f"{request.kernel}.{request.variant}.{request.arch}"
        assert cubin.metadata["symbol"] == request.function and cubin.metadata["warps"] == request.warps


def test_metadata_says_what_a_launch_passes(built: dict[str, Cubin]) -> None:
    metadata = built["product_tma sm_90a"].metadata
    assert metadata["arguments"] == [
        ["a", "tensordesc<bf16[64,64]>"],
        ["b", "tensordesc<bf16[128,64]>"],
        ["c", "tensordesc<bf16[64,128]>"],
        ["K", "i32"],
        ["scale", "fp32"],
    ]
    assert metadata["divisible"] == ["K"]
    assert [d["block_size"] for d in metadata["descriptors"]] == [[64, 64], [128, 64], [64, 64]]
    assert list(metadata["hidden"]) == ["global_scratch", "profile_scratch"]
    assert 3 * (64 + 128) * 64 * 2 <= metadata["shared"] <= 232_448
    assert built["product_tma sm_80"].metadata["descriptors"] == []  # no TMA there


def test_a_second_build_compiles_nothing(
    built: dict[str, Cubin], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.Worker, "ask", lambda *_: pytest.fail("a compiler ran"))
    steps: list[tuple[int, int]] = []
    again = compile_many(list(REQUESTS.values()), cache, progress=lambda *s: steps.append(s))
    assert (again.compiled, again.reused) == (0, len(REQUESTS))
    assert again.check() == list(built.values())
    assert steps == [(len(REQUESTS), len(REQUESTS))]


@pytest.mark.parametrize(
    "other",
    [
        replace(COPY, source=SOURCE.replace("constexpr(0.5)", "constexpr(0.25)")),
        replace(COPY, source=SOURCE.replace("return v * HALF", "return v + HALF")),
        replace(COPY, constants={"BLOCK": 512}),
        replace(COPY, divisible=("x", "y")),
        replace(COPY, signature=COPY.signature | {"n": "i64"}),
        replace(COPY, warps=8),
        replace(COPY, stages=3),
        replace(COPY, maxnreg=64),
        replace(COPY, fp_fusion=False),
        replace(COPY, arch="sm_100a"),
    ],
)
def test_whatever_decides_a_cubin_is_in_its_key(other: Request) -> None:
    assert other.key() != COPY.key()


def test_another_compiler_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = COPY.key()
    assert compiler_version("sm_90a").startswith("triton 3.")
    monkeypatch.setattr("moec.runtime.compile.compiler_version", lambda arch: "triton 9.9.9, ptxas V99")
    assert COPY.key() != before


def test_host_code_is_not_in_the_key() -> None:
    edited = SOURCE.replace("torch.empty_like(x)", "torch.zeros_like(x)") + "\n\nprint('a new line')\n"
    assert replace(COPY, source=edited).key() == COPY.key()


def test_the_slice_holds_what_the_function_needs_and_no_more() -> None:
    text = device_source(SOURCE, "copy")
    assert "def halve" in text and "HALF = tl.constexpr(0.5)" in text and "@triton.jit\ndef copy" in text
    # `host` is a variable of the kernel and a function of the file.
    assert "def host" not in text and "torch" not in text and "def product" not in text
    with pytest.raises(CompileFailed, match="defines no function 'absent'"):
        device_source(SOURCE, "absent")
    with pytest.raises(CompileFailed, match="line 2 is no Python"):
        device_source("x = 1\ndef f(:", "f")


def test_equal_sources_in_different_folders_give_equal_bytes(
    built: dict[str, Cubin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")  # nothing that the user has set counts
    names = ["copy sm_90a", "product_tma sm_90a"]
    fresh = compile_many([REQUESTS[n] for n in names], None, jobs=1)
    assert fresh.compiled == 2
    for name, cubin in zip(names, fresh.check(), strict=True):
        assert cubin == built[name]
        for path in (str(tmp_path), "/tmp", ".py", sys.prefix, f"<{cubin.metadata['kernel']}>", "debug_line"):
            assert path.encode() not in cubin.data


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "other"])
def test_a_damaged_entry_is_compiled_again(damage: str, built: dict[str, Cubin], tmp_path: Path) -> None:
    cubin, key = built["copy sm_90a"], COPY.key()
    store = KernelCache(tmp_path)
    store.put(key, cubin)
    assert store.get(key) == cubin
    path = store.path(key)
    entry = path.read_bytes()
    middle = len(entry) // 2
    path.write_bytes(
        {
            "truncated": entry[:-1],
            "changed": entry[:middle] + bytes([entry[middle] ^ 1]) + entry[middle + 1 :],
            "empty": b"",
            "other": b"not an entry\nat all\n",
        }[damage]
    )
    assert store.get(key) is None
    if damage == "truncated":
        assert compile_many([COPY], tmp_path).compiled == 1
        assert store.get(key) == cubin


def _race(cache: Path, requests: list[Request], barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    results.put([c.data for c in compile_many(requests, cache, jobs=1).check()])  # type: ignore[attr-defined]


def test_processes_may_share_a_cache(built: dict[str, Cubin], tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(4), fork.SimpleQueue()
    racers = [fork.Process(target=_race, args=(tmp_path, [COPY], barrier, results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    found = [results.get() for _ in racers]
    for racer in racers:
        racer.join(60)
    assert found == [[built["copy sm_90a"].data]] * 4
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == [KernelCache(tmp_path).path(COPY.key())]


def test_a_request_that_fails_stops_no_other(built: dict[str, Cubin], cache: Path) -> None:
    undefined = replace(COPY, variant="undefined", source=SOURCE.replace("halve(host)", "halved(host)"))
    crash = "(__import__('os').system('echo about to die') or __import__('os')._exit(7))"
    crashing = replace(COPY, variant="crash", source=SOURCE.replace("(0.5)", crash))
    results = compile_many([undefined, crashing, replace(COPY, warps=2), COPY], cache, jobs=1)
    assert [c is not None for c in results.cubins] == [False, False, True, True]
    assert (results.compiled, results.reused) == (3, 1)
    told, crashed = map(str, results.errors)
    assert told.startswith("error[M0801] copy undefined for sm_90a: ") and "halved is not defined" in told
    assert "copy crash for sm_90a: the compiler ended with status 7: about to die" in crashed
    with pytest.raises(CompileFailed, match="copy undefined") as raised:
        results.check()
    assert "  also: copy crash for sm_90a: " in str(raised.value)


def test_more_shared_memory_than_the_device_has_is_refused() -> None:
    request = replace(PRODUCT, arch="sm_80", stages=9)
    (error,) = compile_many([request], None).errors
    assert isinstance(error, TooMuchSharedMemory) and error.code == "M0802"
    assert "product 64x128x64w4s3 for sm_80" in str(error) and "there are 166,912" in str(error)


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        (replace(COPY, constants={}), BadArgument, "BLOCK: a constexpr without a value"),
        (replace(COPY, constants={"BLOCK": 1, "X": 2}), BadArgument, "X: a constexpr without a value"),
        (replace(COPY, divisible=("z",)), BadArgument, "z is neither a pointer nor an integer"),
        (replace(TMA, divisible=("scale",)), BadArgument, "scale is neither"),
        (replace(COPY, arch="sm_90"), UnknownTarget, "did you mean sm_90a"),
    ],
)
def test_a_request_that_contradicts_itself(
    request_: Request, kind: type[Exception], message: str, cache: Path, built: dict[str, Cubin]
) -> None:
    results = compile_many([request_, COPY], cache)
    assert results.reused == 1 and isinstance(results.errors[0], kind) and message in str(results.errors[0])


def test_a_signature_must_name_the_functions_parameters() -> None:
    swapped = dict(reversed(COPY.signature.items()))
    (error,) = compile_many([replace(COPY, signature=swapped)], None).errors
    assert "the function takes ['x', 'y', 'n', 'BLOCK']" in str(error)


def test_parameters_that_a_launch_would_not_pass_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.runtime.compile.HIDDEN", ("global_scratch",))
    (error,) = compile_many([COPY], None).errors
    assert "takes parameters of [8, 8, 4, 8, 8] bytes, a launch would pass [8, 8, 4, 8]" in str(error)


def test_no_triton_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for function in (sass.triton_folder, sass.tool, compiler_version):
        function.cache_clear()
    monkeypatch.setattr(sass, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match="Triton isn't installed"):
        compile_many([COPY], tmp_path)
    for function in (sass.triton_folder, sass.tool, compiler_version):
        function.cache_clear()


def test_a_worker_sees_no_ones_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE", "DISABLE_PTXAS_OPT", "MLIR_ENABLE_DUMP"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "ptxas")
    found = workers.environment("folder")
    assert {k for k in found if k.startswith(("TRITON_", "DISABLE_", "MLIR_"))} == {
        "TRITON_CACHE_DIR",
        "TRITON_DISABLE_LINE_INFO",
        "TRITON_PTXAS_PATH",
    }
    assert found["PATH"]


def test_the_caches_folder_is_an_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert BuildOptions.from_environment({"MOEC_CACHE": "kept"}).cache == "kept"
    assert BuildOptions().as_manifest() == BuildOptions(cache="kept").as_manifest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "moec"
