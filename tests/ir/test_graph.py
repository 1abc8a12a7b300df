"""The graph API: what changes, who is told, and the order of ops after a rewrite."""

from __future__ import annotations

from typing import Any

import pytest

from moec.errors import IRError, SourceLoc, SpecError, TypeMismatch
from moec.ir import (
    Builder,
    Function,
    Module,
    Op,
    Range,
    TensorType,
    Value,
    parse_module,
    print_module,
    verify,
)
from moec.ir.op import Param, op_class
from moec.ir.ops.control import Return
from moec.ir.text import print_function
from moec.ir.types import IndexType, bf16, f32, symbol

N = symbol("N")
X = TensorType(f32, (N, 4))


def chain() -> tuple[Function, Builder]:
    """a = sigmoid(x); b = add(a, a); c = mul(b, x); return c."""
    function = Function("f", [("x", X)])
    b = Builder(Module("m"), function, f32)
    (x,) = function.args
    a = b.sigmoid(x, out="a")
    function.ret(b.mul(b.add(a, a, out="b"), x, out="c"))
    return function, b


def names(function: Function) -> list[str]:
    return [r.name for op in function.ops for r in op.results]


class Log:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def created(self, function: Function, op: Op) -> None:
        assert op in function.ops or isinstance(op, Return)
        self.events.append(("created", repr(op)))

    def erased(self, function: Function, op: Op) -> None:
        assert op not in function.ops
        self.events.append(("erased", repr(op)))

    def replaced(self, function: Function, old: Value, new: Value) -> None:
        assert not function.uses(old)
        self.events.append(("replaced", f"{old.text} {new.text}"))


def test_uses_are_in_the_ops_order() -> None:
    function, _ = chain()
    a, c = function.named("a"), function.named("c")
    assert [(op.name, number) for op, number in function.uses(a)] == [("add", 0), ("add", 1)]
    assert [op.name for op in function.users(function.args[0])] == ["sigmoid", "mul"]
    assert [op.name for op in function.users(c)] == ["return"]
    assert function.outputs == (c,)
    assert {getattr(n, "name", n) for n in function.ancestors([function.named("b").op])} == {  # type: ignore[attr-defined]
        "add",
        "sigmoid",
        "x",
    }
    with pytest.raises(KeyError):
        function.named("z")
    add = function.named("b").op  # type: ignore[attr-defined]
    early = function.create(op_class("clamp")([a], {"lo": 0.0, "hi": 1.0}), before=add)
    assert function.uses(a)[0] == (early, 0)


def test_listeners_hear_of_every_change_after_it() -> None:
    function, b = chain()
    log = Log()
    function.listeners.append(log)
    a, x = function.named("a"), function.args[0]
    new = b.clamp(x, lo=0.0, hi=1.0, out="n")
    function.replace(a, new)
    function.erase(a.op)  # type: ignore[attr-defined]
    function.ret(new)
    assert log.events == [
        ("created", "%n = clamp(%x)"),
        ("replaced", "%n %a"),  # the names are swapped by now
        ("erased", "%n = sigmoid(%x)"),
        ("erased", "return = return(%c)"),
        ("created", "return = return(%a)"),
    ]


def test_a_replacement_takes_over_the_name() -> None:
    function, b = chain()
    a = function.named("a")
    function.replace(a, b.clamp(function.args[0], lo=0.0, hi=1.0, out="n"))
    assert function.named("a").op.name == "clamp"  # type: ignore[attr-defined]
    function.replace(function.named("b"), function.named("c"), keep_name=False)
    assert function.named("b").op.name == "add"  # type: ignore[attr-defined]


def test_ops_are_put_in_order_again_after_a_rewrite() -> None:
    function, b = chain()
    late = b.sigmoid(function.args[0], out="late")  # stands last, but will be used first
    assert names(function) == ["a", "b", "c", "late"]
    function.replace(function.named("a"), late, keep_name=False)
    assert names(function) == ["a", "late", "b", "c"]
    function.erase(function.named("a").op)  # type: ignore[attr-defined]
    module = Module("m")
    module.add(function)
    verify(module)
    assert print_module(parse_module(print_module(module))) == print_module(module)


def test_a_reader_of_state_stays_before_its_successor() -> None:
    text = """\
moec.ir 1 func @f(%c: CACHE, %l: index, %x: f32[N,4], %s: i32[N], %t: i32[B,P], %n: i32[B]) -> (ROWS, CACHE)
  %e = cache_read(%c, %l, %t, %n) : ROWS
  %c2 = cache_write(%c, %l, %x, %s) : CACHE
  return %e, %c2
end
""".replace("CACHE", "cache<f32[4], page=2>").replace("ROWS", "f32[S,4]")
    module = parse_module(text)
    function = module["f"]
    read = function.named("e").op  # type: ignore[attr-defined]
    lens = function.create(op_class("add")([function.args[5], function.args[5]]), ["more"])
    function.set_operand(
        read, 3, lens.results[0]
    )  # now the read depends on an op that stands after the write
    assert names(function) == ["more", "e", "c2"]
    verify(module)


def test_a_value_that_depends_on_itself_is_refused() -> None:
    function, b = chain()
    a = function.named("a")
    function.replace(a, b.mul(a, a))
    with pytest.raises(IRError, match=r"@f: an op depends on its own result"):
        _ = function.ops


def test_creation_before_an_op() -> None:
    function, _ = chain()
    (x,) = function.args
    add = function.named("b").op  # type: ignore[attr-defined]
    function.create(op_class("sigmoid")([x]), ["early"], before=add)
    assert names(function) == ["a", "early", "b", "c"]
    stranger, _ = chain()
    with pytest.raises(IRError, match="isn't in it"):
        function.create(op_class("sigmoid")([x]), before=stranger.ops[0])


def test_values_of_other_functions_are_refused() -> None:
    function, _ = chain()
    other, _ = chain()
    foreign = other.named("a")
    before = print_function(function)
    with pytest.raises(IRError, match="%a belongs to another function"):
        function.create(op_class("sigmoid")([foreign]))
    with pytest.raises(IRError, match="%a belongs to another function"):
        function.ret(foreign)
    with pytest.raises(IRError, match="%a belongs to another function"):
        function.set_operand(function.ops[0], 0, foreign)
    with pytest.raises(IRError, match="%a belongs to another function"):
        function.replace(function.named("a"), foreign)
    assert print_function(function) == before


def test_what_is_in_use_stays() -> None:
    function, _ = chain()
    with pytest.raises(IRError, match="%a is still in use"):
        function.erase(function.named("a").op)  # type: ignore[attr-defined]
    param = function.param("w", X)
    function.create(op_class("add")([param, param]), ["d"])
    with pytest.raises(IRError, match=r"\$w is still in use"):
        function.drop_param("w")
    function.erase(function.named("d").op)  # type: ignore[attr-defined]
    function.drop_param("w")
    assert "w" not in function.params
    with pytest.raises(IRError, match="%x is still in use"):
        function.drop_argument(function.args[0])


def test_a_replacement_must_have_the_same_type() -> None:
    function, b = chain()
    with pytest.raises(IRError, match=r"%a is f32\[N,4\] and can't become %y, a bf16\[N,4\]"):
        function.replace(function.named("a"), b.cast(function.args[0], bf16, out="y"))


def test_names_are_unique_and_come_back() -> None:
    function, b = chain()
    (x,) = function.args
    assert b.sigmoid(x, out="a").name == "a.1"
    again = b.sigmoid(x, out="a")
    assert again.name == "a.2"
    function.erase(again.op)
    assert b.sigmoid(x, out="a").name == "a.2"
    assert [v.name for v in b.split(x, sizes=(1, 1, 2))] == ["part", "part.1", "part.2"]
    assert [v.name for v in b.split(x, sizes=(2, 2), out=("l", "r"))] == ["l", "r"]


def test_a_parameter_has_one_type() -> None:
    _, b = chain()
    with b.scope("layers"), b.scope("0"):
        w = b.param("w", (4, 4))
        assert w is b.param("w", (4, 4)) and w.name == "layers.0.w"
        with pytest.raises(IRError, match=r"\$layers.0.w is f32\[4,4\] here and f32\[4,5\] there") as caught:
            b.param("w", (4, 5))
    assert caught.value.loc is not None and caught.value.loc.file == __file__
    assert b.param("w", (4, 4)).name == "w"


def test_an_error_points_at_the_line_that_asked_for_the_op() -> None:
    _, b = chain()

    class Block:
        def lower(self, x: Value) -> Any:
            return b.linear(x, b.param("w", (8, 5)))

    with pytest.raises(TypeMismatch) as caught:
        Block().lower(b.function.args[0])
    line = Block.lower.__code__.co_firstlineno + 1
    assert str(caught.value) == (
        f"error[M0203] linear: K is 4 in %x but 5 in $w\n  --> {__file__}:{line}  Block.lower"
    )


def test_a_loop_s_body_must_return_what_it_carries() -> None:
    function, b = chain()
    (x,) = function.args

    def wrong(inner: Builder, number: Value, held: Value) -> tuple[Value]:
        return (inner.cast(held, bf16),)

    def right(inner: Builder, number: Value, held: Value, factor: Value) -> tuple[Value]:
        assert isinstance(number.type, IndexType)
        return (inner.mul(held, factor),)

    with pytest.raises(SpecError, match=r"wrong: takes x as f32\[N,4\] but returns it as bf16\[N,4\]"):
        b.loop("call", Range(0, 2), "layers.*", "wrong", [x], [], wrong)
    b.module.remove("wrong")
    (out,) = b.loop("call", Range(0, 2), "layers.*", "right", [x], [x], right)
    assert out.type == X and out.op.scope == "layers.*"  # type: ignore[attr-defined]
    b.module.add(function)
    verify(b.module)
    assert b.module.callers("right") == [(function, out.op)]  # type: ignore[attr-defined]
    with pytest.raises(IRError, match=r"@right is still run by %x\.1 = call"):
        b.module.remove("right")


def test_a_loop_without_scope_keeps_the_names() -> None:
    _, b = chain()
    with b.scope("model"):
        body = b.module.add(Function("body", [("layer", IndexType())]))
        body.ret()
        b.run("call", body, Range(0, 1), "", [], [])
        b.run("call", body, Range(0, 1), "layers.*", [], [])
    plain, numbered = b.function.ops[-2:]
    assert (plain.prefix(1), numbered.prefix(1)) == ("model.", "model.layers.1.")  # type: ignore[attr-defined]


def test_modules_refuse_two_functions_of_one_name_and_unknown_ones() -> None:
    module = Module("m")
    module.add(Function("f"))
    with pytest.raises(IRError, match="two functions are called @f"):
        module.add(Function("f"))
    with pytest.raises(IRError, match="no function is called @g; there are @f"):
        _ = module["g"]
    assert "f" in module and "g" not in module


def test_families_and_places() -> None:
    assert Param("experts.*.w", X).text == "$experts.*.w"
    assert str(SourceLoc("a/b.py", 3, "f")) == "a/b.py:3  f"
    assert SourceLoc("a/b c.py", 3).short == "b_c.py:3"
