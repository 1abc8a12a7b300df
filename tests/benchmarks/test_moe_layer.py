"""benchmarks/moe_layer.py on the CPU: every line but the launches, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
INVARIANT, GLUON, ONE_LAUNCH = "moec (batch invariant)", "moec (gluon)", "moec (one launch)"
GLUED = ("contiguous", "masked")
PEERS = ("torch grouped_mm", "transformers grouped_mm", *GLUED, "tuned")


def run(*options: str, out: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OUT": str(out or ""), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "moe_layer.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def finished(folder: Path) -> subprocess.CompletedProcess[str]:
    done = run("--self-test", "--out", str(folder / "out"), out=folder / "copy")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def result(finished: subprocess.CompletedProcess[str], folder: Path) -> Any:
    return json.loads((folder / "out" / "moe_layer.self-test.json").read_text(encoding="utf-8"))


def test_everybody_is_measured_at_every_size(result: Any) -> None:
    measured = {(r["shape"], r["tokens"], r["implementation"]) for r in result["results"]}
    assert measured == {
        (shape, tokens, name)
        for shape in ("tiny", "tiny-top6")
        for tokens in (1, 4, 17)
        for name in ("moec", INVARIANT, GLUON, ONE_LAUNCH, *PEERS)
        if name != ONE_LAUNCH or tokens <= 16  # of more it's what moec is
    }
    for one in result["results"]:
        assert 0 < one["p10_us"] <= one["median_us"] <= one["p90_us"]
        assert one["error"] < 2e-2 and one["floor_us"] > 0 and one["rounds"] >= 5


def test_the_wrong_and_the_failing_are_named_and_left_out(result: Any) -> None:
    reasons = {e["implementation"]: e["reason"] for e in result["excluded"]}
    assert set(reasons) == {"wrong", "failing"}
    assert reasons["wrong"].startswith("wrong: off by")
    assert reasons["failing"] == "RuntimeError: it doesn't take this"
    assert result["unavailable"]["missing"] == "nobody is not installed"


def test_a_peer_is_tuned_and_what_was_found_is_told(result: Any) -> None:
    """Half of the candidates fail and half of the others are wrong: neither ends a run or is chosen."""
    assert [(t["shape"], t["tokens"]) for t in result["tuning"]] == [
        (shape, tokens) for shape in ("tiny", "tiny-top6") for tokens in (1, 4, 17)
    ]
    for one in result["tuning"]:
        assert one["implementation"] == "tuned" and not one["configured"]
        assert (one["config"]["num_warps"], one["config"]["num_stages"]) == (4, 3)
        assert one["best_us"] < one["own_us"] and 2 * len(one["failed"]) == one["tried"] - 1
        assert {f["why"] for f in one["failed"]} == {"RuntimeError"}
        assert {f["config"]["num_stages"] for f in one["failed"]} == {4}


def test_rows_say_what_they_are_made_of_and_shapes_how_they_choose(result: Any) -> None:
    assert result["implementations"]["contiguous"]["experts"].startswith("DeepGEMM's contiguous layout")
    assert result["implementations"]["contiguous"]["router"].startswith("PyTorch's operators")
    assert result["implementations"]["moec"]["layer"] == "moec.ops.routed_experts"
    assert result["shapes"]["tiny"]["router"]["score"] == "softmax"
    v3 = result["shapes"]["tiny-top6"]["router"]
    assert (v3["score"], v3["groups"], v3["topk_groups"], v3["scale"]) == ("sigmoid", 4, 2, 2.5)


def test_the_machine_is_described(result: Any) -> None:
    assert result["self_test"] and result["device"] and result["date"] and result["dtype"] == "bf16"
    assert {"moec", "torch", "python"} <= set(result["versions"])
    assert result["from"] == "logits"
    assert result["roofs"]["bandwidth"] > 0 and result["roofs"]["flops"] > 0


def test_a_table_ends_the_output(finished: subprocess.CompletedProcess[str]) -> None:
    lines = finished.stdout.splitlines()
    assert any(line.startswith("tiny-top6 ") and "grouped_mm" in line for line in lines)
    assert "a self-test on the CPU: these times mean nothing" in lines
    assert any(line.startswith("left out wrong: ") for line in lines)
    assert any(line.startswith("tuned tuned at 6 of 6: better at 6, ") for line in lines)
    assert any(line.startswith(f"{GLUON}: ") and "geometric mean of 6," in line for line in lines)
    assert any(line.startswith(f"{ONE_LAUNCH}: ") and "geometric mean of 4," in line for line in lines)
    assert any(line.startswith("determinism: ") and "geometric mean of 6," in line for line in lines)


def test_the_files_go_to_out_as_well(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    plotted = find_spec("matplotlib") is not None
    names = ["moe_layer.self-test.json", *(["moe_layer.self-test.png"] if plotted else [])]
    for where in ("out", "copy"):
        assert sorted(p.name for p in (folder / where).iterdir()) == names
    assert plotted or "no plot: matplotlib is not installed" in finished.stdout


def test_a_choice_of_shapes_tokens_and_peers(tmp_path: Path) -> None:
    chosen = ["--shapes", "tiny", "--tokens", "2", "--only", "moec", "--dtype", "fp32", "--quick"]
    done = run("--self-test", *chosen, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "moe_layer.self-test.fp32.quick.json").read_text(encoding="utf-8"))
    assert [(r["shape"], r["tokens"], r["implementation"]) for r in found["results"]] == [("tiny", 2, "moec")]
    assert found["results"][0]["error"] < 1e-5


def test_experts_in_fp8(tmp_path: Path) -> None:
    """Who quantises as fp8's layers do is off by that; who rounds only the weights is nearly exact."""
    chosen = ["--shapes", "tiny-top6", "--tokens", "1", "9", "--dtype", "fp8", "--tune-peers", "0"]
    done = run("--self-test", *chosen, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "moe_layer.self-test.fp8.json").read_text(encoding="utf-8"))
    errors = {(r["implementation"], r["tokens"]): r["error"] for r in found["results"]}
    assert errors.keys() == {
        (name, m) for name in ("moec", INVARIANT, GLUON, ONE_LAUNCH, *GLUED, "tuned") for m in (1, 9)
    }
    assert all(error < (1e-2 if name == "tuned" else 1.5e-1) for (name, _), error in errors.items())
    assert {e["implementation"] for e in found["excluded"]} == {"wrong", "failing"}
    assert found["tuning"] == [] and found["tune_peers"] == 0
    assert {"vLLM", "SGLang", "DeepGEMM", "DeepGEMM masked"} <= found["unavailable"].keys() | {
        n for n, _ in errors
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--self-test", "--tokens", "0"], "--tokens: 1 or more"),
        (["--self-test", "--tune-peers", "-1"], "--tune-peers: 0 seconds or more"),
        (["--self-test", "--shapes", "huge"], "no shape is called huge; there is tiny, tiny-top6"),
        (["--self-test", "--only", "me"], "nobody is called me; there is moec"),
        ([], "no NVIDIA GPU is here; --self-test"),
    ],
)
def test_what_it_refuses(options: list[str], said: str) -> None:
    done = run(*options)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
