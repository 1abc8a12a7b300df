"""A mistake in a spec, weights, a package or a prompt: a coded error that names it, nothing left behind."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import PRESET, Cli

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where a build would write; afterwards neither it nor anything half-written is there."""
    folder = tmp_path / "outputs" / "package"
    yield folder
    left = list(folder.parent.iterdir()) if folder.parent.exists() else []
    assert left == [], "a refused build left something behind"


# Specs.
def test_an_unknown_preset_gets_the_nearest_names(cli: Cli, out: Path) -> None:
    cli("build", "mixtral-8x8b", "-o", out).refused("M0102", "'mixtral-8x8b'", "mean mixtral-8x7b", PRESET)


@pytest.mark.parametrize("name", ["zzz", "no/such/folder"])
def test_an_unknown_name_far_from_all_presets(cli: Cli, out: Path, name: str) -> None:
    cli("build", name, "-o", out).refused("M0102", repr(name))


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("{\n  'model_type': 1}", ":2", "no JSON"),
        ('{"model_type": "mixtral",\n\n "vocab_size": }', ":3", "no JSON"),
        ("[1, 2]", ":1", "list"),
        ("", ":1", "no JSON"),
    ],
)
def test_an_unreadable_config(cli: Cli, checkpoint: Path, out: Path, text: str, line: str, word: str) -> None:
    file = checkpoint / "config.json"
    file.write_text(text)
    cli("build", checkpoint, "-o", out).refused("M0301", f"--> {file}{line}\n", word)


def test_a_config_that_is_no_text(cli: Cli, checkpoint: Path, out: Path) -> None:
    (checkpoint / "config.json").write_bytes(b"\xff\xfe{}")
    cli("build", checkpoint, "-o", out).refused("M0301", str(checkpoint / "config.json"))


def test_a_folder_without_config(cli: Cli, tmp_path: Path, out: Path) -> None:
    cli("build", tmp_path, "-o", out).refused("M0301", str(tmp_path), "config.json")
    cli("build", tmp_path / "config.json", "-o", out).refused("M0301", str(tmp_path / "config.json"))


CONTRADICTIONS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("more experts a token than there are", {"num_experts_per_tok": 13}, ("num_experts_per_tok is 13",)),
    ("experts in unequal groups", {"n_group": 5}, ("n_group is 5", "12")),
    ("two spellings of one field", {"dtype": "bfloat16"}, ("dtype", "float32", "bfloat16")),
    ("a negative size", {"kv_lora_rank": -4}, ("kv_lora_rank", "-4")),
    ("a text for a number", {"hidden_size": "48"}, ("hidden_size", "'48'")),
    ("a number for a flag", {"norm_topk_prob": 1}, ("norm_topk_prob", "true or false")),
    ("a field left out", {"v_head_dim": None}, ("v_head_dim", "missing")),
]


@pytest.mark.parametrize(
    ("change", "words"), [c[1:] for c in CONTRADICTIONS], ids=[c[0] for c in CONTRADICTIONS]
)
def test_a_contradictory_config(
    cli: Cli, checkpoint: Path, out: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    file = edit_config(checkpoint, change)
    cli("build", checkpoint, "-o", out).refused("M0302", f"--> {file}\n", *words)


UNSUPPORTED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("an architecture", {"model_type": "gpt2"}, ("gpt2", "deepseek_v3")),
    ("soft capping", {"attn_logit_softcapping": 30.0}, ("attn_logit_softcapping", "soft capping")),
    ("sparse attention", {"index_topk": 2048}, ("index_topk", "sparse attention")),
    ("an activation", {"hidden_act": "relu"}, ("hidden_act", "relu")),
    ("a kind of RoPE", {"rope_scaling": {"type": "spiral", "factor": 2.0}}, ("rope_scaling", "spiral")),
    ("a quantisation", {"quantization_config": {"quant_method": "awq"}}, ("quantization_config", "awq")),
]


@pytest.mark.parametrize(("change", "words"), [c[1:] for c in UNSUPPORTED], ids=[c[0] for c in UNSUPPORTED])
def test_an_unsupported_feature_is_named_with_its_file(
    cli: Cli, checkpoint: Path, out: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    file = edit_config(checkpoint, change)
    cli("build", checkpoint, "-o", out).refused("M0303", f"--> {file}\n", *words)


def test_a_harmless_unknown_field_is_a_warning(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, {"favourite_colour": "blue"})
    done = cli("build", checkpoint, "-o", tmp_path / "package", "-O0")
    assert done.code == 0
    assert done.err.startswith("warning: ") and "favourite_colour" in done.err and ".py" not in done.err


def edit_config(folder: Path, change: dict[str, Any]) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return file


# Weights: the same mistake is found when building and when loading.
HEAD, EXPERT = "lm_head.weight", "model.layers.1.mlp.experts.3.up_proj.weight"


def drop(tensors: dict[str, Any]) -> None:
    del tensors[EXPERT]


def add(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.surplus"] = torch.zeros(2)


def misshape(tensors: dict[str, Any]) -> None:
    tensors[HEAD] = tensors[HEAD][:-1].contiguous()


def transpose(tensors: dict[str, Any]) -> None:
    tensors[EXPERT] = tensors[EXPERT].t().contiguous()


@pytest.mark.parametrize(
    ("edit", "code", "words"),
    [
        (drop, "M0402", (EXPERT,)),
        (add, "M0403", ("model.layers.0.mlp.surplus", "model.safetensors")),
        (misshape, "M0404", (HEAD, "[255, 48]", "[256, 48]")),
        (transpose, "M0404", (EXPERT, "[48, 20]", "[20, 48]")),
    ],
)
def test_weights_that_do_not_fit(
    cli: Cli, built: Path, checkpoint: Path, out: Path, edit: Edit, code: str, words: tuple[str, ...]
) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    cli("build", checkpoint, "--weights", checkpoint, "-o", out).refused(code, str(checkpoint), *words)
    cli("run", built, "--ids", "1", "--weights", checkpoint).refused(code, str(checkpoint), *words)


def test_weights_of_a_dtype_that_can_not_be_converted(cli: Cli, built: Path, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[HEAD] = tensors[HEAD].to(torch.int8)
    save_file(tensors, checkpoint / "model.safetensors")
    cli("run", built, "--ids", "1", "--weights", checkpoint).refused("M0404", HEAD, "int8")


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_truncated_weights(cli: Cli, built: Path, checkpoint: Path, out: Path, size: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    cli("build", checkpoint, "--weights", checkpoint, "-o", out).refused("M0401", str(file), "truncated")
    cli("run", built, "--ids", "1", "--weights", checkpoint).refused("M0401", str(file), "truncated")


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.file, "ran"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_unread(
    cli: Cli, built: Path, checkpoint: Path, out: Path, tmp_path: Path, name: str
) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    cli("build", checkpoint, "--weights", checkpoint, "-o", out).refused("M0405", name, "safetensors")
    cli("run", built, "--ids", "1", "--weights", checkpoint).refused("M0405", name)
    cli("run", built, "--ids", "1", "--weights", checkpoint / name).refused("M0405", name)
    cli("build", checkpoint, "--weights", checkpoint / name, "-o", out).refused("M0405", name)
    assert not (tmp_path / "ran").exists()


def test_no_weights_where_they_should_be(cli: Cli, built: Path, tmp_path: Path, out: Path) -> None:
    cli("run", built, "--ids", "1", "--weights", tmp_path).refused("M0401", str(tmp_path))
    cli("run", built, "--ids", "1", "--weights", tmp_path / "no").refused("M0401", str(tmp_path / "no"))
    cli("build", PRESET, "--weights", tmp_path / "no", "-o", out).refused("M0401", str(tmp_path / "no"))
    cli("run", built, "--ids", "1", "--weights", "random:x").refused("M0601", "random:x")


def test_an_index_of_shards_that_are_not_there(cli: Cli, built: Path, checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    (checkpoint / "model.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {HEAD: "model-00001-of-00002.safetensors"}}))
    cli("run", built, "--ids", "1", "--weights", checkpoint).refused(
        "M0401", "model-00001-of-00002.safetensors"
    )
    index.write_text("{")
    cli("run", built, "--ids", "1", "--weights", checkpoint).refused("M0401", str(index))


def test_weights_that_fit_are_accepted(cli: Cli, pristine: Path, built: Path, tmp_path: Path) -> None:
    assert cli("build", pristine, "--weights", pristine, "-o", tmp_path / "package").code == 0
    done = cli("run", built, "--ids", "1,2", "--weights", pristine, "-n", 3)
    assert done.code == 0 and len(done.out.split(",")) == 3


# Outputs.
def test_an_existing_output_is_kept(cli: Cli, package: Path) -> None:
    before = contents(package)
    cli("build", PRESET, "-o", package).refused("M0501", package.name, "--force")
    assert contents(package) == before
    assert [p.name for p in package.parent.iterdir()] == [package.name]


def test_force_replaces_a_package(cli: Cli, package: Path) -> None:
    (package / "leftover").write_text("")
    assert cli("build", "mixtral-tiny", "-o", package, "--force").code == 0
    assert json.loads((package / "manifest.json").read_text())["name"] == "mixtral-tiny"
    assert not (package / "leftover").exists()
    assert [p.name for p in package.parent.iterdir()] == [package.name]


def test_force_does_not_replace_what_is_no_package(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    cli("build", PRESET, "-o", tmp_path / "thesis", "--force").refused("M0501", "not a package")
    refused = cli("build", PRESET, "-o", tmp_path / "thesis")
    refused.refused("M0501", "not a package")
    assert "--force" not in refused.err, "advice that wouldn't help"
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_can_not_be_written(cli: Cli, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    result = cli("build", PRESET, "-o", tmp_path / place, "--force")
    result.refused("M0501" if place == "file" else "M0502", place)
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_output_below_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file/x", "file/x/y"):
        cli("build", PRESET, "-o", tmp_path / place).refused("M0502", f"{tmp_path / 'file'} is no folder")


def test_an_empty_output(cli: Cli) -> None:
    cli("build", PRESET, "-o", "").refused("M0701", "out is ''")


def test_a_failed_build_leaves_the_old_package(cli: Cli, package: Path, checkpoint: Path) -> None:
    before = contents(package)
    (checkpoint / "model.safetensors").unlink()
    cli("build", PRESET, "-o", package, "--force", "--weights", checkpoint).refused("M0401")
    assert contents(package) == before
    assert {p.name for p in package.parent.iterdir()} == {package.name, checkpoint.name}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# Packages.
USES = [("run", "--ids", "1", "--weights", "random:0"), ("verify",), ("bench", "--prefill", "2")]


@pytest.mark.parametrize("use", USES, ids=[u[0] for u in USES])
@pytest.mark.parametrize("name", ["model.py", "kernels/route.py", "weights.py", "ir/000_naive.moec"])
def test_a_changed_file(cli: Cli, package: Path, use: tuple[str, ...], name: str) -> None:
    ran = package.parent / "ran"
    with (package / name).open("a") as file:
        file.write(f"\nopen({str(ran)!r}, 'w')\n")
    cli(use[0], package, *use[1:]).refused("M0504", str(package / name), "hash")
    assert not ran.exists(), "code of a package that isn't what was built was run"


@pytest.mark.parametrize("use", USES, ids=[u[0] for u in USES])
def test_a_package_that_its_owner_edited(cli: Cli, package: Path, use: tuple[str, ...]) -> None:
    ran = package.parent / "ran"
    with (package / "kernels" / "route.py").open("a") as file:
        file.write(f"\nopen({str(ran)!r}, 'w').close()\n")
    cli(use[0], package, *use[1:]).refused("M0504", "--allow-edited")
    assert cli(use[0], package, *use[1:], "--allow-edited").code == 0
    assert ran.exists()


def test_a_file_too_many_or_too_few(cli: Cli, package: Path) -> None:
    (package / "kernels" / "extra.py").write_text("")
    cli("verify", package).refused("M0504", "extra.py")
    (package / "kernels" / "extra.py").unlink()
    (package / "kernels" / "route.py").unlink()
    cli("verify", package).refused("M0504", "route.py", "missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 99, "files": {}}'])
def test_a_manifest_that_is_none(cli: Cli, package: Path, text: str) -> None:
    (package / "manifest.json").write_text(text)
    cli("run", package, "--ids", "1", "--weights", "random:0").refused("M0503", str(package))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"caches": 3}, "M0503"),
        ({"vocab": None}, "M0503"),
        ({"ignored": [["(", "x"]]}, "M0503"),
        ({"checkpoint": []}, "M0504"),
        ({"vocab": 9999}, "M0504"),
        ({"device": "cuda"}, "M0504"),
    ],
    ids=str,
)
def test_an_edited_manifest(cli: Cli, package: Path, change: dict[str, Any], code: str) -> None:
    manifest = json.loads((package / "manifest.json").read_text())
    (package / "manifest.json").write_text(json.dumps(manifest | change))
    cli("run", package, "--ids", "1", "--weights", "random:0").refused(code, str(package))


def test_no_package(cli: Cli, tmp_path: Path) -> None:
    for command in ("verify", "bench"):
        cli(command, tmp_path).refused("M0503", str(tmp_path), "manifest.json")
    cli("show", tmp_path, "--kernel", "route").refused("M0503", str(tmp_path))
    cli("show", tmp_path).refused("M0503", str(tmp_path), "no package and no config.json")


# Prompts.
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--ids", "1,256"), ("256", "place 1", "vocabulary of 256")),
        (("--ids", "-1"), ("-1", "vocabulary of 256")),
        (("--ids", ""), ("--ids",)),
        (("--ids", "1,two"), ("1,two",)),
        (("",), ("empty",)),
        (("--ids", ",".join(["1"] * 250), "-n", "7"), ("250 tokens", "256 positions")),
        (("--ids", "1", "-n", "256"), ("1 tokens", "256 positions")),
        (("--ids", "1", "-n", "-1"), ("max_new_tokens", "-1")),
        (("--ids", "1", "--temperature", "-1"), ("temperature",)),
        (("--ids", "1", "--top-p", "0"), ("top_p",)),
        (("--ids", "1", "--top-k", "-2"), ("top_k",)),
    ],
)
def test_a_prompt_that_can_not_be_continued(
    cli: Cli, built: Path, argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    cli("run", built, "--weights", "random:0", *argv).refused("M0601", *words)


def test_the_longest_prompt_and_the_last_id(cli: Cli, built: Path) -> None:
    ids = ",".join(["255"] * 250)
    assert cli("run", built, "--weights", "random:0", "--ids", ids, "-n", "6").code == 0


# In a process of their own, as a shell sees them.
@pytest.mark.parametrize(
    ("argv", "code", "start"),
    [
        (("build", "mixtral-8x8b", "-o", "{out}"), 1, "error[M0102]"),
        (("verify", "{out}"), 1, "error[M0503]"),
        (("build",), 2, "Usage: moec build"),
    ],
)
def test_in_a_process(out: Path, argv: tuple[str, ...], code: int, start: str) -> None:
    command = [sys.executable, "-m", "moec", *(a.format(out=out) for a in argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(start) and "Traceback" not in done.stderr
