"""Options: what the command line gives goes before the environment, that before the default."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.config import BuildOptions
from moec.errors import BadOption

from .conftest import Cli


def test_defaults() -> None:
    options = BuildOptions.from_environment({})
    assert options == BuildOptions()
    assert (options.target, options.dtype, options.opt_level, options.passes) == ("cpu", None, 2, None)
    assert (options.layers, options.force) == (None, False)


# Variable, its text, the field, what it means, another value that an argument may give.
VARIABLES: list[tuple[str, str, str, Any, Any]] = [
    ("MOEC_TARGET", "sm_90a", "target", "sm_90a", "cpu"),
    ("MOEC_DTYPE", "bf16", "dtype", "bf16", "f32"),
    ("MOEC_OPT", "0", "opt_level", 0, 3),
    ("MOEC_PASSES", "canonicalise", "passes", "canonicalise", "expert-grouping"),
    ("MOEC_FP8", "1", "fp8", True, "per-row"),
    ("MOEC_FP8", "per-row{skip=[o_proj]}", "fp8", "per-row{skip=[o_proj]}", True),
    ("MOEC_CACHE", "kernels", "cache", "kernels", "others"),
    ("MOEC_INTERPRET", "1", "interpret", True, False),
    ("MOEC_TUNING", "h100.json", "tuning", "h100.json", "none"),
    ("MOEC_KERNELS", "gluon", "kernels", "gluon", "triton"),
    ("MOEC_BATCH_INVARIANT", "1", "batch_invariant", True, False),
]


@pytest.mark.parametrize(("variable", "text", "field", "value", "other"), VARIABLES)
def test_precedence(variable: str, text: str, field: str, value: Any, other: Any) -> None:
    default = getattr(BuildOptions(), field)
    assert getattr(BuildOptions.from_environment({variable: text}), field) == value != default
    assert getattr(BuildOptions.from_environment({variable: text}, **{field: other}), field) == other
    assert getattr(BuildOptions.from_environment({variable: text}, **{field: None}), field) == value
    assert getattr(BuildOptions.from_environment({variable: ""}), field) == default


@pytest.mark.parametrize(
    ("name", "ours"),
    [("float32", "f32"), ("torch.bfloat16", "bf16"), (torch.float16, "f16"), (torch.float32, "f32")],
)
def test_dtypes_by_pytorch_s_names(name: Any, ours: str) -> None:
    assert BuildOptions(dtype=name) == BuildOptions(dtype=ours)


def test_every_variable_is_tested_and_every_option_documented() -> None:
    assert {f.metadata["variable"] for f in fields(BuildOptions)} - {""} == {v[0] for v in VARIABLES}
    assert all(f.metadata["doc"] for f in fields(BuildOptions))


@pytest.mark.parametrize(
    ("environment", "given", "words"),
    [
        ({"MOEC_OPT": "fast"}, {}, "MOEC_OPT='fast' is no number"),
        ({"MOEC_OPT": "4"}, {}, "opt_level is 4"),
        ({}, {"opt_level": -1}, "opt_level is -1"),
        ({}, {"opt_level": True}, "opt_level is True"),
        ({}, {"cache": 3}, "cache is 3; it must be text"),
        ({}, {"tuning": ""}, "tuning is empty; it must name a file"),
        ({"MOEC_DTYPE": "f64"}, {}, "dtype is 'f64'"),
        ({}, {"dtype": "float64"}, "dtype is 'float64'"),
        ({}, {"dtype": 3}, "dtype is 3"),
        ({}, {"target": 3}, "target is 3"),
        ({}, {"passes": ["a"]}, "passes is"),
        ({}, {"layers": 3}, "layers is 3"),
        ({}, {"fp8": 3}, "fp8 is 3"),
        ({}, {"fp8": True, "passes": "canonicalise"}, "write it yourself"),
    ],
)
def test_values_out_of_range(environment: dict[str, str], given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption, match=words):
        BuildOptions.from_environment(environment, **given)


def passes_run(package: Path) -> list[str]:
    rows = [json.loads(line) for line in (package / "events.jsonl").read_text().splitlines()]
    return [row["pass"] for row in rows if row["event"] == "pass"]


def test_options_reach_the_build(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, *argv: str) -> dict[str, Any]:
        done = cli("build", "mixtral-tiny", "-o", tmp_path / name, "--json", *argv)
        assert done.code == 0
        manifest: dict[str, Any] = done.json()["manifest"]
        return manifest

    monkeypatch.setenv("MOEC_OPT", "0")
    monkeypatch.setenv("MOEC_DTYPE", "f16")
    manifest = build("environment")
    assert (manifest["dtype"], manifest["options"]["opt_level"]) == ("f16", 0)
    assert passes_run(tmp_path / "environment") == []
    manifest = build("given", "-O1", "--dtype", "bf16")
    assert (manifest["dtype"], manifest["options"]["opt_level"]) == ("bf16", 1)
    assert passes_run(tmp_path / "given") == ["canonicalise", "select", "plan"]
    manifest = build("pipeline", "-p", "expert-grouping,canonicalise")
    assert passes_run(tmp_path / "pipeline") == ["expert-grouping", "canonicalise"]
    monkeypatch.setenv("MOEC_PASSES", "canonicalise,canonicalise")
    build("pipeline-environment")
    assert passes_run(tmp_path / "pipeline-environment") == ["canonicalise", "canonicalise"]


def test_bad_options_at_the_command_line(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = ("build", "mixtral-tiny", "-o", tmp_path / "package")
    cli(*build, "-O4").refused("M0701", "4")
    cli(*build, "--dtype", "f64").refused("M0701", "'f64'", "bf16")
    cli(*build, "--target", "sm_91").refused("M0703", "sm_91", "cpu")
    cli(*build, "-p", "nope").refused("M0702", "nope")
    cli(*build, "--layers", "3").refused("M0701", "3", "2 layers")
    cli(*build, "--layers", "1-x").refused("M0701", "1-x")
    monkeypatch.setenv("MOEC_OPT", "high")
    cli(*build).refused("M0701", "MOEC_OPT", "high")
    assert list(tmp_path.iterdir()) == []
