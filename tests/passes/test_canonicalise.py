"""canonicalise: the clean-ups, and random graphs bit for bit before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir import Builder, Function, Interpreter, Module, TensorType, Value, verify
from moec.ir.types import DTYPES, bf16, f32, symbol
from tests.passes.modules import (
    func,
    golden_text,
    interpret,
    module,
    op_names,
    random_weights,
    run,
    tokens,
)


def test_equal_ops_merge_and_dead_ops_go() -> None:
    m = module(
        func(
            "@forward(%x: f32[N,4]) -> f32[N,4]",
            "param $unused: f32[4]",
            "%a = sigmoid(%x) : f32[N,4]",
            "%b = sigmoid(%x) : f32[N,4]",
            "%c = clamp(%x) {hi=1.0, lo=0.0} : f32[N,4]",
            "%d = clamp(%x) {hi=2.0, lo=0.0} : f32[N,4]",
            "%dead = mul(%x, %x) : f32[N,4]",
            "%e = add(%a, %b) : f32[N,4]",
            "%f = add(%c, %d) : f32[N,4]",
            "%y = mul(%e, %f) : f32[N,4]",
            "return %y",
        )
    )
    x = tokens(3, 4)
    before = interpret(m, {"unused": torch.zeros(4)}, x)
    run("canonicalise", m)
    # The clamps differ in an attribute: both stay.
    assert op_names(m) == ["sigmoid", "clamp", "clamp", "add", "add", "mul"]
    assert not m["forward"].params
    assert torch.equal(before, interpret(m, {}, x))


STATE = [
    func(
        "@forward(%x: f32[N,4], %cache: cache<f32[4], page=2>, %slots: i64[N], %table: i64[B,P],"
        " %lens: i64[B]) -> (f32[N,4], cache<f32[4], page=2>)",
        "%y, %after = call @layer(%x, %cache, %slots, %table, %lens, %x) {layers=0..1}"
        " : f32[N,4], cache<f32[4], page=2>",
        "return %y, %after",
    ),
    func(
        "@layer(%layer: index, %x: f32[N,4], %cache: cache<f32[4], page=2>, %slots: i64[N], %table: i64[B,P],"
        " %lens: i64[B], %idle: f32[N,4]) -> (f32[N,4], cache<f32[4], page=2>)",
        "%c1 = cache_write(%cache, %layer, %x, %slots) : cache<f32[4], page=2>",
        "%a = cache_read(%c1, %layer, %table, %lens) : f32[S,4]",
        "%b = cache_read(%c1, %layer, %table, %lens) : f32[S,4]",
        "%s = add(%a, %b) : f32[S,4]",
        "%c2 = cache_write(%c1, %layer, %x, %slots) : cache<f32[4], page=2>",
        "%after = cache_read(%c2, %layer, %table, %lens) {rows=S2} : f32[S2,4]",
        "%y = sigmoid(%x) : f32[N,4]",
        "return %y, %c2",
    ),
]


def test_state_is_threaded_through() -> None:
    """Reads of one version merge or go; writes stay as long as their version is used."""
    m = module(*STATE)
    type = m["forward"].args[1].type
    args = (
        tokens(3, 4),
        Interpreter(m, {}).new_cache(type, 2, 3),  # type: ignore[arg-type]
        torch.tensor([0, 1, 4]),
        torch.tensor([[0, 2]]),
        torch.tensor([3]),
    )
    y, cache = Interpreter(m, {}).run("forward", *args)
    run("canonicalise", m)
    assert op_names(m, "layer") == ["cache_write", "cache_write", "sigmoid"]
    # %table, %lens and %idle serve nothing any more: gone from the body and from the call.
    assert [a.name for a in m["layer"].args] == ["layer", "x", "cache", "slots"]
    assert len(m["forward"].ops[0].operands) == 3
    y2, cache2 = Interpreter(m, {}).run("forward", *args)
    assert torch.equal(y, y2)
    for layer, pages in cache.layers.items():
        assert torch.equal(pages.nan_to_num(), cache2.layers[layer].nan_to_num())


def test_reads_of_two_versions_do_not_merge() -> None:
    lines = STATE[1].replace(
        "%y = sigmoid(%x) : f32[N,4]\nreturn %y, %c2",
        "%m = mul(%s, %s) : f32[S,4]\n%n = mul(%after, %after) : f32[S2,4]\nreturn %x, %c2, %m, %n",
    )
    signature = lines.split("\n", 1)[0].replace(
        "-> (f32[N,4], cache<f32[4], page=2>)", "-> (f32[N,4], cache<f32[4], page=2>, f32[S,4], f32[S2,4])"
    )
    m = module("\n".join([signature, lines.split("\n", 1)[1]]))
    run("canonicalise", m)
    assert op_names(m, "layer").count("cache_read") == 2


def test_invariants_stay_while_any_use_is_left() -> None:
    body = func(
        "@body(%layer: index, %x: f32[N,4], %a: f32[N,4], %b: f32[N,4]) -> f32[N,4]",
        "%y = add(%x, %b) : f32[N,4]",
        "return %y",
    )
    call = "%{} = call @body(%x, %p, %q) {{layers={}}} : f32[N,4]"
    forward = func(
        "@forward(%x: f32[N,4], %p: f32[N,4], %q: f32[N,4]) -> (f32[N,4], f32[N,4])",
        call.format("u", "0..1"),
        call.format("v", "2..4"),
        "return %u, %v",
    )
    m = module(forward, body)
    args = tokens(2, 4), tokens(2, 4, 2), tokens(2, 4, 3)
    before = Interpreter(m, {}).run("forward", *args)
    run("canonicalise", m)
    assert [a.name for a in m["body"].args] == ["layer", "x", "b"]
    assert all(len(op.operands) == 2 for op in m["forward"].ops)
    assert [r.name for op in m["forward"].ops for r in op.results] == ["u", "v"]
    assert [a.name for a in m["forward"].args] == ["x", "p", "q"], "an entry's arguments are its callers'"
    for a, b in zip(before, Interpreter(m, {}).run("forward", *args), strict=True):
        assert torch.equal(a, b)


def test_an_entry_that_is_also_a_body_keeps_its_arguments() -> None:
    x = "%x: f32[N,4]"
    m = module(
        func(f"@forward({x}) -> f32[N,4]", "%y = call @decode(%x, %x) {layers=0..1} : f32[N,4]", "return %y"),
        func(f"@decode(%layer: index, {x}, %idle: f32[N,4]) -> f32[N,4]", "return %x"),
    )
    assert not run("canonicalise", m)[0].changed


def test_unrun_functions_go() -> None:
    idle = func("@idle(%x: f32[N,4]) -> f32[N,4]", "return %x")
    m = module(func("@forward(%x: f32[N,4]) -> f32[N,4]", "return %x"), idle)
    run("canonicalise", m)
    assert list(m.functions) == ["forward"]
    alone = module(idle)  # a module without an entry keeps what no other function runs
    assert not run("canonicalise", alone)[0].changed


def test_bindings_stay_while_their_parameter_is_used() -> None:
    weights = func(
        "@weights() -> ()",
        "param $q: f32[4,4]",
        "%t = sigmoid($q) : f32[4,4]",
        "bind(%t) {param=w}",
        "%z = clamp($q) {hi=1.0, lo=0.0} : f32[4,4]",
        "bind(%z) {param=unused}",
        "return",
    )
    forward = func(
        "@forward(%x: f32[N,4]) -> f32[N,4]",
        "param $w: f32[4,4]",
        "%y = linear(%x, $w) : f32[N,4]",
        "return %y",
    )
    m = module(forward, weights)
    checkpoint, x = random_weights(m), tokens(3, 4)
    before = interpret(m, checkpoint, x)
    run("canonicalise", m)
    assert op_names(m, "weights") == ["sigmoid", "bind"]
    assert torch.equal(before, interpret(m, checkpoint, x))


@st.composite
def graphs(draw: Any) -> Module:
    """Chains of pointwise and shape ops over [N, 4] and [N, 2, 2] values, some shared, some dead."""
    m = Module("test", "cpu", {"N": 8})
    n = symbol("N")
    function = m.add(Function("forward", [("x", TensorType(f32, (n, 4))), ("v", TensorType(bf16, (n, 4)))]))
    b = Builder(m, function, f32)
    values: list[Value] = list(function.args)
    for _ in range(draw(st.integers(1, 12))):
        x = draw(st.sampled_from(values))
        values += draw(st.sampled_from(STEPS))(draw, b, x, values)
    like = [v for v in values if v.type == values[-1].type]
    out = draw(st.lists(st.sampled_from(values), max_size=2))
    function.ret(values[-1], like[0], *out)
    verify(m)
    return m


Step = Callable[[Any, Builder, Any, list[Value]], list[Value]]


def _alike(draw: Any, x: Any, values: list[Value]) -> Value:
    same: Value = draw(st.sampled_from([v for v in values if v.type == x.type]))
    return same


def _split(draw: Any, b: Builder, x: Any, values: list[Value]) -> list[Value]:
    width = x.type.shape[-1]
    if not isinstance(width, int):
        return []
    first = draw(st.integers(1, width))
    sizes = (first, width - first) if first < width else (width,)
    parts = b.split(x, sizes=sizes)
    parts = list(parts) if isinstance(parts, tuple) else [parts]
    order = parts if draw(st.booleans()) else parts[::-1]
    return [b.concat(*order)]


def _split_again(draw: Any, b: Builder, x: Any, values: list[Value]) -> list[Value]:
    other = _alike(draw, x, values)
    width = x.type.shape[-1]
    if not isinstance(width, int):
        return []
    cut = draw(st.sampled_from([width, 1]))
    left, right = b.split(b.concat(x, other), sizes=(cut, 2 * width - cut))
    return [left, right] if cut == width else []


def _reshape(draw: Any, b: Builder, x: Any, values: list[Value]) -> list[Value]:
    shape = draw(st.sampled_from([(symbol("N"), 4), (symbol("N"), 2, 2), (4 * symbol("N"),)]))
    return [b.reshape(x, shape=shape)]


STEPS: list[Step] = [
    lambda draw, b, x, values: [b.sigmoid(x)],
    lambda draw, b, x, values: [b.clamp(x, lo=-0.5, hi=draw(st.sampled_from([0.5, 1.0])))],
    lambda draw, b, x, values: [
        b.__getattr__("cast")(x, to=DTYPES[draw(st.sampled_from(["f32", "bf16", "f16", "f64"]))])
    ],
    lambda draw, b, x, values: [b.zeros_like(x, dtype=draw(st.sampled_from([f32, bf16, x.type.dtype])))],
    lambda draw, b, x, values: [b.add(x, _alike(draw, x, values))],
    lambda draw, b, x, values: [b.mul(_alike(draw, x, values), x)],
    _split,
    _split_again,
    _reshape,
]


@given(m=graphs(), count=st.integers(0, 3), seed=st.integers(0, 99))
def test_random_graphs_keep_their_bits(m: Module, count: int, seed: int) -> None:
    args = tokens(count, 4, seed), tokens(count, 4, seed + 1, "bf16")
    before = Interpreter(m, {}).run("forward", *args)
    size = len(m["forward"].ops)
    run("canonicalise", m)
    assert len(m["forward"].ops) <= size
    for a, b in zip(before, Interpreter(m, {}).run("forward", *args), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = module(*STATE)
    golden("canonicalise.before.moec", golden_text(m))
    run("canonicalise", m)
    golden("canonicalise.after.moec", golden_text(m))
