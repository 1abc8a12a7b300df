"""The verifier finds what is wrong with a package: a mistake planted in each kernel in turn."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec import models
from moec.check import CHUNK, FEW, SQNR, TOLERANCE, Comparison, token_errors, verify_package
from moec.errors import BadOption
from moec.pass_errors import pass_errors
from moec.runtime.manifest import seal

from .conftest import Cli

# Kernel, what is there, what a careless edit might make of it.
MISTAKES = [
    ("route", "choice = scores + bias", "choice = scores + 0"),
    ("route", "weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)", "pass"),
    ("route", "weights = weights * 2.5", "pass"),
    ("route", ".topk(2, dim=-1).values.sum(-1)", ".amax(-1)"),
    ("route", ".masked_fill(hidden[..., None], -torch.inf)", ""),
    ("route", "scores.gather(1, ids)", "choice.gather(1, ids)"),
    ("rope", "torch.complex(cos, sin)", "torch.complex(cos, -sin)"),
    ("rope", "unflatten(-1, (-1, 2))", "unflatten(-1, (2, -1)).mT.contiguous()"),
    ("rope_table", "positions.to(", "(2 * positions).to("),
    ("rope_table", "angle.cos() * 0.9634746568860826", "angle.cos()"),
    ("linear", "F.pad(x, (0, 0)", "F.pad(x.flip(0), (0, 0)"),
    ("swiglu", "F.silu(gate).mul_(up)", "F.silu(up).mul_(gate)"),
    ("sort_by_expert", "return slot.to(", "return slot.flip(0).to("),
    ("grouped_linear", "w[expert])", "w[expert - 1])"),
    ("combine", "by_slot[slot] = rows", "by_slot = rows.clone()"),
    ("combine", "torch.baddbmm(plus.unsqueeze(1), w, by_slot)", "torch.bmm(w, by_slot)"),
    ("cache_write", "[slot_mapping.clamp(min=-1)]", "[slot_mapping.clamp(max=63)]"),
    ("cache_read", "(length + 63) // 64", "1 + length // 64 * 0"),
    ("cache_read", "pages[table[", "pages[table.sort(descending=True).values["),
    ("latent_attention", "(length + 63) // 64", "1 + length // 64 * 0"),
    ("latent_attention", "mask = torch.ones(", "mask = 0 * torch.ones("),
    ("latent_attention", ".tril(keys - queries)", ".tril()"),
    ("latent_attention", "[first:end]", "[first : end - 1]"),
    ("latent_attention", "out[q0] = attended[0, 0, :, :24]", "out[q0] = attended[0, 0, :, 8:]"),
    ("latent_attention", "out[q0:q1] = attended[0, :, :, :24]", "out[q0:q1] = attended[0, :, :, 8:]"),
    ("latent_attention", "value, scale=0.30558255774919335", "value, scale=0.25"),
    ("attention", "mask = torch.ones(", "mask = 0 * torch.ones("),
    ("attention", ".tril(keys - queries)", ".tril()"),
    ("attention", "is_causal=queries == keys", "is_causal=False"),
    ("split_batch", "seq_lens[chosen]", "seq_lens[: int(chosen.sum())]"),
    ("split_batch", "block_table[chosen]", "block_table[: int(chosen.sum())]"),
    ("merge_rows", "y[a_rows], y[b_rows] = a, b", "y[: len(a)], y[len(a) :] = a, b"),
    ("take_rows", "else x[rows]", "else x[: len(rows)]"),
]


def plant(package: Path, name: str, old: str, new: str) -> None:
    """Replaces a part of a generated file, and makes the manifest agree with it."""
    file = package / name
    source = file.read_text()
    assert old in source, f"{name} no longer says {old!r}: plant the mistake anew"
    file.write_text(source.replace(old, new))
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (package / "manifest.json").write_text(json.dumps(seal(manifest)))


# The same in a model whose keys and values are cached as they are.
ATTENTION_MISTAKES = [
    ("mask = torch.ones(", "mask = 0 * torch.ones("),
    (".tril(keys - queries)", ".tril()"),
    ("is_causal=queries == keys", "is_causal=False"),
    ("scores = torch.bmm(query, ", "scores = torch.bmm(query.flip(0), "),
    ("            scale=", "            scale=0.5 * "),
]


@pytest.mark.parametrize(("kernel", "old", "new"), MISTAKES)
def test_a_planted_mistake_is_found(package: Path, kernel: str, old: str, new: str) -> None:
    plant(package, f"kernels/{kernel}.py", old, new)
    try:
        verdict = verify_package(package, "random:0", decode=1)
    except (RuntimeError, IndexError):
        return  # so wrong that it can't run
    assert not verdict.ok


@pytest.fixture(scope="module")
def grouped_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose query heads share key heads; not to be changed."""
    return moec.build("llama-tiny", out=tmp_path_factory.mktemp("gqa") / "tiny", dtype="f32").path


@pytest.mark.parametrize(("old", "new"), ATTENTION_MISTAKES)
def test_a_mistake_in_plain_attention_is_found(
    grouped_heads: Path, tmp_path: Path, old: str, new: str
) -> None:
    package = Path(shutil.copytree(grouped_heads, tmp_path / "package"))
    plant(package, "kernels/paged_attention.py", old, new)
    try:
        verdict = verify_package(package, "random:0", decode=1)
    except (RuntimeError, IndexError):
        return  # so wrong that it can't run
    assert not verdict.ok


@pytest.mark.parametrize("entry", ["decode", "step"])
def test_a_mistake_in_one_entry_s_layer_is_found_there(package: Path, entry: str) -> None:
    """Layers are compared in both; later ones read what a wrong one has left in the cache."""
    name = "decode_layer_moe" if entry == "decode" else "layer_moe"
    text = (package / "model.py").read_text()
    body = text[text.index(f"def {name}(") :].partition("\n\n\n")[0]
    (last,) = re.findall(r"x_mlp = x_attn \+ mlp", body)
    plant(package, "model.py", body, body.replace(last, "x_mlp = x_attn - mlp"))
    verdict = verify_package(package, "random:0", decode=1, prompts=[[1] * 9, [2, 3]])
    wrong = [r.value for r in verdict.rows if not r.ok and r.value.endswith("layers.1")]
    labels = ["decode 1"] if entry == "decode" else ["prefill", "mixed", "decode 1 by @step"]
    assert wrong == [f"{label}: model.layers.1" for label in labels]


def test_a_mistake_in_the_weights_is_found(package: Path) -> None:
    plant(
        package,
        "weights.py",
        "torch.cat([gate_proj, up_proj], dim=1)",
        "torch.cat([up_proj, gate_proj], dim=1)",
    )
    verdict = verify_package(package, "random:0", decode=0)
    assert not verdict.ok
    wrong = [r.value for r in verdict.rows if not r.ok]
    assert "prefill: model.layers.0" not in wrong, "the first layer has no experts"
    assert wrong[0] == "prefill: model.layers.1"


def test_a_package_without_mistakes(built: Path, pristine: Path) -> None:
    for weights in ("random:0", "random:7", str(pristine)):
        verdict = verify_package(built, weights, decode=2)
        assert verdict.ok
        assert verdict.same_tokens == verdict.tokens == 3 * 6
        assert [r.value.removesuffix(": logits") for r in verdict.rows if r.value.endswith("logits")] == [
            "prefill", "mixed", "decode 1", "decode 1 by @step", "decode 2", "decode 2 by @step",
        ]  # fmt: skip
        assert 0 < max(r.worst for r in verdict.rows) < 1e-5


def test_the_prompts_cross_a_page(built: Path) -> None:
    (first, *_) = verify_package(built, "random:0", decode=0).rows
    assert first.shape[0] > 64


def test_sixteen_bits_are_judged_by_the_worst_token(tmp_path: Path) -> None:
    """With the package's routing in both references, and against the naive IR by SQNR."""
    package = moec.build("mixtral-tiny", out=tmp_path / "package", dtype="bf16").path
    verdict = verify_package(package, "random:0", decode=1)
    assert (verdict.ok, verdict.judged, verdict.exact) == (True, "worst", False)
    assert verdict.tolerance == TOLERANCE["bf16"] and 0 < verdict.flipped < 0.06 * verdict.routed
    assert all(row.sqnr is not None and row.sqnr >= SQNR["bf16"][0] for row in verdict.rows)
    plant(package, "kernels/rope.py", "- b * sin", "+ b * sin")
    assert not verify_package(package, "random:0", decode=1).ok


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package in bf16; not to be changed."""
    return moec.build("deepseek-v3-tiny", out=tmp_path_factory.mktemp("half") / "tiny", dtype="bf16").path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("choice = scores + bias", "choice = scores + 0"),
        ("weights = weights * 2.5", "pass"),
        (".topk(2, dim=-1).values.sum(-1)", ".amin(-1)"),
        (".masked_fill(hidden[..., None], -torch.inf)", ""),
        ("scores.gather(1, ids)", "choice.gather(1, ids)"),
    ],
)
def test_injected_routing_hides_no_mistake_of_the_router(
    half: Path, tmp_path: Path, old: str, new: str
) -> None:
    """Choices that rounding doesn't explain are wrong; weights are compared where the choice is the same."""
    package = Path(shutil.copytree(half, tmp_path / "package"))
    plant(package, "kernels/route.py", old, new)
    assert not verify_package(package, "random:0", decode=0).ok


def test_verify_in_sixteen_bits_says_how_many_choices_flipped(cli: Cli, half: Path) -> None:
    done = cli("verify", half, "--decode", 1)
    assert done.code == 0
    assert "SQNR to naive" in done.out and re.search(r" \d\d dB +ok", done.out)
    said = done.out.splitlines()[-1]
    assert re.fullmatch(r"equal within 4e-02; \d+ of \d+ .*; \d+ of \d+ choices of experts flipped", said)
    said = cli("verify", half, "--decode", 0, "--json").json()
    assert (said["ok"], said["wrong"], said["exact"]) == (True, 0, False)


# --passes
def test_the_error_that_each_pass_brought(cli: Cli, built: Path, half: Path) -> None:
    rows = pass_errors(built)
    outputs = {(r.number, r.value): r for r in rows if r.output}
    grouped = outputs[2, "step.0"]
    assert grouped.error < 1e-6 and grouped.sqnr > 120, "exact but for the order of sums"
    outputs = {(r.number, r.value): r for r in pass_errors(half) if r.output}
    absorbed = next(r for (_, value), r in outputs.items() if r.passed == "mla-absorb" and value == "step.0")
    assert 1e-3 < absorbed.error < 5e-2 and 25 < absorbed.sqnr < 60, "absorbing rounds elsewhere"
    selected = next(r for (_, value), r in outputs.items() if r.passed == "select" and value == "step.0")
    assert selected.error == 0.0 and selected.sqnr == math.inf, "select computes nothing"
    rows = pass_errors(half)
    inner = [r for r in rows if r.value == "layer.moe@model.layers.2.:%mlp" and r.passed == "mla-absorb"]
    assert inner and inner[0].error > 0
    done = cli("verify", half, "--passes", "--top", 3)
    lines = done.out.splitlines()
    assert done.code == 0 and lines[1].split()[:2] == ["pass", "value"] and "mla-absorb" in lines[3]
    said = cli("verify", half, "--passes", "--json").json()
    assert len(said) == len(rows) and {r["pass"] for r in said} >= {"expert-grouping", "select"}


def test_an_edited_dump_shows_where_it_goes_wrong(built: Path, tmp_path: Path) -> None:
    """The pass after which a value differs is the one that was edited."""
    dump = next((built / "ir").glob("*_mla-absorb.moec"))
    edited = tmp_path / dump.name
    edited.write_text(dump.read_text().replace("scale=2.5", "scale=1.5"))
    options = moec.BuildOptions(resume=str(edited))
    package = moec.build("deepseek-v3-tiny", out=tmp_path / "x", dtype="f32", options=options).path
    worst = max(pass_errors(package), key=lambda r: r.error)
    assert worst.passed == "resumed" and worst.error > 1e-2


def test_verify_prints_a_table(cli: Cli, built: Path, pristine: Path) -> None:
    for weights in ("random:3", pristine):
        done = cli("verify", built, "--weights", weights, "--decode", 1)
        assert (done.code, done.err) == (0, "")
        lines = done.out.splitlines()
        assert lines[1].split() == ["value", "prefill", "mixed", "decode", "decode", "by", "@step"]
        assert [line.split()[0] for line in lines[3:-1]] == [
            *(f"model.layers.{n}" for n in range(3)),
            "logits",
        ]
        assert all(re.fullmatch(r"\S+( +\d\.\de-\d\d){4} +ok", line) for line in lines[3:-1])
        assert lines[-1] == "equal within 1e-04; 12 of 12 greedy tokens the same"


def test_verify_says_where_a_broken_package_differs_first(cli: Cli, package: Path) -> None:
    plant(package, "kernels/route.py", "weights = weights * 2.5", "pass")
    done = cli("verify", package, "--decode", 0)
    assert (done.code, done.err) == (1, "")
    assert "DIFFERS" in done.out
    assert done.out.splitlines()[-1].startswith(
        "DIFFERENT: more than 1e-04, first in prefill: model.layers.1; "
    )
    said = cli("verify", package, "--decode", 0, "--json")
    assert (said.code, said.json()["ok"]) == (1, False)
    assert cli("verify", package, "--decode", 0, "--tolerance", "1e9", "--json").json()["rows"][0]["ok"]


def test_verify_of_a_layer(cli: Cli, layer_package: Path) -> None:
    done = cli("verify", layer_package, "--json")
    found = [(row["value"], row["shape"], row["ok"]) for row in done.json()["rows"]]
    assert (done.code, found) == (0, [("first step: y", [24, 32], True), ("second step: y", [25, 32], True)])


def test_verify_of_a_layer_with_a_cache(cli: Cli, tmp_path: Path) -> None:
    spec = models.Layer(models.GQA(heads=2, kv_heads=1, head_dim=4), hidden=32, dtype="f32", page=4)
    built = moec.build(spec, out=tmp_path / "x")
    assert cli("verify", built.path).code == 0
    plant(built.path, "kernels/paged_attention.py", "[first:end]", "[first:end].roll(1, 0)")
    assert cli("verify", built.path).code == 1


@pytest.mark.parametrize(
    "option", [{"tokens": 0}, {"decode": -1}, {"seed": -1}, {"tolerance": 0.0}, {"tokens": 256}]
)
def test_options_out_of_range(built: Path, option: dict[str, int]) -> None:
    with pytest.raises(BadOption, match=r"256" if option == {"tokens": 256} else f"{next(iter(option))} is"):
        verify_package(built, "random:0", **option)  # type: ignore[arg-type]


def test_token_errors() -> None:
    a = torch.tensor([[1.0, -4.0], [0.0, 2.0]])
    assert token_errors(a, a + torch.tensor([[0.0, 1.0], [0.5, 0.0]])).tolist() == [0.25, 0.125]
    assert token_errors(a, a[:1]).isinf().all()
    assert token_errors(a, torch.full_like(a, torch.nan)).isinf().all()
    assert token_errors(torch.full_like(a, torch.nan), torch.full_like(a, torch.nan)).isinf().all()
    assert token_errors(torch.zeros(0, 3), torch.zeros(0, 3)).numel() == 0


@pytest.mark.parametrize("judged", ["worst", "median"])
def test_one_token_that_is_no_number(judged: str) -> None:
    value = torch.ones(9, 2)
    value[4, 1] = torch.nan
    compare = Comparison(0.1, judged)
    compare.add("y", value, value.clone())
    assert not compare.verdict().ok and compare.rows[0].nan


def test_not_a_number_on_both_sides_is_no_agreement(cli: Cli, built: Path, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.input_layernorm.weight"].fill_(torch.nan)
    save_file(tensors, file)
    done = cli("verify", built, "--weights", checkpoint, "--decode", 0)
    assert done.code == 1
    where = "first in prefill: model.layers.1"
    assert done.out.splitlines()[-1].startswith(f"DIFFERENT: the reference is not a number, {where}; ")
    said = cli("verify", built, "--weights", checkpoint, "--decode", 0, "--json")
    rows = json.loads(said.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["rows"]
    assert [(row["nan"], row["ok"]) for row in rows][:2] == [(False, True), (True, False)]


@pytest.mark.parametrize("positions", [2, 3, 7, 20])
def test_a_model_of_few_positions(cli: Cli, tmp_path: Path, positions: int) -> None:
    spec = replace(models.resolve("mixtral-tiny"), max_positions=positions)
    package = moec.build(spec, out=tmp_path / "short", dtype="f32").path
    assert cli("verify", package).code == 0
    bench = cli("bench", package, "--repeats", 1, "--json").json()
    assert bench["prefill_tokens"] + bench["decode_steps"] <= positions
    assert cli("bench", package, "--repeats", 1, "--prefill", positions - 1).code == 0
    assert cli("verify", package, "--tokens", positions - 1).code == 0
    assert cli("verify", package, "--tokens", positions, "--decode", 1).code == 1


def test_what_is_not_given_is_as_long_as_ever_where_it_fits(built: Path) -> None:
    verdict = verify_package(built, "random:0")
    (mixed,) = (row for row in verdict.rows if row.value == "mixed: model.layers.0")
    assert mixed.shape[0] == 3 + CHUNK + FEW
    assert (
        sum(row.value.endswith("logits") for row in verdict.rows) == 2 + 2 * 4
    )  # decode steps by @step, too
