"""Native fp8 checkpoints: their bytes and scales reach the products, however they are joined and cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moec.errors import ToleranceExceeded
from moec.ir import Interpreter, Module, Op, parse_module, print_module
from moec.models import lower, preset
from moec.models.quantization import BlockFP8
from moec.passes import Oracle, parse_pipeline, pipeline
from moec.passes.manager import PassManager
from tests.passes.fp8_layer import CUT, GROUP, bound, same_bits
from tests.passes.modules import (
    MoE,
    random_weights,
    reasons,
    run,
    tokens,
)


def test_a_native_checkpoint_s_bytes_and_scales_reach_the_products() -> None:
    """Stacked, gate and up joined: 8 rows each, in blocks of 4."""
    m = MoE(fp8=True, hidden=8, inner=8, dtype="bf16").build()
    weights = random_weights(m)
    runs = run(f"{GROUP},fp8-cast", m)
    found = bound(m, weights)
    assert set(found) == {"experts.w13.q", "experts.w2.q"} or len(found) == 2
    assert "quant(" not in "".join(print_module(m).split("func @weights")[1:])
    names = MoE().names
    w13 = next(v for n, v in found.items() if "w13" in n)
    w2 = next(v for n, v in found.items() if "w2" in n)
    where = next(n for n in weights if n.endswith(f"0.{names[0]}.weight")).split(f"0.{names[0]}")[0]
    for e in range(4):
        gate, up, down = (weights[f"{where}{e}.{n}.weight"] for n in names)
        s_gate, s_up, s_down = (weights[f"{where}{e}.{n}.weight_scale_inv"] for n in names)
        assert same_bits(w13.q[e], torch.cat([gate, up])) and torch.equal(
            w13.scale[e], torch.cat([s_gate, s_up])
        )
        assert same_bits(w2.q[e], down) and torch.equal(w2.scale[e], s_down)
    assert w13.block == w2.block == (4, 4) and runs[-1].fired == {"experts": 2, "gather": 1}


def test_where_a_join_straddles_blocks_scales_are_refined() -> None:
    """6 rows in blocks of 4: 4 and 2, so scales for 2 rows each."""
    m = MoE(fp8=True, hidden=8, inner=6, dtype="bf16").build()
    weights = random_weights(m)
    exact = m.clone()
    run(GROUP, exact)
    run(f"{GROUP},fp8-cast", m)
    w13 = next(v for n, v in bound(m, weights).items() if "w13" in n)
    assert w13.block == (2, 4)
    plain = next(v for n, v in Interpreter(exact, weights)._bound.items() if "w13" in n)
    assert torch.equal(w13.float().bfloat16(), plain)  # type: ignore[arg-type]


def test_cuts_and_views_of_native_weights_are_exact() -> None:
    m = parse_module(CUT)
    weights = random_weights(m)
    weights["kv.weight_scale_inv"] = weights["kv.weight_scale_inv"].abs() + 0.1
    plain = Interpreter(m, weights)._bound
    runs = run("fp8-cast", m)
    found = bound(m, weights)
    assert {n: v.block for n, v in found.items()} == {"a.q": (2, 4), "b.q": (2, 4)}
    for name in ("a", "b"):
        assert torch.equal(found[f"{name}.q"].float(), plain[name])  # type: ignore[arg-type]
    assert "the checkpoint, else in fp8, stores $c plainly" in reasons(runs, "linear")
    run("fp8-cast{plain=cast}", other := parse_module(CUT))
    assert set(bound(other, weights)) == {"a.q", "b.q", "c.q"}


def test_a_plain_part_beside_a_native_one_is_quantised_in_its_blocks() -> None:
    text = CUT.replace(
        "bind(%a) {param=a}", "%mixed = concat(%a, $c.plain) {axis=0} : f32[12,8]\n  bind(%mixed) {param=a}"
    )
    text = text.replace("param $a: f32[6,8]", "param $a: f32[12,8]").replace(
        "%ya = linear(%x, $a) : f32[N,6]", "%ya = linear(%x, $a) : f32[N,12]"
    )
    text = text.replace("-> (f32[N,6],", "-> (f32[N,12],")
    m = parse_module(text)
    assert "the checkpoint, else in fp8, stores $a in part plainly" in reasons(run("fp8-cast", m), "linear")
    m = parse_module(text)
    weights = random_weights(m)
    plain = Interpreter(m, weights)._bound["a"]
    run("fp8-cast{plain=cast}", m)
    a = bound(m, weights)["a.q"]
    assert a.block == (2, 4) and torch.equal(a.float()[:6], plain[:6])  # type: ignore[index]
    assert 0 < float((a.float()[6:] - plain[6:]).abs().max()) < 0.2  # type: ignore[index]


def test_the_oracle_catches_a_transposed_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A native weight whose scales are read in the wrong order; and sound passes aren't caught."""
    text = (
        CUT.replace("f8e4m3[12,8]", "f8e4m3[8,8]").replace("f32[3,2]", "f32[2,2]").replace("[12,8]", "[8,8]")
    )
    text = (
        text.replace("[2,6,8]", "[2,4,8]")
        .replace("[1,6,8]", "[1,4,8]")
        .replace("[6,8]", "[4,8]")
        .replace("N,6]", "N,4]")
    )

    def caught(m: Module) -> bool:
        weights = random_weights(m)
        weights["kv.weight_scale_inv"] = torch.tensor([[1.0, 30.0], [2.0, 0.1]])
        oracle = Oracle({"forward": (tokens(4, 8),)}, weights, tolerance=0.1)
        try:
            PassManager(parse_pipeline("fp8-cast{block=4}"), [oracle]).run(m)
        except ToleranceExceeded:
            return True
        return False

    assert not caught(parse_module(text))

    from moec.passes import fp8_weights

    sound = fp8_weights._stored

    def transposed(value: Any) -> Any:
        pair = sound(value)
        function = transposed.function  # type: ignore[attr-defined]
        made: Op = pair.op
        flipped = fp8_weights.emit(*function, "reshape", [made.operands[1]], {"shape": (4,)}, "s").results[0]
        one, two, three, four = fp8_weights.emit(
            *function, "split", [flipped], {"sizes": (1, 1, 1, 1), "axis": 0}, "p"
        ).results
        turned = fp8_weights.emit(*function, "concat", [one, three, two, four], {"axis": 0}, "t").results[0]
        square = fp8_weights.emit(*function, "reshape", [turned], {"shape": (2, 2)}, "u").results[0]
        return fp8_weights.emit(
            *function, "scaled", [made.operands[0], square], {"block": (4, 4)}, "v"
        ).results[0]

    class Planted(fp8_weights.Quantiser):
        def scaled(self, value: Any) -> Any:
            transposed.function = (self.module, self.holder)  # type: ignore[attr-defined]
            return super().scaled(value)

    monkeypatch.setattr(fp8_weights, "_stored", transposed)
    monkeypatch.setattr("moec.passes.fp8_cast.Quantiser", Planted)
    assert caught(parse_module(text))


@pytest.mark.parametrize("block", [(8, 8), (4, 8), (11, 8), (128, 128)])
def test_w_uk_and_w_uv_keep_a_native_kv_b_proj_s_bytes(block: tuple[int, int]) -> None:
    """Heads of 10 + 12 rows straddle the blocks: scales for one or two rows each."""
    spec = replace(preset("deepseek-v3-tiny"), quantization=BlockFP8(block=block))
    m = lower(spec)
    weights = random_weights(m)
    plain = m.clone()
    run("canonicalise,mla-absorb", plain)
    run("canonicalise,mla-absorb,fp8-cast{ops=[linear,grouped_linear,head_linear]}", m)
    found, wide = bound(m, weights), Interpreter(plain, weights)._bound
    attention = "model.layers.1.self_attn.kv_b_proj"
    q, scale = weights[f"{attention}.weight"], weights[f"{attention}.weight_scale_inv"]
    rows = {8: 2, 4: 2, 11: 1, 128: 2}[block[0]]  # 11 divides a head, but not where it is cut
    by_row = scale.repeat_interleave(block[0], 0)[:66].view(3, 22, -1)
    for name, first, last in (("w_uk", 0, 10), ("w_uv", 10, 22)):
        got = found[f"{attention}.{name}.q"]
        assert same_bits(got.q, q.view(3, 22, 24)[:, first:last])
        assert got.block == (rows, block[1])
        assert torch.equal(got.scale, by_row[:, first:last:rows])
        assert torch.equal(got.float(), wide[f"{attention}.{name}"])  # type: ignore[arg-type]
    assert not any(n.endswith(("w_uk", "w_uv")) for n in found)


def test_weights_of_heads_are_cast_only_where_the_recipe_names_them() -> None:
    m = lower(replace(preset("deepseek-v3-tiny"), quantization=BlockFP8(block=(8, 8))))
    run("canonicalise,mla-absorb,fp8-cast", m)
    text = print_module(m)
    assert "kv_b_proj.w_uk)" in text and "w_uk.q" not in text


POWERS = CUT.replace("{block=4x4}", "{block=4x4, scale_fmt=ue8m0}")


def quants(m: Module) -> dict[str, str]:
    """The format of the scales of what each product multiplies, by the product's name."""
    return {op.results[0].text: op.operands[0].op.attrs["scale"] for op in m["forward"].ops_named("linear")}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "options", "formats"),
    [
        (CUT, "plain=cast", ("fp32", "fp32", "fp32")),
        (POWERS, "plain=cast", ("ue8m0", "ue8m0", "ue8m0")),  # a plain weight as the checkpoint's others
        (POWERS, "plain=cast,scale=fp32", ("fp32", "fp32", "fp32")),
        (CUT, "plain=cast,scale=ue8m0", ("ue8m0", "ue8m0", "ue8m0")),
        (CUT, "plain=cast,recipe=deepseek-v3.1", ("ue8m0", "ue8m0", "ue8m0")),
        (POWERS, "plain=cast,block=4,recipe=per-row", ("ue8m0", "ue8m0", "ue8m0")),
    ],
)
def test_a_checkpoint_s_scales_decide_for_what_they_multiply(
    text: str, options: str, formats: tuple[str, ...]
) -> None:
    m = parse_module(text)
    run(f"fp8-cast{{{options}}}", m)
    assert quants(m) == dict(zip(("%ya", "%yb", "%yc"), formats, strict=True))
    made = {op.attrs["scale"] for op in m["weights"].ops_named("quant")}
    assert made == {formats[2]}


def test_two_formats_in_one_checkpoint() -> None:
    """Each product by its own weight; where one is made of both, or of none of them, fp32."""
    text = POWERS.replace("$c.plain: f32[6,8]", "$c.w: f8e4m3[6,8]\n  param $c.s: f32[2,2]").replace(
        "bind($c.plain)",
        "%c.q = scaled($c.w, $c.s) {block=4x4} : f8e4m3[6,8]@s4x4\n"
        "  %c = dequant(%c.q) {to=f32} : f32[6,8]\n  bind(%c)",
    )
    m = parse_module(text)
    run("fp8-cast", m)
    assert quants(m) == {"%ya": "ue8m0", "%yb": "ue8m0", "%yc": "fp32"}
    joined = "%b = concat(%b.0, %c) {axis=0} : f32[12,8]\n  bind(%b)"
    text = text.replace("  %b = reshape", "  %b.0 = reshape").replace("  bind(%b) {param=b}\n", "")
    text = text.replace("  bind(%c) {param=c}", f"  bind(%c) {{param=c}}\n  {joined} {{param=b}}")
    text = text.replace("param $b: f32[6,8]", "param $b: f32[12,8]")
    text = text.replace("%yb = linear(%x, $b) : f32[N,6]", "%yb = linear(%x, $b) : f32[N,12]")
    m = parse_module(text.replace("-> (f32[N,6], f32[N,6],", "-> (f32[N,6], f32[N,12],"))
    run("fp8-cast", m)
    assert quants(m) == {"%ya": "ue8m0", "%yb": "fp32", "%yc": "fp32"}


@pytest.mark.parametrize("scale_fmt", ["fp32", "ue8m0"])
@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
def test_every_quantisation_of_a_model_is_as_its_checkpoint_says(target: str, scale_fmt: str) -> None:
    """Behind norms and in the products' epilogues too; and it computes what the interpreter says."""
    spec = replace(preset("deepseek-v3-tiny"), quantization=BlockFP8((8, 8), scale_fmt=scale_fmt))
    m = lower(spec)
    m.target = target
    PassManager(pipeline(2, target, fp8="block=8")).run(m)
    found = {
        (op.name, op.attrs["scale"])
        for f in m
        for op in f.ops
        if op.name == "quant" or op.attrs.get("quant") is not None
    }
    assert {format for _, format in found} == {scale_fmt}
    fused = {"add_rms_norm", "rms_norm", "gather_grouped_linear"} if target == "sm_90a" else set()
    assert fused | {"quant"} <= {name for name, _ in found}
