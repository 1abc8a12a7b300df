"""fp8-cast: what becomes of products, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moec.errors import BadOption
from moec.ir import parse_module, print_module
from moec.models import lower, preset
from moec.models.families import FAMILIES
from moec.passes import pipeline
from moec.passes.fp8_cast import GATHER
from moec.passes.manager import PassManager
from moec.passes.permute_fusion import QUANT
from tests.passes.fp8_layer import GROUP, LAYER, layer
from tests.passes.modules import (
    MoE,
    func,
    golden_text,
    module,
    op_names,
    reasons,
    replaced,
    run,
)


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = layer()
    golden("fp8_cast.before.moec", golden_text(m))
    run("fp8-cast", m)
    golden("fp8_cast.after.moec", golden_text(m))


def test_golden_native(golden: Callable[[str, str], None]) -> None:
    m = MoE(fp8=True, shared=True, dtype="bf16").build()
    run(f"{GROUP},fp8-cast", m)
    golden("fp8_cast_native.after.moec", golden_text(m))


def test_golden_epilogue(golden: Callable[[str, str], None]) -> None:
    m = layer()
    run("fp8-cast,permute-fusion", m)
    golden("permute_fusion_fp8.after.moec", golden_text(m))


def test_products_of_one_x_share_its_quant_and_rows_are_quantised_before_they_are_gathered() -> None:
    m = layer()
    runs = run("fp8-cast", m)
    quants = [op for op in m["forward"].ops if op.name == "quant"]
    assert [op.operands[0].text for op in quants] == ["%n", "%h", "%e"]  # type: ignore[union-attr]
    users = {op.name for op in m["forward"].users(quants[0].results[0])}
    assert users == {"linear", "gather_rows"}
    assert runs[-1].fired == {"linear": 3, "experts": 2, "gather": 1}
    assert not {"$up.weight", "$experts.w13"} & {p.text for p in m["forward"].params.values()}


def test_what_stays_as_it_is() -> None:
    m = layer()
    runs = run("fp8-cast", m)
    found = reasons(runs, "linear")
    assert "%g is one column, a gate" in found and "%logits are a router's scores" in found
    kept = {p.name for p in m["forward"].params.values() if not p.type.scale}  # type: ignore[union-attr]
    assert kept == {"norm.weight", "own_gate.weight", "router.weight"}
    head = module(
        func(
            "@head(%h: f32[B,8]) -> f32[B,9]",
            "param $lm_head.weight: f32[9,8]",
            "%y = linear(%h, $lm_head.weight) : f32[B,9]",
            "return %y",
        )
    )
    runs = run("fp8-cast", head)
    assert not runs[-1].changed and reasons(runs, "linear", "head") == ["the head stays as it is"]


def test_scores_that_are_cast_are_a_router_s_all_the_same() -> None:
    m = layer(("%w, %id = route(%logits)", "%l = cast(%logits) {to=f32} : f32[N,4]\n  %w, %id = route(%l)"))
    assert "%l are a router's scores" in reasons(run("fp8-cast", m), "linear")


@pytest.mark.parametrize(
    ("edits", "rule", "reason"),
    [
        (
            [
                (
                    "%gate = linear(%n, $gate.weight) : f32[N,48]",
                    "%v = add($gate.weight, $gate.weight) : f32[48,40]\n  %gate = linear(%n, %v) : f32[N,48]",
                )
            ],
            "linear",
            "%v is no parameter",
        ),
        ([("f32", "f64")], "linear", "%n is f64, none of f32, bf16, f16"),
        ([("f32", "f64")], "experts", "%xp is f64, none of f32, bf16, f16"),
    ],
)
def test_near_misses(edits: list[tuple[str, str]], rule: str, reason: str) -> None:
    text = replaced(*edits)(LAYER).replace("f64[N,2], i32", "f32[N,2], i32")
    runs = run("fp8-cast", parse_module(text))
    assert reason in reasons(runs, rule)


def test_a_gather_whose_rows_others_read_stays() -> None:
    m = layer(
        ("  %e = swiglu", "  %also = add(%xp, %xp) : f32[2*N~4,40]\n  %e = swiglu"),
        ("-> f32[N,40] target", "-> (f32[N,40], f32[2*N~4,40]) target"),
        ("return %y", "return %y, %also"),
    )
    runs = run("fp8-cast", m)
    assert any("used more than once" in r for r in reasons(runs, "gather"))
    fused = layer()
    run("permute-fusion", fused)
    assert run("fp8-cast", fused)[-1].fired["gathered"] == 1


@pytest.mark.parametrize("activations", ["1x*", "*x*"])
def test_a_scale_that_is_known_late_is_no_epilogue(activations: str) -> None:
    m = layer()
    runs = run(f"fp8-cast{{activations={activations}}},permute-fusion", m)
    assert "quant" not in runs[-1].fired
    assert any("known after" in reason for reason in reasons(runs, "quant"))
    run("fp8-cast,permute-fusion", other := layer())
    assert op_names(other).count("quant") == 2 and "gather_rows" not in op_names(other)


def test_a_head_that_is_a_layer_of_its_own_is_cast() -> None:
    """Functions called @head are the model's; names play no part elsewhere."""
    m = parse_module(LAYER.replace("@forward", "@lm_head"))
    assert run("fp8-cast", m)[-1].changed


def test_a_target_without_fp8_units_keeps_its_products() -> None:
    m = layer(("target=cpu", "target=sm_80"))
    before = print_module(m)
    runs = run("fp8-cast", m)
    assert not runs[-1].changed and print_module(m) == before
    assert set(reasons(runs, "linear")) == {"sm_80 (A100 80GB SXM) multiplies no fp8"}
    for target in ("sm_89", "sm_90a", "sm_100a", "sm_120a", "cpu"):
        assert run("fp8-cast", layer(("target=cpu", f"target={target}")))[-1].changed


@pytest.mark.parametrize("tiny", sorted({family.tiny for family in FAMILIES.values()}))
def test_pipelines_of_whole_models(tiny: str) -> None:
    for level, target in ((0, "cpu"), (1, "cpu"), (2, "cpu"), (2, "sm_90a"), (3, "sm_90a")):
        m = lower(preset(tiny))
        m.target = target
        PassManager(pipeline(level, target, fp8=True)).run(m)
        text = print_module(m)
        assert print_module(parse_module(text)) == text
        scaled = [p for f in m for p in f.params.values() if getattr(p.type, "scale", None)]
        assert scaled, level


def test_every_rule_of_the_tables_is_met_here() -> None:
    m = layer()
    fired = {name for r in run("fp8-cast,permute-fusion", m) for name in r.fired}
    assert set(GATHER) | set(QUANT) <= fired


def test_a_recipe_without_its_closing_brace_is_refused() -> None:
    with pytest.raises(BadOption, match="no closing brace"):
        pipeline(2, "cpu", "per-row{kv=packed")
