"""The recipes of fp8-cast: options, ops, and the parameters that are skipped."""

from __future__ import annotations

import pytest

from moec.errors import BadOption
from moec.models import lower, preset
from moec.passes import parse_pipeline
from tests.passes.fp8_layer import layer
from tests.passes.modules import (
    reasons,
    run,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("recipe=deepseek", "no recipe is called 'deepseek'; did you mean deepseek-v3"),
        (
            "recipe=int4",
            "no recipe is called 'int4'; there are deepseek-v3, deepseek-v3.1, per-row, per-tensor",
        ),
        ("ops=[]", "the recipe names no op: ops are some of linear, grouped_linear"),
        ("ops=[linears]", "ops: 'linears' can't be cast; did you mean linear"),
        ("activations=128x128", "activations=128x128: a block is of one row or of all"),
        ("weights=128", "weights=128: a block is rows x columns, as 1x128"),
        ("weights=0x128", "weights=0x128: a block is rows x columns, as 1x128"),
        ("scale=e8m0", "scale=e8m0: it is stored, fp32 or ue8m0"),
        ("plain=no", "plain=no: it is keep or cast"),
        ("block=0", "block is 0; it must be 1 or more"),
        ("blck=64", "no option is called 'blck'; did you mean block"),
        ('skip=[""]', "skip holds an empty pattern"),
    ],
)
def test_options_that_mean_nothing(options: str, message: str) -> None:
    with pytest.raises(BadOption) as caught:
        parse_pipeline(f"fp8-cast{{{options}}}")
    assert caught.value.message.startswith(f"fp8-cast: {message}")


def test_options_take_the_place_of_the_recipe_s() -> None:
    (p,) = parse_pipeline("fp8-cast{recipe=per-row,scale=ue8m0,weights=128x128,skip=[a,b*]}")
    assert str(p) == "fp8-cast{recipe=per-row,weights=128x128,scale=ue8m0,skip=[a,b*]}"
    chosen = p.options.chosen
    assert (chosen.activations, chosen.weights, chosen.scale) == ("1x*", "128x128", "ue8m0")
    (p,) = parse_pipeline("fp8-cast{block=64}")
    assert (p.options.chosen.activations, p.options.chosen.weights) == ("1x64", "64x64")


@pytest.mark.parametrize("ops", ["linear", "grouped_linear"])
def test_only_the_ops_that_the_recipe_names(ops: str) -> None:
    m = layer()
    run(f"fp8-cast{{ops=[{ops}]}}", m)
    scaled = {op.name for op in m["forward"].ops if op.name.endswith("linear") and op.operands[1].type.scale}  # type: ignore[union-attr]
    assert scaled == {ops}


def test_skip() -> None:
    for pattern in ("down", "down.weight", "$down.weight", "do*", "*own.weight"):
        m = layer()
        runs = run(f'fp8-cast{{skip=["{pattern}"]}}', m)
        assert f"skip={pattern} keeps $down.weight" in reasons(runs, "linear")
        assert "down.weight" in m["forward"].params and "up.weight" not in m["forward"].params
    for pattern in ("own", "weigh", "down.weight.q", "dwn"):
        with pytest.raises(BadOption, match=f"skip={pattern} covers no parameter"):
            run(f"fp8-cast{{skip=[{pattern}]}}", layer())
    with pytest.raises(BadOption, match=r"skip=dwn covers no parameter; did you mean down"):
        run("fp8-cast{skip=[dwn]}", layer())


def test_skip_by_the_checkpoint_s_names_and_layer_by_layer() -> None:
    whole = lower(preset("deepseek-v3-tiny"))
    names = "canonicalise,expert-grouping,canonicalise,fp8-cast"
    for pattern, kept in (
        ("gate_proj", {"mlp.experts.w13", "mlp.w13", "mlp.shared_experts.w13"}),  # joined with up_proj
        ("experts.*.down_proj", {"mlp.experts.w2"}),
        ("model.layers.0.*", None),  # the dense layer, all of it
    ):
        m = whole.clone()
        run(f"{names}{{skip=[{pattern}]}}", m)
        dense, moe = (
            {p.name for p in m[f].params.values() if not p.type.scale} for f in ("layer.dense", "layer.moe")
        )  # type: ignore[union-attr]
        if kept is None:
            assert "self_attn.o_proj.weight" in dense and "self_attn.o_proj.weight" not in moe
        else:
            assert kept <= dense | moe and "self_attn.o_proj.weight" not in dense | moe
    for pattern in ("layers.1.self_attn.o_proj", "experts.3.down_proj"):
        with pytest.raises(BadOption, match="which shares its code; cover both or neither"):
            run(f"{names}{{skip=[{pattern}]}}", whole.clone())
