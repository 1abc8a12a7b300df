"""The manifest's tensors: exactly those that the model reads and uses, in every scope."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
from hypothesis import given

import moec
from moec import models, passes
from moec.codegen.parameters import manifest_tensors
from moec.ir import Module
from moec.ir.op import Op
from moec.ir.ops.control import Loop
from moec.ir.ops.weights import Bind, Stack
from moec.ir.weights import WEIGHTS
from moec.runtime.checkpoint import expand
from tests.codegen.emission import agree
from tests.codegen.packages import TINY, fp8_tiny, moe_layer, tied_tiny
from tests.passes.modules import MoE, moe_blocks, random_weights, tokens

SPECS: dict[str, Callable[[], models.Model | models.Layer]] = {
    name: (lambda name=name: models.preset(name)) for name in TINY
} | {"fp8": fp8_tiny, "tied": tied_tiny, "layer": moe_layer}


def module(name: str, level: int) -> Module:
    found = models.lower(SPECS[name]())
    passes.PassManager(passes.pipeline(level)).run(found)
    return found


def reached(m: Module, entry: str) -> dict[str, list[int]]:
    """Names and shapes of the parameters that running ``entry`` touches, each loop unrolled."""
    found: dict[str, list[int]] = {}

    def walk(name: str, prefix: str) -> None:
        for op in m[name].ops:
            for value in op.operands:
                if value in m[name].params.values():
                    for full in members(op, value.name):
                        found[prefix + full] = list(value.type.shape)
            if isinstance(op, Loop):
                for number in op.range:
                    walk(op.callee, prefix + op.prefix(number))

    def members(op: Op, name: str) -> list[str]:
        return [name.replace("*", str(e)) for e in op.experts] if isinstance(op, Stack) else [name]

    if entry in m:
        walk(entry, "")
    return found


def bound(m: Module) -> set[str]:
    found = set()

    def walk(name: str, prefix: str) -> None:
        for op in m[name].ops:
            if isinstance(op, Bind):
                found.add(prefix + op.param)
            if isinstance(op, Loop):
                for number in op.range:
                    walk(op.callee, prefix + op.prefix(number))

    if WEIGHTS in m:
        walk(WEIGHTS, "")
    return found


def check(m: Module) -> None:
    tensors = manifest_tensors(m)
    listed = {key: {n: e for e in tensors[key] for n in expand(e)} for key in ("parameters", "checkpoint")}
    used = reached(m, "step") | reached(m, "head") | reached(m, "forward")
    made = bound(m)
    assert {n: e["shape"] for n, e in listed["parameters"].items()} == used
    assert {n for n, e in listed["parameters"].items() if e["bound"]} == used.keys() & made
    read = reached(m, WEIGHTS) | {n: shape for n, shape in used.items() if n not in made}
    assert {n: e["shape"] for n, e in listed["checkpoint"].items()} == read
    for entries in tensors.values():
        assert sum(len(list(expand(e))) for e in entries) == len({n for e in entries for n in expand(e)})


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("name", SPECS)
def test_patterns_name_what_the_model_reads_and_uses(name: str, level: int) -> None:
    check(module(name, level))


@pytest.mark.parametrize("name", ["deepseek-v3-tiny", "fp8", "mixtral-tiny"])
def test_views_are_what_takes_no_memory_of_its_own(name: str, tmp_path: Path) -> None:
    package = moec.build(SPECS[name](), target="cpu", out=tmp_path / "p", dtype="f32")
    model = moec.load(package, "random:0")
    own = [e for e in model.manifest["parameters"] if not e.get("view")]
    assert model.weights.nbytes == 4 * sum(prod(e["shape"]) * len(list(expand(e))) for e in own)
    views = {e["name"].rpartition(".")[2] for e in model.manifest["parameters"] if e.get("view")}
    assert views == (set() if name == "mixtral-tiny" else {"w_uk", "w_uv"})


@given(moe_blocks())
def test_patterns_of_any_block(block: MoE) -> None:
    m = block.build()
    check(m)
    passes.PassManager(passes.pipeline(2)).run(m)
    check(m)


def names(entries: list[dict], kind: str | None = None) -> set[str]:  # type: ignore[type-arg]
    return {n for e in entries for n in expand(e) if kind in (None, e["kind"])}


def test_the_checkpoint_of_a_model_does_not_depend_on_the_passes() -> None:
    for name in SPECS:
        naive, optimised = (manifest_tensors(module(name, level))["checkpoint"] for level in (0, 2))
        by_name = (
            {n: (e["kind"], e["dtype"], e["shape"]) for e in es for n in expand(e)}
            for es in (naive, optimised)
        )
        assert next(by_name) == next(by_name), name


def test_deepseek_v3_names_by_hand() -> None:
    found = names(manifest_tensors(module("deepseek-v3-tiny", 2))["checkpoint"])
    mla = (
        "q_a_proj",
        "q_a_layernorm",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_a_layernorm",
        "kv_b_proj",
        "o_proj",
    )
    mlp = ("gate_proj", "up_proj", "down_proj")
    want = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(3):
        at = f"model.layers.{layer}"
        want |= {f"{at}.self_attn.{n}.weight" for n in mla}
        want |= {f"{at}.input_layernorm.weight", f"{at}.post_attention_layernorm.weight"}
        if layer == 0:
            want |= {f"{at}.mlp.{n}.weight" for n in mlp}
            continue
        want |= {f"{at}.mlp.gate.weight", f"{at}.mlp.gate.e_score_correction_bias"}
        want |= {f"{at}.mlp.shared_experts.{n}.weight" for n in mlp}
        want |= {f"{at}.mlp.experts.{e}.{n}.weight" for e in range(12) for n in mlp}
    assert found == want


def test_fp8_weights_come_with_their_scales() -> None:
    entries = manifest_tensors(module("fp8", 2))["checkpoint"]
    scales, kinds = names(entries, "scale"), {n: e for e in entries for n in expand(e)}
    assert "model.layers.2.mlp.experts.11.up_proj.weight_scale_inv" in scales
    assert all(n.endswith(".weight_scale_inv") for n in scales)
    for scale in scales:
        stored = kinds[scale.removesuffix("_scale_inv")]
        assert stored["dtype"] == "f8e4m3"
        assert kinds[scale]["dtype"] == "f32"
        assert kinds[scale]["shape"] == [-(-stored["shape"][0] // 16), -(-stored["shape"][1] // 8)]
    plain = {n for n, e in kinds.items() if e["dtype"] != "f8e4m3"} - scales
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"} <= plain


def test_a_tied_model_reads_no_head() -> None:
    found = manifest_tensors(module("tied", 2))
    assert "lm_head.weight" not in names(found["checkpoint"]) | names(found["parameters"])
    assert "model.embed_tokens.weight" in names(found["checkpoint"])


def test_kinds_follow_the_use() -> None:
    entries = manifest_tensors(module("deepseek-v3-tiny", 0))["checkpoint"]
    kinds = {n: e["kind"] for e in entries for n in expand(e)}
    assert kinds["model.norm.weight"] == kinds["model.layers.0.self_attn.kv_a_layernorm.weight"] == "norm"
    assert kinds["model.layers.1.mlp.gate.e_score_correction_bias"] == "bias"
    assert kinds["model.layers.1.mlp.gate.weight"] == kinds["lm_head.weight"] == "matrix"


@pytest.mark.parametrize("name", SPECS)
def test_passes_change_neither_what_is_read_nor_its_kind(name: str) -> None:
    """A seed draws the same checkpoint for every pipeline and target."""
    naive = models.lower(SPECS[name]())
    wanted = {n: e["kind"] for e in manifest_tensors(naive)["checkpoint"] for n in expand(e)}
    passes.PassManager(passes.pipeline(3, "sm_90a")).run(naive)
    assert wanted == {n: e["kind"] for e in manifest_tensors(naive)["checkpoint"] for n in expand(e)}


@given(moe_blocks())
def test_the_load_program_makes_what_the_interpreter_makes(block: MoE) -> None:
    m = block.build()
    weights = random_weights(m)
    passes.PassManager(passes.pipeline(2)).run(m)
    agree(m, weights, [tokens(4, block.hidden)], tolerance=1e-4)
