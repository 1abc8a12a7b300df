"""Whatever a registry holds must be complete. A new op fails here until it has all that an op needs."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import OPS, Builder, Interpreter, Op, print_module
from moec.ir.docs import PAGE, page
from moec.ir.ops.control import Loop, Return
from moec.ir.scaled import Scaled
from moec.ir.types import TensorType
from tests.ir import test_infer
from tests.strategies_ir import DRAW, cases

ROOT = Path(__file__).parents[2]
EXECUTED = {name: cls for name, cls in OPS.items() if not issubclass(cls, (Loop, Return))}


def test_the_reference_page_is_up_to_date() -> None:
    written = (ROOT / PAGE).read_text(encoding="utf-8")
    assert written == page(), "docs/ir.md is out of date: run python -m moec.ir.docs"


@pytest.mark.parametrize(("name", "cls"), OPS.items(), ids=OPS)
def test_an_op_is_documented(name: str, cls: type[Op]) -> None:
    assert inspect.cleandoc(cls.__doc__ or ""), f"{name} has no docstring"
    assert cls.__doc__ != cls.__mro__[1].__doc__
    for spec in cls.operand_specs:
        assert spec.doc, f"{name}: operand {spec.name} says nothing of its shape"
    for res in cls.result_specs:
        assert res.doc, f"{name}: result {res.name} says nothing of its shape"
    assert f"\n### {name}\n" in page()


@pytest.mark.parametrize(("name", "cls"), EXECUTED.items(), ids=EXECUTED)
def test_a_reference_takes_the_declared_operands_and_attributes(name: str, cls: type[Op]) -> None:
    if name == "bind":
        return  # the interpreter's own
    parameters = inspect.signature(cls.reference).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    assert [p.name for p in positional] == [o.name for o in cls.operand_specs]
    assert any(p.kind == p.VAR_POSITIONAL for p in positional) == any(o.variadic for o in cls.operand_specs)
    keywords = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
    assert keywords <= set(cls.attr_specs)
    assert keywords == set(cls.attr_specs) or any(p.kind == p.VAR_KEYWORD for p in parameters)


def test_every_op_has_a_strategy_and_a_case_of_inference() -> None:
    missing = set(OPS) - set(DRAW) - {"return"}
    assert not missing, f"tests/strategies_ir.py draws no {missing}"
    assert not set(OPS) - set(test_infer.GOOD) - {"return"}, "tests/ir/test_infer.py has no use of it"


@settings(max_examples=settings.default.max_examples // 5)
@given(st.data())
@pytest.mark.parametrize("name", sorted(DRAW))
def test_what_an_op_computes_has_the_types_that_it_infers_and_a_cost(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(ops=(name,), most=1))
    met = []

    def observe(function: str, op: Op, scope: str, results: tuple[object, ...]) -> None:
        met.append(op.name)
        assert len(results) == len(op.results)
        for value, got in zip(op.results, results, strict=True):
            if isinstance(value.type, TensorType):
                stored = got.q if isinstance(got, Scaled) else got
                assert isinstance(got, Scaled) == (value.type.scale is not None)
                assert isinstance(stored, torch.Tensor) and stored.dtype == value.type.dtype.torch
        for amount in (op.cost().flops, op.cost().bytes):
            assert amount >= 0 if isinstance(amount, (int, float)) else amount.free_symbols or amount >= 0

    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in case.args]
    Interpreter(case.module, case.weights, observe).run("main", *case.args)
    assert name in met
    assert " : " in print_module(case.module) or name == "bind"
    for old, new in zip(before, case.args, strict=True):  # no reference writes to its operands
        if isinstance(old, torch.Tensor):
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_the_builder_shadows_no_op() -> None:
    own = {name for name in vars(Builder) if not name.startswith("_")}
    assert own & set(OPS) == {"cast"}  # Builder.cast leaves out a cast to the same dtype
