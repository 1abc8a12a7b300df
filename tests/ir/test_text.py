"""Printing and parsing are each other's inverse, on generated modules and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import MoecError, ParseError, SourceLoc, UnknownOp
from moec.ir import OPS, Interpreter, Module, parse_module, print_module, read_module, verify
from moec.ir.ops.attention import PagedCache
from moec.ir.scaled import Scaled
from tests.strategies_ir import DRAW, Case, cases

LINEAR = """\
moec.ir 1 func @moe(%x: bf16[T,7168]) -> f32[T,256] target=sm_90a sym={T<=4096}
  param $gate.weight: bf16[256,7168]
  %logits = linear(%x, $gate.weight) {acc=f32} : f32[T,256] ; 15.0GF 66.6MB deepseek.py:41 <fuse(%a,%b)
  return %logits
end
"""


def bits(value: Any) -> Any:
    """Something that compares equal exactly where every bit does, NaN included."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()
    if isinstance(value, Scaled):
        return bits(value.q), bits(value.scale), value.block
    if isinstance(value, PagedCache):
        return {layer: bits(pages) for layer, pages in value.layers.items()}
    return value


def run(module: Module, case: Case) -> Any:
    return [bits(v) for v in Interpreter(module, case.weights).run("main", *case.args)]


@given(cases())
def test_print_parse_print_is_the_identity_and_keeps_every_bit(case: Case) -> None:
    verify(case.module)
    text = print_module(case.module)
    parsed = parse_module(text)
    verify(parsed)
    assert print_module(parsed) == text
    bare = print_module(case.module, derived=False)
    assert print_module(parse_module(bare), derived=False) == bare
    assert run(parsed, case) == run(case.module, case)


@settings(max_examples=settings.default.max_examples // 4)
@given(st.data())
@pytest.mark.parametrize("name", sorted(DRAW))
def test_each_op_survives(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(ops=(name,), most=1))
    text = print_module(case.module)
    assert f"{name}(" in text or f"{name} @" in text
    parsed = parse_module(text)
    assert print_module(parsed) == text
    assert run(parsed, case) == run(case.module, case)


@given(cases())
def test_a_clone_is_alike_and_apart(case: Case) -> None:
    text = print_module(case.module)
    clone = case.module.clone()
    assert print_module(clone) == text
    assert run(clone, case) == run(case.module, case)
    clone["main"].ret()
    assert print_module(case.module) == text != print_module(clone)


def test_the_design_s_example_is_a_fixed_point() -> None:
    assert print_module(parse_module(LINEAR)) == LINEAR


def test_what_follows_a_semicolon_means_nothing() -> None:
    lines = LINEAR.splitlines()
    lines.insert(1, "; a line of its own")
    noisy = "\n".join(line if ";" in line else line + " ; and {more = (" for line in lines)
    assert print_module(parse_module(noisy)) == LINEAR


@pytest.mark.parametrize("name", ["my model.py", "<stdin>", "noending", "ünï;code.py"])
def test_any_file_s_name_survives(name: str) -> None:
    module = parse_module(LINEAR)
    op = module["moe"].ops[0]
    op.loc = SourceLoc(f"/some/where/{name}", 7)
    text = print_module(module)
    assert ":7 <fuse(%a,%b)" in text
    assert print_module(parse_module(text)) == text


# Mistakes: the text with one thing changed, and what must be said about which line.
MISTAKES = [
    ("moec.ir 1", "moec.ir 2", 1, "this is IR version 2; this moec reads version 1"),
    ("moec.ir 1", "graph", 1, "IR starts with"),
    ("T<=4096", "T<4096", 1, "'T<4096' is no bound of a symbol"),
    ("%x: bf16[T,7168]", "%x bf16[T,7168]", 1, "is no argument"),
    ("%x: bf16[T,7168]", ": bf16[T,7168]", 1, "is no argument"),
    ("%x: bf16[T,7168]", "%x: bf16[T,7168], %x: index", 1, "%x is defined twice"),
    ("-> f32[T,256]", "-> f32[T,255]", 1, "says it returns f32[T,255], but returns (f32[T,256])"),
    ("param $gate", "param gate", 2, "is no parameter"),
    ("bf16[256,7168]", "b16[256,7168]", 2, "no dtype is called 'b16'"),
    ("bf16[256,7168]", "bf16[256,7168,]", 2, "is no dimension"),
    ("bf16[256,7168]", "bf16[256,,7168]", 2, "is no dimension"),
    ("bf16[256,7168]", "bf16[256~2~3,7168]", 2, "is no axis"),
    ("bf16[256,7168]", "bf16[-256,7168]", 2, "-256 is no size"),
    ("bf16[256,7168]", "bf16[256,7168//0]", 2, "must be a positive number"),
    ("bf16[256,7168]", "cache<bf16[,], page=3>", 2, "is no type"),
    ("bf16[256,7168]", "cache<bf16[5], page=0>", 2, "must be positive"),
    ("linear(", "liner(", 3, "no op is called 'liner'; did you mean linear"),
    ("linear(", "linear @moe(", 3, "linear runs no body: @moe has no place here"),
    ("linear(", "call(", 3, "a loop names its body"),
    ("linear(", "return(", 3, "'return %value, ...' ends a function"),
    ("linear(%x", "linear(%y", 3, "%y isn't defined above"),
    ("linear(%x", "linear(_", 3, "linear: operand x is missing"),
    ("$gate.weight) {", "$gate.weight, %x, %x) {", 3, "linear: takes 3 operands, got 4"),
    ("%logits = linear", "%x = linear", 3, "%x is defined twice"),
    ("%logits = linear", "logits = linear", 3, "is no op"),
    ("%logits = linear", "%a, %a = linear", 3, "%a is defined twice"),
    ("%logits = linear", "%a, %b = linear", 3, "linear has 1 results, not 2"),
    ("{acc=f32}", "{acc=f33}", 3, "linear: acc=f33 is no dtype"),
    ("{acc=f32}", "{acc}", 3, "'acc' is no attribute"),
    ("{acc=f32}", "{acc=f32", 3, "are no attributes"),
    ("{acc=f32}", "{acc=f32} more", 3, "are no attributes"),
    ("{acc=f32}", "{acc=f32, acc=f32}", 3, "acc is given twice"),
    ("{acc=f32}", "{ac=f32}", 3, "no attribute is called 'ac'; did you mean acc"),
    (" : f32[T,256] ;", " : bf16[T,256] ;", 3, "linear: %logits is written as bf16[T,256] but is f32[T,256]"),
    (" : f32[T,256] ;", " ;", 3, "1 results but 0 types"),
    ("return %logits", "return %x", 1, "but returns (bf16[T,7168])"),
    ("return %logits", "return %logits\n  return %logits", 5, "'return' is followed by 'end'"),
    ("return %logits", "return %gone", 4, "%gone isn't defined above"),
    ("end\n", "", 4, "no 'end'"),
    ("end\n", "end\nfunc @moe() -> ()\nend\n", 7, "two functions are called @moe"),
]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"), MISTAKES, ids=[f"{o}|{n}" for o, n, *_ in MISTAKES]
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, line: int, message: str) -> None:
    assert old in LINEAR
    with pytest.raises(MoecError) as caught:
        parse_module(LINEAR.replace(old, new, 1), "edited.moec")
    assert message in caught.value.message
    assert f"--> edited.moec:{line}" in str(caught.value)


def test_the_design_s_message() -> None:
    text = LINEAR.replace("bf16[256,7168]", "bf16[256,7186]")
    with pytest.raises(MoecError) as caught:
        parse_module(text, "x.moec")
    assert str(caught.value) == (
        "error[M0203] linear: K is 7168 in %x but 7186 in $gate.weight\n"
        "  --> x.moec:3:20\n"
        "   |   %logits = linear(%x, $gate.weight) {acc=f32} : f32[T,256] ; "
        "15.0GF 66.6MB deepseek.py:41 <fuse\n"
        "   |                    ^"
    )


@pytest.mark.parametrize(
    ("old", "new", "token"),
    [
        ("T<=4096", "T<4096", "T<4096"),
        ("%x: bf16[T,7168]", "%x: bf16[T,7168], %x: index", "%x"),
        ("-> f32[T,256]", "-> f32[T,255]", "-> f32[T,255]"),
        ("bf16[256,7168]", "b16[256,7168]", "b16"),
        ("linear(", "liner(", "liner"),
        ("linear(", "linear @moe(", "@moe"),
        ("linear(%x", "linear(%y", "%y"),
        ("linear(%x", "linear(%logits", "%logits,"),
        ("$gate.weight) {", "$gate.weight, %x, %x) {", "linear"),
        ("{acc=f32}", "{acc=f33}", "acc"),
        ("{acc=f32}", "{ac=f32}", "ac="),
        (" : f32[T,256] ;", " : bf16[T,256] ;", "bf16[T,256]"),
        ("return %logits", "return %gone", "%gone"),
    ],
)
def test_the_caret_stands_below_the_mistake(old: str, new: str, token: str) -> None:
    assert LINEAR.count(old) >= 1
    with pytest.raises(MoecError) as caught:
        parse_module(LINEAR.replace(old, new), "edited.moec")
    *_, line, caret = str(caught.value).splitlines()
    assert line[caret.index("^") :].startswith(token), str(caught.value)
    assert caught.value.loc is not None and caught.value.loc.column == caret.index("^") - 4


def test_a_long_line_is_cut_around_the_caret() -> None:
    args = ", ".join(f"%argument{i}: bf16[T,7168]" for i in range(40))
    text = f"moec.ir 1 func @f({args}) -> bf16[T,7168]\n  return %gone\nend\n"
    with pytest.raises(MoecError) as caught:
        parse_module(text.replace("%argument20: bf16", "%argument20: bf17"), "x.moec")
    *_, line, caret = str(caught.value).splitlines()
    assert len(line) < 110 and line[caret.index("^") :].startswith("bf17") and "%argument20" in line


def test_a_file_that_cannot_be_read(tmp_path: Any) -> None:
    with pytest.raises(ParseError, match="can't read the IR"):
        read_module(tmp_path / "absent.moec")
    (tmp_path / "bytes.moec").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ParseError, match="can't read the IR"):
        read_module(tmp_path / "bytes.moec")
    (tmp_path / "empty.moec").write_text("\n")
    with pytest.raises(ParseError, match="empty"):
        read_module(tmp_path / "empty.moec")
    (tmp_path / "good.moec").write_text(LINEAR)
    assert print_module(read_module(tmp_path / "good.moec")) == LINEAR


SEEDS = [
    LINEAR,
    """\
moec.ir 1 module @m target=cpu sym={N<=8}

func @body(%l: index, %c: cache<bf16[2,4], page=4>, %e: bf16[N,2,4], %s: i32[N]) -> cache<bf16[2,4], page=4>
  %c2 = cache_write(%c, %l, %e, %s) : cache<bf16[2,4], page=4>
  return %c2
end

func @step(%c: cache<bf16[2,4], page=4>, %e: bf16[N,2,4], %s: i32[N], %n: i32[N//2]) -> ()
  param $codes: f8e4m3[8*N~4,64]@host
  param $experts.*.w: f8e4m3[256@ep,130]@s128x128
  %c2 = call @body(%c, %e, %s) {layers=0..3, scope="a \\"b;{.*"} : cache<bf16[2,4], page=4>
  %a, %b = split(%e) {axis=1, sizes=[1,1]} : bf16[N,1,4], bf16[N,1,4]
  %r = reshape(%a) {shape=[4*N]} : bf16[4*N]
  %o = prefix_sum(%n) : i32[N//2+1]
  %cos, %sin = rope_table(%s) {dim=4, theta=10000.0} : f32[N,2], f32[N,2]
  bind(%r) {param=x}
  return
end
""",
]


@st.composite
def mutations(draw: Any) -> str:
    """Valid text with characters or lines deleted, doubled, swapped or put in."""
    text: str = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 4))):
        pieces = text.splitlines(keepends=True) if draw(st.booleans()) else list(text)
        at = draw(st.integers(0, len(pieces) - 1))
        kind = draw(st.sampled_from(["delete", "double", "swap", "insert"]))
        other = draw(st.integers(0, len(pieces) - 1))
        if kind == "delete":
            del pieces[at]
        elif kind == "double":
            pieces.insert(at, pieces[at])
        elif kind == "swap":
            pieces[at], pieces[other] = pieces[other], pieces[at]
        else:
            pieces.insert(at, draw(st.sampled_from('%$@(){}[]<>,:;="_-*/~ \n\x00\u0660' + "0129aN")))
        text = "".join(pieces) or " "
    return text


@given(mutations())
def test_edited_text_is_read_or_refused_but_never_crashes(text: str) -> None:
    try:
        module = parse_module(text, "fuzz.moec")
        verify(module)
    except MoecError as error:
        assert error.exit_code == 1 and str(error).startswith("error[M02")
        return
    printed = print_module(module)
    assert print_module(parse_module(printed)) == printed


def test_the_seeds_are_valid() -> None:
    for text in SEEDS:
        module = parse_module(text)
        verify(module)
        assert (
            print_module(module, derived=False)
            == "\n".join(line.split(" ; ")[0] for line in text.splitlines()) + "\n"
        )


def test_an_unknown_op_is_one() -> None:
    assert "linear" in OPS
    with pytest.raises(UnknownOp):
        parse_module(LINEAR.replace("linear(", "qwertz("))
