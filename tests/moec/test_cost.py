"""``moec show --cost``: what it prints, counted by hand on a small module, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moec.costs import formula, scheduled_tile
from moec.ir.types import symbol

from .conftest import PRESET, Cli

MODULE = """\
moec.ir 1 module @mine target=sm_90a

func @layer(%layer: index, %x: bf16[N,64]) -> bf16[N,64]
  param $gate: bf16[8,64]
  param $w: bf16[8,64,64]
  %logits = linear(%x, $gate) {acc=f32} : f32[N,8]
  %w, %id = route(%logits) {k=2, score=softmax} : f32[N,2], i32[N,2]
  %slot, %off = sort_by_expert(%id) {experts=8} : i32[2*N~8], i32[9]
  %y = gather_grouped_linear(%x, $w, %slot, %off) {per_row=2, SCHEDULE} : bf16[2*N~8,64]
  %z = combine(%y, %slot, %w) : bf16[N,64]
  return %z
end

func @step(%x: bf16[N,64]) -> bf16[N,64]
  %y = call @layer(%x) {layers=0..2, scope=layers.*} : bf16[N,64]
  return %y
end
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.moec"
    file.write_text(MODULE.replace(", SCHEDULE", ""))
    return file


def test_the_figures_of_a_file_by_hand(cli: Cli, mine: Path) -> None:
    data = json.loads(cli("show", mine, "--cost", "--at", "T=16", "--json").out)
    assert data["at"] == {"N": 16}
    assert data["device"]["name"] == "sm_90a"
    (load,) = data["routers"]
    active = 8 * (1 - (6 / 8) ** 16)
    assert load["active"] == pytest.approx(active)
    assert load["mean"] == pytest.approx(32 / active)
    entry = data["entries"]["step"]
    step, layer = entry["functions"]
    assert (step["runs"], layer["runs"], layer["name"]) == (1, 3, "layer")
    ops = {op["value"]: op for op in layer["ops"]}
    moved = 2 * 16 * 64 + 8 * 64 * 64 * 2 * active / 8 + 4 * 32 + 4 * 9 + 2 * 32 * 64
    assert ops["%y"]["bytes"] == pytest.approx(moved)
    assert ops["%y"]["flops"] == 2 * 32 * 64 * 64
    assert ops["%y"]["seconds"] == pytest.approx(moved / 3.0e12)
    assert (ops["%y"]["bound"], ops["%y"]["dtype"], ops["%w"]["dtype"]) == ("bytes", "bf16", "f32")
    assert entry["total"]["launches"] == 3 * 5
    assert entry["total"]["seconds"] == pytest.approx(3 * sum(op["seconds"] for op in ops.values()))
    assert step["ops"][0]["callee"] == "layer"
    assert step["ops"][0]["seconds"] == pytest.approx(entry["total"]["seconds"])
    assert layer["share"] == pytest.approx(1) and step["share"] == 0


def test_the_tables_say_the_same(cli: Cli, mine: Path) -> None:
    out = cli("show", mine, "--cost", "--at", "T=16").out
    assert "mine at N=16" in out
    assert "routing uniform: 7.9 of 8 experts have rows, 4.0 each" in out
    assert "@layer, run 3 times" in out
    assert "15 launches are counted beside: at 3 µs 45 µs" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("%")}
    # 2·32·64·64 FLOPs; 2048 + 64,880 (7.92 experts' weights) + 164 + 4096 bytes.
    assert lines["%y"][1:5] == ["gather_grouped_linear", "1", "262KF", "71.2KB"]
    assert "kernel" not in out
    only = cli("show", mine, "--cost", "--at", "T=16", "--function", "@layer").out
    assert "@layer, run 3 times" in only and "in all" not in only


def test_without_sizes_there_are_formulas(cli: Cli, mine: Path) -> None:
    out = cli("show", mine, "--cost", "--function", "layer").out
    lines = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.startswith("%")}
    assert lines["%y"] == "%y gather_grouped_linear 1 16384*N 392*N + 8192*active(8, 2, N) + 36"
    rows = json.loads(cli("show", mine, "--cost", "--json").out)
    assert rows["step"][-1]["launches"] == 15
    n = symbol("N")
    assert formula(n * 2.0 + 0.1) == "2*N + 0.1"


def test_other_routings_and_figures(cli: Cli, mine: Path, tmp_path: Path) -> None:
    def shown(*args: object) -> dict:  # type: ignore[type-arg]
        found: dict = json.loads(cli("show", mine, "--cost", "--json", *args).out)  # type: ignore[type-arg]
        return found

    at = ("--at", "T=16")
    trace = tmp_path / "trace.npy"
    np.save(trace, np.tile([2, 5], (3, 16, 1)))
    recorded = shown(*at, "--routing", trace)["routers"][0]
    assert (recorded["active"], recorded["mean"], recorded["most"]) == (2, 16, 16)
    assert recorded["tile"] == 64 and recorded["waste"] == 1 - 32 / 128
    assert shown(*at, "--routing", trace, "--tile", "16")["routers"][0]["waste"] == 0
    skewed = shown(*at, "--routing", "zipf:3")["routers"][0]
    assert recorded["active"] < skewed["active"] < shown(*at)["routers"][0]["active"]
    fast = shown(*at, "--figures", "bandwidth=6e12")["entries"]["step"]["total"]["seconds"]
    assert fast == pytest.approx(shown(*at)["entries"]["step"]["total"]["seconds"] / 2)
    on_cpu = shown(*at, "--target", "cpu")
    assert on_cpu["device"]["name"] == "cpu" and "assumed" in on_cpu["device"]["stands_for"]


def test_a_schedule_says_its_tile(cli: Cli, tmp_path: Path) -> None:
    text = "<4 rows: swapped 16x128x64 w4 s4; rows 128x128x64 w8 s3"
    assert scheduled_tile(text, 3.9) == 16
    assert scheduled_tile(text, 4) == 128
    assert scheduled_tile("rows 64x64x32 w4 s3", 1) == 64
    assert scheduled_tile(None, 1) is None and scheduled_tile("torch", 1) is None
    file = tmp_path / "mine.moec"
    file.write_text(MODULE.replace("SCHEDULE", f'schedule="{text}"'))
    for tokens, tile in ((8, 16), (64, 128)):
        data = json.loads(cli("show", file, "--cost", "--at", f"T={tokens}", "--json").out)
        assert data["routers"][0]["tile"] == tile


def test_specs_naive_and_optimised_and_packages(cli: Cli, built: Path) -> None:
    naive = json.loads(cli("show", PRESET, "--cost", "--at", "T=8", "--json").out)["entries"]["step"]
    assert any(f["working_runs"] < f["runs"] for f in naive["functions"])  # experts, one by one
    optimised = json.loads(cli("show", PRESET, "-O", "2", "--cost", "--at", "T=8", "--json").out)
    entry = optimised["entries"].get("step") or optimised["entries"]["decode"]
    assert entry["total"]["launches"] < naive["total"]["launches"] / 2
    gpu = cli("show", PRESET, "-O", "2", "--target", "sm_90a", "--cost", "--at", "T=8").out
    emitters = {line.split()[1]: line.split()[-1] for line in gpu.splitlines() if line.startswith("%")}
    assert (emitters["grouped_linear_combine"], emitters["linear"]) == ("Triton", "PyTorch")
    package = cli("show", built, "--cost", "--at", "T=8,S=100")
    assert package.code == 0 and "in all" in package.out
    assert "grouped_linear" not in cli("show", PRESET, "--plain").out
    assert "grouped_linear" in cli("show", PRESET, "-O2", "--plain").out


@pytest.mark.parametrize(
    ("args", "code", "why"),
    [
        (("--cost", "--at", "Q=1"), 1, "--at Q: no size is called that"),
        (("--cost", "--at", "T=1", "--routing", "trace.npy"), 1, "can't read the trace trace.npy: No such"),
        (("--cost", "--at", "T=1", "--routing", "uniforn"), 1, "did you mean uniform"),
        (("--cost", "--at", "T=1", "--target", "sm_90"), 1, "no target is called 'sm_90'"),
        (("--cost", "--at", "T=1", "--figures", "bf17=1"), 1, "did you mean bf16"),
        (("--cost", "--at", "T=1", "--function", "lair"), 1, "no function is called @lair"),
        (("--cost", "--at", "T=1", "--tile", "0"), 2, "0 is not in the range"),
        (("--at", "T=1"), 2, "are for one of --cost and --memory"),
        (("--json",), 2, "are for one of --cost and --memory"),
        (("-O", "2"), 1, "-O is for a spec"),
    ],
)
def test_what_is_refused(cli: Cli, mine: Path, args: tuple[str, ...], code: int, why: str) -> None:
    done = cli("show", mine, *args)
    assert (done.code, done.out) == (code, "")
    assert why in done.err
    assert code == 2 or done.err.startswith("error[M0")


def test_a_trace_of_another_model_is_refused(cli: Cli, mine: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "trace.npy", np.tile(np.arange(3), (1, 16, 1)))
    done = cli("show", mine, "--cost", "--at", "T=16", "--routing", tmp_path / "trace.npy")
    assert (done.code, done.out) == (1, "")
    assert "no layer in it chooses 2 experts a token" in done.err


def test_no_tokens_without_a_sequence(cli: Cli) -> None:
    cli("show", "llama-tiny", "--cost", "--at", "T=1,B=0").refused("M0701", "B=0", "1 new token")
