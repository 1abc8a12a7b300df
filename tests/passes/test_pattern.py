"""The matcher and the driver: what matches, why not, and what a rewrite leaves behind."""

from __future__ import annotations

import pytest

from moec.errors import InternalError, SourceLoc
from moec.ir import Module, Op, Value
from moec.passes.pattern import ANY, Match, Miss, OpPattern, P, Refusal, Rules, match, maybe, param
from moec.passes.rewrite import Log, rewrite
from tests.passes.modules import func, module, op_names


def graph() -> Module:
    return module(
        func(
            "@forward(%x: f32[N,4], %v: f32[N,4]) -> (f32[N,4], f32[N,4])",
            "param $w: f32[4,4]",
            "param $b: f32[4]",
            "%s = sigmoid(%x) : f32[N,4] ; model.py:7",
            "%m = mul(%s, %v) : f32[N,4] ; model.py:8",
            "%l = linear(%s, $w) : f32[N,4] ; model.py:9",
            "%k = linear(%v, $w, $b) : f32[N,4]",
            "%q = mul(%l, %l) : f32[N,4]",
            "%a, %z = split(%k) {sizes=[2,2]} : f32[N,2], f32[N,2]",
            "%t = sigmoid(%z) : f32[N,2]",
            "%aa = mul(%a, %a) : f32[N,2]",
            "%r = clamp(%q) {hi=1.0, lo=0.0} : f32[N,4]",
            "return %m, %r",
        )
    )


def op(m: Module, name: str) -> Op:
    return m["forward"].named(name).op  # type: ignore[attr-defined]


def attempt(pattern: OpPattern, name: str) -> Match | Miss:
    m = graph()
    return match(pattern, m, m["forward"], op(m, name))


@pytest.mark.parametrize(
    ("pattern", "at"),
    [
        (P.mul("a", "b"), "m"),
        (P.mul(P.sigmoid("x"), "v"), "m"),
        (P.mul("v", P.sigmoid("x")).commutes(), "m"),
        (P.mul("x", "x"), "q"),
        (P.mul(P.linear("x", param("w")), ...), "q"),
        (P.linear("x", "w"), "l"),
        (P.linear("x", "w", maybe("bias")), "l"),
        (P.linear("x", "w", maybe("bias")), "k"),
        (P.linear(..., acc=None), "k"),
        (P.sigmoid(P.split("x", sizes=(2, 2)).out(1)), "t"),
        (P.sigmoid(P.split("x", sizes=(2, 2)).out(1).once(1)), "t"),
        (P.clamp("x", lo=0.0, hi=ANY), "r"),
        (P.clamp(P.mul(...).once(), lo=ANY, hi=ANY), "r"),
    ],
)
def test_matches(pattern: OpPattern, at: str) -> None:
    assert isinstance(attempt(pattern, at), Match)


ARGUMENT = "an operand is %v, an argument, not the result of sigmoid"


@pytest.mark.parametrize(
    ("pattern", "at", "reason", "line"),
    [
        (P.mul("v", P.sigmoid("x")), "m", ARGUMENT, 8),
        (P.mul(P.sigmoid("x"), P.add(...)).commutes(), "m", ARGUMENT.replace("sigmoid", "add"), 8),
        (P.mul(P.linear(...), "v"), "m", "%s comes from sigmoid, not linear", 8),
        (P.mul("x", "x"), "m", "%v and %s are not the same", 8),
        (P.mul(P.sigmoid("x").once(), "v"), "m", "%s is used more than once, by mul and linear", 7),
        (P.mul("x"), "m", "has b %v", 8),
        (P.linear("x", "w", "bias"), "l", "has no bias", 9),
        (P.linear("x", "w", None), "k", "has bias $b", None),
        (P.linear(param("x"), "w"), "l", "%s is no parameter", 9),
        (P.sigmoid(P.split("x", sizes=(2, 2))), "t", "%z is result 1 of split", None),
        (P.sigmoid(P.split("x", sizes=(1, 3)).out(1)), "t", "sizes is [2,2], not [1,3]", None),
        (P.sigmoid(P.split("x", sizes=(2, 2)).out(1).once()), "t", "%a is used more than once, by mul", None),
        (P.mul(P.split("x", sizes=(2, 2)).once(0), "x2"), "aa", "%a is used more than once, by mul", None),
        (P.clamp("x", lo=0.0, hi=2.0), "r", "hi is 1.0, not 2.0", None),
        (P.clamp("x", lo=ANY, hi=ANY).where(lambda m: f"not {m['x'].text}"), "r", "not %q", None),
    ],
)  # fmt: skip
def test_misses_say_why(pattern: OpPattern, at: str, reason: str, line: int | None) -> None:
    miss = attempt(pattern, at)
    assert isinstance(miss, Miss)
    assert miss.reason == reason
    assert miss.loc == (SourceLoc("model.py", line) if line else None)


def test_a_pattern_that_could_never_match_is_a_bug() -> None:
    with pytest.raises(TypeError, match="clamp's lo"):
        P.clamp("x", hi=1.0)
    with pytest.raises(TypeError, match="clamp's low"):
        P.clamp("x", low=1.0, lo=0.0, hi=1.0)


def test_captures() -> None:
    found = attempt(P.mul(P.sigmoid("x").named("act"), "v"), "m")
    assert isinstance(found, Match)
    assert (found["x"].text, found["v"].text, found["act"].name) == ("%x", "%v", "sigmoid")


def swap(m: Match) -> Value:
    inner = m.create("mul", m["v"], m["x"], out="inner")
    return m.create("clamp", inner, lo=0.0, hi=1.0)


def test_a_rewrite_keeps_names_and_lines_and_says_where_it_is_from() -> None:
    m = module(
        func(
            "@forward(%x: f32[N,4], %v: f32[N,4]) -> f32[N,4]",
            "%s = sigmoid(%x) : f32[N,4] ; model.py:7",
            "%m = mul(%s, %v) : f32[N,4] ; model.py:8",
            "return %m",
        )
    )
    log = Log()
    rules: Rules = {"swap": (P.mul(P.sigmoid("x"), "v"), swap)}
    assert rewrite(m, rules, "my-pass", log)
    inner, outer = m["forward"].ops
    assert (inner.results[0].text, outer.results[0].text) == ("%inner", "%m")
    assert {str(o.loc) for o in (inner, outer)} == {"model.py:8"}
    assert inner.origin == outer.origin == "my-pass(%s,%m)"
    assert log.fired == {"swap": 1}
    assert [str(miss) for miss in log.misses] == [
        "swap: not at %inner = mul(%v, %x) (model.py:8): "
        "an operand is %v, an argument, not the result of sigmoid"
    ]


def test_an_inner_op_that_is_used_elsewhere_stays() -> None:
    m = graph()
    rewrite(m, {"swap": (P.mul(P.sigmoid("x"), "v"), swap)}, "p", Log())
    assert op_names(m)[:3] == ["sigmoid", "mul", "clamp"]
    assert op(m, "m").origin == "p(%m)"


def test_a_refusal_leaves_no_trace() -> None:
    def refuse(m: Match) -> Value:
        m.create("sigmoid", m["v"])
        m.function.param("new", m["w"].type)
        raise Refusal("it's Monday")

    m = graph()
    before, log = op_names(m), Log()
    assert not rewrite(m, {"never": (P.linear("v", "w"), refuse)}, "p", log)
    assert op_names(m) == before and set(m["forward"].params) == {"w", "b"}
    assert [(miss.rule, miss.reason, miss.loc.line if miss.loc else None) for miss in log.misses] == [
        ("never", "it's Monday", 9),
        ("never", "has bias $b", None),
    ]


def test_rules_that_undo_each_other_are_a_bug() -> None:
    rules: Rules = {
        "there": (P.mul("a", "b"), lambda m: m.create("add", m["a"], m["b"])),
        "back": (P.add("a", "b"), lambda m: m.create("mul", m["a"], m["b"])),
    }
    with pytest.raises(InternalError, match="don't come to an end"):
        rewrite(graph(), rules, "p", Log())
