"""Names from users and files must never become code."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.emit import emit_python
from moec.codegen.render import Names, identifier, number, prose, quote, quote_format
from moec.errors import SourceLoc
from moec.ir import Builder, Function, Module, Range, TensorType
from moec.ir.op import op_class
from moec.ir.types import IndexType, f32, symbol
from moec.ir.weights import weights_of
from tests.codegen.emission import Emitted, emitted

N = symbol("N")
BOMB = 'breakpoint("boom")'
HOSTILE = [
    f'x"; {BOMB}; "',
    f"x'; {BOMB}; '",
    f'"""\n{BOMB}\n"""',
    f"x\n{BOMB}",
    f"x\r{BOMB}",
    f"x\x0c{BOMB}\u2028{BOMB}\x00",
    f"{{{BOMB}}}",
    f"x.{{0}}{{{BOMB}!r}}*",
    'back\\slash\\"',
    "x\\",
    "größe",
    "\ud800",
]
texts = st.text() | st.text(alphabet="\"'\\\n\r{}*#\x00\u2028 aé()") | st.sampled_from(HOSTILE)


# The functions that all of it goes through.
@given(texts)
def test_a_quoted_name_reads_back(text: str) -> None:
    assert ast.literal_eval(quote(text)) == text
    assert quote(text).isascii() and "\n" not in quote(text)


@given(texts, st.integers(0, 9))
def test_a_quoted_pattern_reads_back(text: str, e: int) -> None:
    assert eval(quote_format(text, "e"), {"e": e}) == text.replace("*", str(e), 1)


@given(texts)
def test_prose_stays_within_comments_and_docstrings(text: str) -> None:
    tree = ast.parse(f'"""{prose(text)} for cpu."""\nx = 1  # {prose(text)}\n# {prose(text)}\n')
    assert len(tree.body) == 2


@given(st.lists(st.sampled_from(["a.b", "a_b", "a-b", "for", "", "1", "é", "_", "None", "a b"]) | texts))
def test_names_are_identifiers_each_used_once(wishes: list[str]) -> None:
    names = Names({"taken"})
    given_out = [names.add(i, wish) for i, wish in enumerate(wishes)]
    assert len(set(given_out)) == len(given_out)
    for name in given_out:
        ast.parse(f"{name} = 1")
        assert name.isidentifier() and name.isascii() and name != "taken"
    assert all(identifier(w).isidentifier() for w in wishes)


@given(st.floats(allow_nan=False))
def test_numbers_read_back(value: float) -> None:
    assert eval(number(value)) == value


# Whole modules.
def module(text: str) -> tuple[Module, dict[str, torch.Tensor]]:
    """``text`` wherever a user's text can be, past the verifier: a parameter and a family, what is bound, a
    scope, a value, a function, an argument, the model, a symbol, a source line.
    """
    m = Module(text, "cpu", {"N": 8})
    m.name = text
    square, x_type = TensorType(f32, (2, 2)), TensorType(f32, (symbol(text), 2))
    body = m.add(Function(f"body {text}", [("layer", IndexType()), (text, x_type)]))
    b = Builder(m, body, f32)
    b._scope = ""
    body.ret(b.linear(body.args[1], b.param(text, (2, 2)), out=text))
    forward = m.add(Function("forward", [(text, x_type)]))
    attrs = {"callee": body.name, "carry": 1, "scope": text.replace("*", ""), "layers": Range(0, 0)}
    call = op_class("call")([forward.args[0]], attrs, SourceLoc(text, 3))
    forward.create(call, [text])
    load = weights_of(m, "forward")
    family = load.param(f"{text.replace('*', '')}.*", square)
    stack = load.create(op_class("stack")([family], {"experts": Range(0, 1)}, SourceLoc(text, 3)), [text])
    load.create(op_class("bind")(stack.results, {"param": f"bound {text}"}))
    bound = forward.param(f"bound {text}", TensorType(f32, (2, 2, 2)))
    w = op_class("reshape")([bound], {"shape": (4, 2)})
    forward.create(w, [text])
    forward.ret(Builder(m, forward, f32).linear(call.results[0], w.results[0]))
    scope = f"{attrs['scope']}." if attrs["scope"] else ""
    weights = {f"{text.replace('*', '')}.{e}": torch.eye(2) for e in (0, 1)}
    return m, weights | {scope + text: torch.eye(2)}


@pytest.fixture
def no_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(*args: Any) -> None:
        raise AssertionError("a name was run as code")

    monkeypatch.setattr(builtins, "breakpoint", boom)


@pytest.mark.parametrize("text", HOSTILE[:-1], ids=range(len(HOSTILE) - 1))
def test_no_name_becomes_code(text: str, no_bomb: None, tmp_path: Path) -> None:
    if "*" in text:  # a star is a loop's number: in a family only
        text = text.replace("*", "")
    m, weights = module(text)
    for path, source in emit_python(m, "cpu", "0").items():
        calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(source, path)) if isinstance(n, ast.Call)]
        assert "breakpoint" not in calls, path
    x = torch.tensor([[1.0, 2.0]])
    (y,) = Emitted(tmp_path, m, weights).run(x)
    assert y.tolist() == [[1.0, 2.0, 1.0, 2.0]]


# Names that are Python's, moec's or each other's.
def layered(function: str, value: str) -> tuple[Module, dict[str, torch.Tensor]]:
    """A body called ``function`` whose values are all called ``value``; two kernels of one template."""
    m = Module("tests", "cpu", {"N": 8})
    x_type = TensorType(f32, (N, 2))
    body = m.add(Function(function, [("layer", IndexType()), (value, x_type)]))
    b = Builder(m, body, f32)
    w = b.param("w", (2,))
    y = b.rms_norm(b.rms_norm(body.args[1], w, eps=1e-6, out=value), w, eps=1e-3, out=value)
    body.ret(b.add(b.linear(y, b.param("v", (2, 2)), out=value), body.args[1], out=value))
    forward = m.add(Function("forward", [(value, x_type)]))
    attrs = {"callee": function, "carry": 1, "scope": "l.*", "layers": Range(0, 1)}
    call = op_class("call")([forward.args[0]], attrs)
    forward.create(call, [value])
    forward.ret(*call.results)
    return m, {f"l.{i}.{n}": t for i in (0, 1) for n, t in (("w", torch.ones(2)), ("v", torch.eye(2)))}


CLASHES = [
    "rms_norm",
    "rms_norm_2",
    "torch",
    "F",
    "params",
    "range",
    "forward",
    "layer",
    "kernels",
    "def",
    "x.1",
]


@pytest.mark.parametrize("function", [c for c in CLASHES if c != "forward"])
@pytest.mark.parametrize("value", CLASHES)
def test_names_that_clash_are_told_apart(function: str, value: str) -> None:
    x = torch.tensor([[1.0, 3.0]])
    m, weights = layered(function, value)
    plain, _ = layered("body", "v")
    assert torch.equal(emitted(m, weights, x)[0], emitted(plain, weights, x)[0])


def test_functions_whose_names_become_one_are_told_apart() -> None:
    m = Module("tests", "cpu", {"N": 8})
    x_type = TensorType(f32, (N, 2))
    forward = Function("forward", [("x", x_type)])
    value: Any = forward.args[0]
    for name, factor in (("layer.moe", 2), ("layer_moe", 3), ("layer-moe", 5)):
        body = m.add(Function(name, [("layer", IndexType()), ("x", x_type)]))
        y: Any = body.args[1]
        b = Builder(m, body, f32)
        for _ in range(factor - 1):
            y = b.add(y, body.args[1])
        body.ret(y)
        call = op_class("call")([value], {"callee": name, "carry": 1, "scope": name, "layers": Range(0, 0)})
        (value,) = forward.create(call, ["x"]).results
    forward.ret(value)
    m.add(forward)
    (y,) = emitted(m, {}, torch.ones(1, 2))
    assert y.tolist() == [[30.0, 30.0]]
