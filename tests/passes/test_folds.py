"""canonicalise's folds: each with what it makes of an op and with near misses."""

from __future__ import annotations

import pytest
import torch

from moec.ir import Module
from moec.ir.types import symbol
from moec.passes.canonicalise import FOLDS
from tests.passes.modules import (
    func,
    interpret,
    module,
    op_names,
    reasons,
    run,
    tensor_type,
)

COMBINE = "%r: f32[2*N~2,4], %s: i32[2*N], %w: f32[N,2]"


NO_LIMIT = "gate is clamped to {}: that is no limit"


def clamped(dtype: str, gate: str, up: str) -> list[str]:
    return [
        f"%a = clamp(%g) {{{gate}}} : {dtype}[N,4]",
        f"%b = clamp(%u) {{{up}}} : {dtype}[N,4]",
        f"%y = swiglu(%a, %b) : {dtype}[N,4]",
    ]


# rule: (arguments, lines, ops left), then near misses as (arguments, lines, why not).
CASES: dict[str, tuple[tuple[str, list[str], str], list[tuple[str, list[str], str]]]] = {
    "cast-identity": (
        ("%x: f32[N,4]", ["%y = cast(%x) {to=f32} : f32[N,4]"], ""),
        [("%x: f32[N,4]", ["%y = cast(%x) {to=bf16} : bf16[N,4]"], "it changes f32[N,4] to bf16[N,4]")],
    ),
    "cast-cast": (
        (
            "%x: bf16[N,4]",
            ["%a = cast(%x) {to=f32} : f32[N,4]", "%y = cast(%a) {to=f16} : f16[N,4]"],
            "cast",
        ),
        [
            (
                "%x: f32[N,4]",
                ["%a = cast(%x) {to=bf16} : bf16[N,4]", "%y = cast(%a) {to=f32} : f32[N,4]"],
                "bf16 can't hold every f32: the first cast rounds",
            ),
            (
                "%x: bf16[N,4]",
                ["%a = cast(%x) {to=f16} : f16[N,4]", "%y = cast(%a) {to=f32} : f32[N,4]"],
                "f16 can't hold every bf16: the first cast rounds",
            ),
        ],
    ),
    "reshape-identity": (
        ("%x: f32[N,4]", ["%y = reshape(%x) {shape=[N,4]} : f32[N,4]"], ""),
        [
            (
                "%x: f32[N,4]",
                ["%y = reshape(%x) {shape=[N,2,2]} : f32[N,2,2]"],
                "it changes f32[N,4] to f32[N,2,2]",
            )
        ],
    ),
    "reshape-reshape": (
        (
            "%x: f32[N,4]",
            ["%a = reshape(%x) {shape=[4*N]} : f32[4*N]", "%y = reshape(%a) {shape=[N,2,2]} : f32[N,2,2]"],
            "reshape",
        ),
        [
            (  # the groups are lost on the way and must stay so
                "%x: f32[6~2,4]",
                ["%a = reshape(%x) {shape=[24]} : f32[24]", "%y = reshape(%a) {shape=[6,2,2]} : f32[6,2,2]"],
                "in one step it would be f32[6~2,2,2], not f32[6,2,2]",
            )
        ],
    ),
    "split-one": (
        ("%x: f32[N,4]", ["%y = split(%x) {sizes=[4]} : f32[N,4]"], ""),
        [("%x: f32[N,4]", ["%y, %z = split(%x) {sizes=[1,3]} : f32[N,1], f32[N,3]"], "there are 2 parts")],
    ),
    "concat-one": (
        ("%x: f32[N,4]", ["%y = concat(%x) : f32[N,4]"], ""),
        [("%x: f32[N,4]", ["%y = concat(%x, %x) : f32[N,8]"], "has xs %x")],
    ),
    "concat-split": (
        (
            "%x: f32[N,4]",
            ["%a, %b = split(%x) {sizes=[1,3]} : f32[N,1], f32[N,3]", "%y = concat(%a, %b) : f32[N,4]"],
            "",
        ),
        [
            (
                "%x: f32[N,4]",
                ["%a, %b = split(%x) {sizes=[2,2]} : f32[N,2], f32[N,2]", "%y = concat(%b, %a) : f32[N,4]"],
                "%b is result 1 of split",
            ),
            (
                "%x: f32[N,4]",
                ["%a, %b = split(%x) {sizes=[2,2]} : f32[N,2], f32[N,2]", "%y = concat(%a, %a) : f32[N,4]"],
                "the operands are not all parts of %x in order",
            ),
            (
                "%x: f32[4,4]",
                [
                    "%a, %b = split(%x) {sizes=[2,2], axis=0} : f32[2,4], f32[2,4]",
                    "%y = concat(%a, %b) : f32[2,8]",
                ],
                "it changes f32[4,4] to f32[2,8]",
            ),
        ],
    ),
    "split-concat": (
        (
            "%x: f32[N,1], %v: f32[N,3]",
            [
                "%a = concat(%x, %v) : f32[N,4]",
                "%b, %c = split(%a) {sizes=[1,3]} : f32[N,1], f32[N,3]",
                "%y = mul(%b, %c) : f32[N,3]",
            ],
            "mul",
        ),
        [
            (
                "%x: f32[N,1], %v: f32[N,3]",
                [
                    "%a = concat(%x, %v) : f32[N,4]",
                    "%b, %c = split(%a) {sizes=[3,1]} : f32[N,3], f32[N,1]",
                    "%y = mul(%b, %c) : f32[N,3]",
                ],
                "it is cut elsewhere than it was joined",
            )
        ],
    ),
    "zeros-cast": (
        (
            "%x: bf16[N,4]",
            ["%a = cast(%x) {to=f32} : f32[N,4]", "%y = zeros_like(%a) {dtype=f32} : f32[N,4]"],
            "zeros_like",
        ),
        [
            (
                "%x: f32[N,4]",
                ["%a = sigmoid(%x) : f32[N,4]", "%y = zeros_like(%a) {dtype=f32} : f32[N,4]"],
                "%a comes from sigmoid, not cast",
            )
        ],
    ),
    "zeros-zeros": (
        (
            "%x: bf16[N,4]",
            ["%a = zeros_like(%x) {dtype=bf16} : bf16[N,4]", "%y = zeros_like(%a) {dtype=f32} : f32[N,4]"],
            "zeros_like",
        ),
        [
            (
                "%x: f32[N,4]",
                ["%y = zeros_like(%x) {dtype=f32} : f32[N,4]"],
                "an operand is %x, an argument, not the result of zeros_like",
            )
        ],
    ),
    "cast-zeros": (
        (
            "%x: f32[N,4]",
            ["%a = zeros_like(%x) {dtype=f32} : f32[N,4]", "%y = cast(%a) {to=bf16} : bf16[N,4]"],
            "zeros_like",
        ),
        [
            (
                "%x: f32[N,4]",
                ["%y = cast(%x) {to=bf16} : bf16[N,4]"],
                "an operand is %x, an argument, not the result of zeros_like",
            )
        ],
    ),
    "add-zeros": (
        (
            "%x: f32[N,4]",
            ["%a = zeros_like(%x) {dtype=f32} : f32[N,4]", "%y = add(%a, %x) : f32[N,4]"],
            "",
        ),
        [
            (  # the sum has the shape of the zeros
                "%x: f32[N,4], %v: f32[N,1]",
                ["%a = zeros_like(%x) {dtype=f32} : f32[N,4]", "%y = add(%v, %a) : f32[N,4]"],
                "it changes f32[N,1] to f32[N,4]",
            )
        ],
    ),
    "combine-dtype": (
        (COMBINE, ["%y = combine(%r, %s, %w) {to=f32} : f32[N,4]"], "combine"),
        [(COMBINE, ["%y = combine(%r, %s, %w) {to=bf16} : bf16[N,4]"], "to is bf16, the rows are f32")],
    ),
    "cast-combine": (
        (
            COMBINE,
            ["%a = combine(%r, %s, %w) : f32[N,4]", "%y = cast(%a) {to=bf16} : bf16[N,4]"],
            "combine",
        ),
        [
            (
                COMBINE,
                ["%a = combine(%r, %s, %w) {to=bf16} : bf16[N,4]", "%y = cast(%a) {to=f16} : f16[N,4]"],
                "combine rounds to bf16 first",
            ),
            (
                COMBINE,
                [
                    "%a = combine(%r, %s, %w) : f32[N,4]",
                    "%b = cast(%a) {to=bf16} : bf16[N,4]",
                    "%c = zeros_like(%b) {dtype=f32} : f32[N,4]",
                    "%d = mul(%a, %c) : f32[N,4]",
                    "%e = cast(%d) {to=bf16} : bf16[N,4]",
                    "%y = mul(%b, %e) : bf16[N,4]",
                ],
                "%a is used more than once, by cast and zeros_like and mul",
            ),
        ],
    ),
    "swiglu-clamp": (
        (
            "%g: bf16[N,4], %u: bf16[N,4]",
            [
                "%a = clamp(%g) {hi=0.5, lo=-inf} : bf16[N,4]",
                "%b = clamp(%u) {hi=0.5, lo=-0.5} : bf16[N,4]",
                "%y = swiglu(%a, %b) {act=gelu} : bf16[N,4]",
            ],
            "swiglu",
        ),
        [
            (
                f"%g: {dtype}[N,4], %u: {dtype}[N,4]",
                clamped(dtype, gate, up),
                NO_LIMIT.format(reason) if "…" in reason else reason,
            )
            for dtype, gate, up, reason in (
                ("f32", "hi=1.0, lo=-1.0", "hi=1.0, lo=-1.0", "-1.0 … 1.0, up to -1.0 … 1.0"),
                ("f32", "hi=1.0, lo=-inf", "hi=1.0, lo=-2.0", "-inf … 1.0, up to -2.0 … 1.0"),
                ("f32", "hi=1.0, lo=-inf", "hi=2.0, lo=-1.0", "-inf … 1.0, up to -1.0 … 2.0"),
                ("f32", "hi=inf, lo=-inf", "hi=inf, lo=-inf", "inf is no positive number in float32"),
                ("f32", "hi=-1.0, lo=-inf", "hi=1.0, lo=-1.0", "-inf … -1.0, up to -1.0 … 1.0"),
                ("bf16", "hi=0.1, lo=-inf", "hi=0.1, lo=-0.1", "bf16 has no 0.1: clamp rounds it"),
            )
        ],
    ),
    "combine-plus": (
        (
            f"{COMBINE}, %v: f32[N,4]",
            ["%a = combine(%r, %s, %w) : f32[N,4]", "%y = add(%v, %a) : f32[N,4]"],
            "combine",
        ),
        [
            (
                f"{COMBINE}, %v: f32[N,4]",
                ["%a = combine(%r, %s, %w, %v) : f32[N,4]", "%y = add(%a, %v) : f32[N,4]"],
                "has plus %v",
            ),
            (
                f"{COMBINE}, %v: f32[N,4]",
                [
                    "%a = combine(%r, %s, %w) : f32[N,4]",
                    "%b = add(%a, %v) : f32[N,4]",
                    "%y = mul(%a, %b) : f32[N,4]",
                ],
                "%a is used more than once, by add and mul",
            ),
            (
                f"{COMBINE}, %v: f32[4]",
                ["%a = combine(%r, %s, %w) : f32[N,4]", "%y = add(%a, %v) : f32[N,4]"],
                "%v is broadcast from (4,) to (N, 4)",
            ),
        ],
    ),
}


def text(arguments: str, lines: list[str]) -> str:
    type = next(line for line in lines if line.startswith("%y")).split(" : ")[1].split(", ")[0]
    return func(f"@forward({arguments}) -> {type}", *lines, "return %y")


def inputs(m: Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for arg in m["forward"].args:
        type = tensor_type(arg)
        shape = [d if isinstance(d, int) else int(d.subs({symbol("N"): 3})) for d in type.shape]
        if type.dtype.is_float:
            made.append(torch.randn(shape, generator=generator).to(type.dtype.torch))
        else:
            made.append(torch.randperm(shape[0], generator=generator).to(type.dtype.torch))
    return made


def test_every_rule_has_its_cases() -> None:
    assert set(CASES) == set(FOLDS)


@pytest.mark.parametrize("rule", CASES)
def test_fold(rule: str) -> None:
    (arguments, lines, left), _ = CASES[rule]
    m = module(text(arguments, lines))
    before = interpret(m, {}, *inputs(m))
    runs = run("canonicalise", m)
    assert runs[0].fired.get(rule) == 1, runs[0].misses
    assert " ".join(op_names(m)) == left
    assert torch.equal(before, interpret(m, {}, *inputs(m)))
    assert all(op.origin.startswith("canonicalise(") for op in m["forward"].ops if op.name != "mul")


@pytest.mark.parametrize(
    ("rule", "arguments", "lines", "reason"),
    [(rule, *miss) for rule, (_, misses) in CASES.items() for miss in misses],
)
def test_near_miss(rule: str, arguments: str, lines: list[str], reason: str) -> None:
    m = module(text(arguments, lines))
    before = interpret(m, {}, *inputs(m))
    runs = run("canonicalise", m)
    assert rule not in runs[0].fired
    assert reason in reasons(runs, rule)
    assert torch.equal(before, interpret(m, {}, *inputs(m)))


def test_combine_plus_rounds_once() -> None:
    """bf16: the sum and the addend are rounded together, which is nearer to the exact value."""
    lines = ["%a = combine(%r, %s, %w) {to=bf16} : bf16[N,4]", "%y = add(%a, %v) : bf16[N,4]"]
    m = module(text(f"{COMBINE}, %v: bf16[N,4]", lines))
    args = inputs(m)
    before = interpret(m, {}, *args)
    exact_module = module(text(f"{COMBINE}, %v: f32[N,4]", [line.replace("bf16", "f32") for line in lines]))
    exact = interpret(exact_module, {}, *args[:3], args[3].float())
    run("canonicalise", m)
    after = interpret(m, {}, *args)
    assert op_names(m) == ["combine"]
    assert torch.equal(after, exact.bfloat16())
    assert float((after.float() - exact).abs().max()) <= float((before.float() - exact).abs().max())


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("combine-dtype", "%y = combine(%r, _, %w) {to=f32} : f32[N,4]"),
        ("cast-combine", "%a = combine(%r, _, %w) : f32[N,4];%y = cast(%a) {to=bf16} : bf16[N,4]"),
        ("combine-plus", "%a = combine(%r, _, %w) : f32[N,4];%y = add(%v, %a) : f32[N,4]"),
    ],
)
def test_folds_of_a_combine_in_slot_order(rule: str, more: str) -> None:
    """What permute-fusion leaves folds as what it took."""
    m = module(text("%r: f32[2*N,4], %w: f32[N,2], %v: f32[N,4]", more.split(";")))
    args = inputs(m)
    before = interpret(m, {}, *args)
    runs = run("canonicalise", m)
    assert runs[0].fired.get(rule) == 1
    assert op_names(m) == ["combine"]
    assert torch.equal(before, interpret(m, {}, *args))
