"""Differences by value name: none where there are none, and exactly those that an edit makes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.ir import Module, parse_module, print_module
from moec.ir.diff import diff_modules, label_of
from moec.ir.op import op_class
from moec.passes import PassManager, parse_pipeline
from tests.passes.modules import MoE, func, module, moe_blocks

BODY = (
    "@forward(%x: f32[N,4], %v: f32[N,4]) -> f32[N,4]",
    "param $w: f32[4,4]",
    "%s = sigmoid(%x) : f32[N,4]",
    "%l = linear(%s, $w) : f32[N,4]",
    "%a, %b = split(%l) {sizes=[1,3]} : f32[N,1], f32[N,3]",
    "%c = concat(%a, %b) : f32[N,4]",
    "%d = clamp(%c) {hi=1.0, lo=0.0} : f32[N,4]",
    "return %d",
)


def said(before: Module, after: Module) -> list[tuple[str, str, tuple[str, ...]]]:
    """(kind, what, details) of each change; of an added or removed op no details."""
    found = diff_modules(before, after)
    return [(c.kind, c.what, c.details) for f in found.functions for c in f.changes]


def edited(*pairs: tuple[str, str]) -> Module:
    text = "\n".join(BODY)
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return module(func(*text.split("\n")))


@pytest.mark.parametrize(
    ("pairs", "changes"),
    [
        ((("hi=1.0", "hi=2.0"),), [("changed", "%d", ("hi: 1.0 -> 2.0",))]),
        ((("linear(%s", "linear(%x"),), [("changed", "%l", ("x: %s -> %x",))]),
        ((("concat(%a, %b)", "concat(%b, %a)"),),
         [("changed", "%c", ("operand 0: %a -> %b", "operand 1: %b -> %a"))]),
        ((("{hi=1.0, lo=0.0}", "{hi=1.0, kernel=mine, lo=0.0}"),),
         [("changed", "%d", ("kernel: none -> mine",))]),
        ((("%s = sigmoid(%x)", "%s = mul(%x, %v)"),),
         [("changed", "%s", ("- %s = sigmoid(%x) : f32[N,4]", "+ %s = mul(%x, %v) : f32[N,4]"))]),
        ((("%d = clamp", "%e = sigmoid(%c) : f32[N,4]\n%d = clamp"),), [("added", "%e", ())]),
        ((("return %d", "return %c"),), [("changed", "return", ("return: (%d) -> (%c)",))]),
        ((("%l = linear(%s, $w) ", "%l = linear(%s, $w2) "), ("$w:", "$w2:")),
         [("removed", "$w", ()), ("added", "$w2", ()), ("changed", "%l", ("w: $w -> $w2",))]),
        ((("%b = split", "%z = split"), ("%a, %b)", "%a, %z)")),
         [("changed", "%a,%b", ("results: %a, %b -> %a, %z",)), ("changed", "%c", ("operand 1: %b -> %z",))]),
        ((("sizes=[1,3]", "sizes=[2,2]"), ("f32[N,1], f32[N,3]", "f32[N,2], f32[N,2]")),
         [("changed", "%a,%b", ("sizes: [1,3] -> [2,2]", "type of %a: f32[N,1] -> f32[N,2]",
                                "type of %b: f32[N,3] -> f32[N,2]"))]),
        ((("%v: f32[N,4]", "%v: f32[N,5]"),), [("changed", "%v", ("type: f32[N,4] -> f32[N,5]",))]),
        ((("%x: f32[N,4], %v: f32[N,4]", "%v: f32[N,4], %x: f32[N,4]"),),
         [("changed", "arguments", ("order: (%x, %v) -> (%v, %x)",))]),
    ],
)  # fmt: skip
def test_an_edit_and_its_differences(pairs: Any, changes: Any) -> None:
    before, after = edited(), edited(*pairs)
    assert said(before, after) == changes
    backwards = {"added": "removed", "removed": "added", "changed": "changed"}
    assert sorted(kind for kind, *_ in said(after, before)) == sorted(backwards[kind] for kind, *_ in changes)


def test_functions_and_the_header() -> None:
    a, b = module(func(*BODY)), module(func(*BODY), func("@other(%x: f32[N,4]) -> f32[N,4]", "return %x"))
    b.target, b.bounds = "sm_90a", {"N": 8}
    found = diff_modules(a, b)
    assert [(f.name, f.kind) for f in found.functions] == [("other", "added")]
    assert [d for c in found.header for d in c.details] == [
        "target: cpu -> sm_90a", "bound of N: none -> 8",
    ]  # fmt: skip
    assert [(f.name, f.kind) for f in diff_modules(b, a).functions] == [("other", "removed")]


def test_lines_costs_and_order_are_no_differences() -> None:
    a = module(
        func(
            "@f(%x: f32[N,4]) -> f32[N,4]",
            "%a = sigmoid(%x) : f32[N,4] ; model.py:1",
            "%b = mul(%x, %x) : f32[N,4] ; model.py:2 <a(%x)",
            "%c = add(%a, %b) : f32[N,4]",
            "return %c",
        )
    )
    b = module(func("@f(%x: f32[N,4]) -> f32[N,4]", "%b = mul(%x, %x) : f32[N,4]",
                    "%a = sigmoid(%x) : f32[N,4]", "%c = add(%a, %b) : f32[N,4]", "return %c"))  # fmt: skip
    assert not diff_modules(a, b)


@given(moe_blocks(), st.booleans())
def test_a_module_is_equal_to_itself(block: MoE, grouped: bool) -> None:
    m = block.build()
    if grouped:
        PassManager(parse_pipeline("expert-grouping,canonicalise")).run(m)
    assert not diff_modules(m, m)
    assert not diff_modules(m, parse_module(print_module(m)))
    assert not diff_modules(m.clone(), m)


@given(moe_blocks(), st.data())
def test_random_edits_are_what_differs(block: MoE, data: st.DataObject) -> None:
    """Some ops get an annotation, some floats another value, and new ops appear: these and no others."""
    before, after = block.build(), block.build()
    expected = set()
    for function in after:
        for op in data.draw(st.sets(st.sampled_from(function.ops))) if function.ops else ():
            op.annotate("kernel", "mine")
            expected.add((function.name, "changed", label_of(op)))
    forward = after["forward"]
    for number in range(data.draw(st.integers(0, 3))):
        forward.create(op_class("sigmoid")([forward.args[0]]), [f"new{number}"])
        expected.add(("forward", "added", f"%new{number}"))
    found = {(f.name, c.kind, c.what) for f in diff_modules(before, after).functions for c in f.changes}
    assert found == expected
