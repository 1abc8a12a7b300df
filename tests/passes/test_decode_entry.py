"""decode-entry: @decode is @step for few new tokens, and only where that is simpler."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import BadOption
from moec.ir import Module, parse_module, print_module
from moec.ir.graph import NEW_TOKENS
from moec.models import lower, preset
from moec.passes import parse_pipeline, pipeline
from moec.passes.manager import PassManager
from tests.passes.cached import Grouped, Latent, latents
from tests.passes.modules import close, func, golden_text, module, op_names, random_weights, reasons, run

ABSORB = "mla-absorb{absorb_below=9},canonicalise"
FEW = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6)), max_size=4)


def stepping(block: Latent | Grouped) -> Module:
    """The block's module, its entry called @step."""
    return parse_module(print_module(block.build(), derived=False).replace("func @forward(", "func @step("))


def reached(m: Module) -> list[str]:
    return ["decode", *sorted(nx.descendants(m.call_graph(), "decode"))]


@settings(max_examples=15)
@given(block=latents, batch=FEW, seed=st.integers(0, 99))
def test_same_result(block: Latent, batch: list[tuple[int, int]], seed: int) -> None:
    """As @step's, whose own result stays what it was, on the same weights."""
    m = stepping(block)
    weights, args = random_weights(m, seed), block.inputs(batch, seed)
    before = block.run(m, weights, args, "step")
    run(f"{ABSORB},decode-entry", m)
    for entry in ("step", "decode"):
        close(before, block.run(m, weights, args, entry), tolerance=1e-5)
    assert not {"split_batch", "take_rows", "merge_rows", "attention"} & {
        name for function in reached(m) for name in op_names(m, function)
    }
    assert print_module(parse_module(print_module(m))) == print_module(m)


def test_bodies_that_change_are_cloned_and_loaded_once() -> None:
    """Two layers that share a function: one clone, in the same scopes; no load-time function of its own."""
    m = stepping(Latent())
    run(ABSORB, m)
    loading = [f.name for f in m if f.name.startswith("weights")]
    run("decode-entry", m)
    assert reached(m) == ["decode", "decode.layer0"]
    assert [f.name for f in m if f.name.startswith("weights")] == loading
    (step,), (decode,) = ([op for op in m[entry].ops if op.name == "call"] for entry in ("step", "decode"))
    assert (decode.attrs["scope"], decode.attrs["layers"]) == (step.attrs["scope"], step.attrs["layers"])
    params = m["decode.layer0"].params
    assert params.keys() < m["layer0"].params.keys(), "the expanding product's weight isn't asked for"
    assert all(str(p.type) == str(m["layer0"].params[name].type) for name, p in params.items())


def test_a_body_without_attention_is_shared() -> None:
    text = print_module(stepping(Latent()), derived=False)
    text = text.replace(
        "  return %x.1, %kv.1\nend",
        "  %x.2 = call @tail(%x.1) {layers=0..0} : f32[N,8]\n  return %x.2, %kv.1\nend",
        1,
    )
    signature = "@tail(%layer: index, %x: f32[N,8]) -> f32[N,8]"
    text += "\n" + func(signature, "%y = sigmoid(%x) : f32[N,8]", "return %y") + "\n"
    m = parse_module(text)
    run(f"{ABSORB},decode-entry", m)
    assert reached(m) == ["decode", "decode.layer0", "tail"]


@pytest.mark.parametrize("max_new", [1, 3, 8])
def test_the_bound_is_said(max_new: int) -> None:
    m = stepping(Latent())
    run(f"{ABSORB},decode-entry{{max_new={max_new}}}", m)
    assert m.bounds[NEW_TOKENS] == max_new
    assert f"new<={max_new}" in print_module(m).splitlines()[0]


@pytest.mark.parametrize("max_new", [0, -1])
def test_a_bound_below_one_is_a_mistake(max_new: int) -> None:
    with pytest.raises(BadOption, match="max_new must be at least 1"):
        parse_pipeline(f"decode-entry{{max_new={max_new}}}")


# Refusals.
def refused(m: Module, text: str = "decode-entry") -> list[str]:
    """Why there is no @decode; the module is as it was."""
    before = print_module(m)
    found = reasons(run(text, m), "clone", "step" if "step" in m else "forward")
    assert print_module(m) == before
    return found


def test_where_few_may_be_long() -> None:
    m = stepping(Latent())
    run(ABSORB, m)
    assert refused(m, "decode-entry{max_new=9}") == [
        "of 9 new tokens a sequence may be long: that begins at 9"
    ]


def test_without_a_split_there_is_nothing_to_fold() -> None:
    for block in (Latent(rank=2, nope=4, value=3), Grouped()):  # absorbed always; nothing to absorb
        m = stepping(block)
        run("mla-absorb,paged-attention,canonicalise", m)
        assert refused(m) == []


def test_only_a_step_has_a_form_for_decode() -> None:
    m = Latent().build()
    run(ABSORB, m)
    assert refused(m) == ["there is no @step"]


def test_there_is_one_decode() -> None:
    m = stepping(Latent())
    run(f"{ABSORB},decode-entry", m)
    assert refused(m) == ["there is a @decode"]


CACHE = "cache<f32[4], page=8>"
SIGNATURE = "@step(%x: f32[N,4], %cu: i32[B+1], %lens: i32[B], %table: i32[B,P]"
SPLIT = (
    "%r0, %c0, %l0, %t0, %r1, %c1, %l1, %t1 = split_batch(%x, %cu, %lens, %table) "
    "{below=9, rows=N0, sequences=B0, short_entries=S0, long_entries=S1} : "
    "i32[N0], i32[B0+1], i32[B0], i32[B0,P], i32[N-N0], i32[B-B0+1], i32[B-B0], i32[B-B0,P]"
)


def test_what_the_long_part_has_made_is_needed() -> None:
    """It leaves @step by another way than merge_rows."""
    m = module(
        func(
            f"{SIGNATURE}) -> f32[N-N0,4]",
            SPLIT,
            "%y = take_rows(%x, %r1) : f32[N-N0,4]",
            "%z = sigmoid(%y) : f32[N-N0,4]",
            "return %z",
        )
    )
    assert refused(m) == ["what the long part has made is needed elsewhere than in merge_rows"]


def test_what_the_long_part_has_made_is_kept() -> None:
    m = module(
        func(
            f"{SIGNATURE}, %slots: i64[N], %kv: {CACHE}, %layer: index) -> {CACHE}",
            SPLIT,
            "%y = take_rows(%x, %r1) : f32[N-N0,4]",
            "%at = take_rows(%slots, %r1) : i64[N-N0]",
            "%next = cache_write(%kv, %layer, %y, %at) : " + CACHE,
            "return %next",
        )
    )
    (reason,) = refused(m)
    assert reason.endswith("changes state by what the long part has made") and "cache_write" in reason


def test_rows_of_one_part_are_carried_from_layer_to_layer() -> None:
    m = module(
        func(
            f"{SIGNATURE}) -> f32[N0,4]",
            SPLIT,
            "%y = take_rows(%x, %r1) : f32[N-N0,4]",
            "%z = call @body(%y) {layers=0..1, scope=layers.*} : f32[N-N0,4]",
            "%s = take_rows(%x, %r0) : f32[N0,4]",
            "return %s",
        ),
        func(
            "@body(%layer: index, %y: f32[N-N0,4]) -> f32[N-N0,4]",
            "%z = sigmoid(%y) : f32[N-N0,4]",
            "return %z",
        ),
    )
    (reason,) = refused(m)
    assert reason.endswith("carries rows of one part from layer to layer")


# Whole models.
MLA = ["deepseek-v3-tiny", "deepseek-v2-tiny", "deepseek-v3", "deepseek-v2", "deepseek-v2-lite"]


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
@pytest.mark.parametrize("name", MLA)
def test_decode_knows_nothing_of_expanded_keys(name: str, target: str, level: int) -> None:
    """No value of it depends on how many entries are cached, as expanded keys and values do."""
    m = lower(preset(name))
    m.target = target
    PassManager(pipeline(level, target)).run(m)
    types = {f: [r.type for op in m[f].ops for r in op.results] for f in m.functions}
    cached = {f: [str(t) for t in found if depends_on_entries(t)] for f, found in types.items()}
    assert not any(cached[f] for f in reached(m)), cached
    assert not {"cache_read", "attention", "split_batch"} & {op for f in reached(m) for op in op_names(m, f)}
    read = [op for f in reached(m) for op in m[f].ops if op.name == "latent_attention"]
    assert read and {op.attrs["rows"] for op in read} == {"S"}
    assert any(cached.values()), "long sequences of @step are expanded: the check sees that"


def depends_on_entries(kind: object) -> bool:
    dims = getattr(kind, "shape", ())
    return any(s.name.startswith("S") for d in dims for s in getattr(d, "free_symbols", ()))


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = stepping(Latent())
    run(ABSORB, m)
    golden("decode_entry.before.moec", golden_text(m))
    run("decode-entry", m)
    golden("decode_entry.after.moec", golden_text(m))
