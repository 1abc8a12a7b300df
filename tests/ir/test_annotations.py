"""What any op may carry beside its attributes: read and written, and no matter to what is computed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import AttributeMismatch, MoecError
from moec.ir import Interpreter, Module, parse_module, print_module
from moec.ir.attrs import STR
from moec.ir.op import ANNOTATIONS, Op, attr
from moec.passes.cleanup import merge_equal_ops
from moec.passes.pattern import Match, P, match
from tests.strategies_ir import Case, cases

NOTES = st.fixed_dictionaries(
    {},
    optional={
        "kernel": st.text(),
        "schedule": st.text(),
        "buffer": st.lists(st.none() | st.integers(0, 99), min_size=1, max_size=3).map(tuple),
    },
)
TEXT = """moec.ir 1 func @forward(%x: f32[N,4]) -> f32[N,4] target=cpu
  %a = sigmoid(%x) {buffer=0, kernel=torch.sigmoid} : f32[N,4]
  %b = sigmoid(%x) {schedule="<4 rows: rows 16x64x32 w4 s3; a \\"b\\""} : f32[N,4]
  %c, %d = split(%a) {buffer=[_,2], sizes=[1,3]} : f32[N,1], f32[N,3]
  %y = add(%a, %b) : f32[N,4]
  return %y
end
"""


def module() -> Module:
    return parse_module(TEXT)


@given(cases(most=6), st.data())
def test_any_op_carries_them_through_text_and_copies(case: Case, data: st.DataObject) -> None:
    for op in (op for f in case.module for op in f.ops):
        for key, value in data.draw(NOTES).items():
            op.annotate(key, value)
    text = print_module(case.module)
    for same in (parse_module(text), case.module.clone(), parse_module(text).clone()):
        assert print_module(same) == text
        assert [o.annotations for f in same for o in f] == [o.annotations for f in case.module for o in f]
    Interpreter(case.module, case.weights).run("main", *case.args)


def test_absent_ones_are_not_printed_and_given_ones_stand_among_the_attributes() -> None:
    m = module()
    assert print_module(m) == TEXT
    a, _, c, y = m["forward"].ops
    assert a.annotations == {"kernel": "torch.sigmoid", "buffer": (0,)}
    assert c.annotations == {"buffer": (None, 2)}
    assert not y.annotations
    assert a.annotate("kernel", None) and "kernel" not in print_module(m)
    assert not a.annotate("kernel", None) and not a.annotate("buffer", (0,))
    assert not any(key in op.attrs for op in m["forward"] for key in ANNOTATIONS)


def test_patterns_and_equality_ignore_them() -> None:
    m = module()
    a = m["forward"].ops[0]
    assert isinstance(match(P.sigmoid("x"), m, m["forward"], a), Match)
    assert merge_equal_ops(m)
    assert [op.name for op in m["forward"].ops] == ["sigmoid", "split", "add"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("buffer=0", "buffer=-1", "sigmoid: buffer must be numbers, not (-1,)"),
        ("buffer=0", "buffer=x", "sigmoid: buffer=x is no numbers"),
        (
            "kernel=torch.sigmoid",
            "kernl=torch.sigmoid",
            "no attribute is called 'kernl'; did you mean kernel?",
        ),
    ],
)
def test_mistakes_name_the_line(old: str, new: str, message: str) -> None:
    with pytest.raises(MoecError, match=re.escape(message)) as caught:
        parse_module(TEXT.replace(old, new), "edited.moec")
    assert caught.value.loc is not None and str(caught.value.loc).startswith("edited.moec:2:")


def test_no_op_has_an_attribute_of_that_name() -> None:
    with pytest.raises(RuntimeError, match="any op may carry that"):
        type("Taken", (Op,), {"kernel": attr(STR)}, name="taken")
    with pytest.raises(AttributeMismatch):
        module()["forward"].ops[0].annotate("kernel", 3)
