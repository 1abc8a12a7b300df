"""The verifier: for each rule a module that keeps it, and one that breaks it."""

from __future__ import annotations

import pytest

from moec.errors import IRError, MoecError, TypeMismatch
from moec.ir import Function, Module, Range, TensorType, parse_module, verify
from moec.ir.op import op_class
from moec.ir.types import bf16, f32, symbol

CACHE = "cache<f32[4], page=2>"
TABLES = "%t: i32[B,P], %n: i32[B]"
STEP = f"""\
moec.ir 1 module @m sym={{N<=8}}

func @layer(%layer: index, %x: f32[N,4], %c: {CACHE}, %s: i32[N], {TABLES}) -> (f32[N,4], {CACHE})
  param $w: f32[4]
  %h = rms_norm(%x, $w) {{eps=1e-06}} : f32[N,4]
  %c2 = cache_write(%c, %layer, %h, %s) : {CACHE}
  %e = cache_read(%c2, %layer, %t, %n) : f32[S,4]
  return %h, %c2
end

func @step(%x: f32[N,4], %c: {CACHE}, %s: i32[N], {TABLES}) -> (f32[N,4], {CACHE})
  %y, %d = call @layer(%x, %c, %s, %t, %n) {{layers=0..3, scope=layers.*}} : f32[N,4], {CACHE}
  return %y, %d
end
"""
READ = "  %e = cache_read(%c2, %layer, %t, %n) : f32[S,4]\n"
WRITE = f"  %c2 = cache_write(%c, %layer, %h, %s) : {CACHE}\n"


def test_the_module_is_right() -> None:
    verify(parse_module(STEP))


BROKEN = [
    # (what is replaced, by what, the complaint)
    ("call @layer", "call @gone", "@step: @gone is run but isn't there"),
    (READ, f"  %c3 = cache_write(%c, %layer, %h, %s) : {CACHE}\n", "%c has two successors"),
    ("return %h, %c2", "return %h, %c", "%c has two successors"),
    (READ, READ.replace("%c2", "%c"), "%c is read by %e = cache_read(%c, %layer, %t, %n) after %c2"),
    ("%x, %c, %s, %t, %n) {", "%x, %c, %s, %t, %t) {", "to @layer, which takes"),
    ("layers.*", "layers.*.*", "scope layers.*.* has more than one *"),
    ("%x: f32[N,4], %c", "%x: f32[N+M,4], %c", "to @layer, which takes"),
    ("0..3", "2..1", "call @layer: layers 2..1 is empty"),
    ("layers.*", "layers", "call @layer: scope layers has no *: layers 0..3 would share their parameters"),
    ("N<=8", "N<=0", "'N' <= 0 is no bound"),
]


@pytest.mark.parametrize(("old", "new", "message"), BROKEN, ids=[m for *_, m in BROKEN])
def test_what_breaks_it(old: str, new: str, message: str) -> None:
    assert old in STEP
    if "N+M" in new:  # in @step only
        head, tail = STEP.split("func @step")
        text = head + "func @step" + tail.replace("f32[N,4]", "f32[N+M,4]")
    else:
        text = STEP.replace(old, new, 1)
    module = parse_module(text)
    with pytest.raises(MoecError) as caught:
        verify(module)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers=0..3, scope=layers.*", "layers=2..2, scope=layers"),
        (", scope=layers.*", ""),
        ("N<=8", "N<=1"),
    ],
)
def test_what_does_not_break_it(old: str, new: str) -> None:
    assert old in STEP
    verify(parse_module(STEP.replace(old, new)))


@pytest.mark.parametrize(("layers", "good"), [("4..5", True), ("3..5", False), ("0..0", False)])
def test_calls_that_carry_one_cache_are_of_different_layers(layers: str, good: bool) -> None:
    call = "%y, %d = call @layer(%x, %c, %s, %t, %n) {layers=0..3, scope=layers.*}"
    again = f"%z, %e = call @layer(%y, %d, %s, %t, %n) {{layers={layers}, scope=layers.*}}"
    types = f" : f32[N,4], {CACHE}"
    assert call in STEP
    text = STEP.replace(call, f"{call}{types}\n  {again}").replace("return %y, %d", "return %z, %e")
    module = parse_module(text)
    if good:
        verify(module)
    else:
        with pytest.raises(IRError, match=f"layers {layers} carry %d, which layers 0..3 of @layer"):
            verify(module)


def test_calls_of_one_layer_with_caches_of_their_own() -> None:
    text = f"""\
moec.ir 1 module @m

func @one(%layer: index, %a: {CACHE}) -> {CACHE}
  return %a
end

func @step(%a: {CACHE}, %b: {CACHE}) -> ({CACHE}, {CACHE})
  %c = call @one(%a) {{layers=0..3}} : {CACHE}
  %d = call @one(%b) {{layers=0..3}} : {CACHE}
  return %c, %d
end
"""
    verify(parse_module(text))
    with pytest.raises(IRError, match="the two overlap"):
        verify(parse_module(text.replace("@one(%b)", "@one(%c)").replace("return %c", "return %b")))


@pytest.mark.parametrize(("experts", "good"), [("0..3", True), ("1..2", True), ("0..4", False)])
def test_a_loop_names_experts_that_the_router_knows(experts: str, good: bool) -> None:
    module = parse_module(f"""\
moec.ir 1 module @m sym={{T<=8}}

func @expert(%expert: index, %acc: f32[T,4], %x: f32[T,4], %w: f32[T,2], %id: i32[T,2]) -> f32[T,4]
  param $up: f32[4,4]
  %slot = expert_slots(%id, %expert) : i32[R]
  %rows = gather_rows(%x, %slot) {{per_row=2}} : f32[R,4]
  %y = linear(%rows, $up) : f32[R,4]
  %out = scatter_add(%acc, %y, %slot, %w) {{per_row=2}} : f32[T,4]
  return %out
end

func @forward(%x: f32[T,4], %logits: f32[T,4]) -> f32[T,4]
  %w, %id = route(%logits) {{k=2, score=softmax}} : f32[T,2], i32[T,2]
  %acc = zeros_like(%x) {{dtype=f32}} : f32[T,4]
  %y = for_each @expert(%acc, %x, %w, %id) {{experts={experts}, scope=experts.*}} : f32[T,4]
  return %y
end
""")
    if good:
        verify(module)
    else:
        with pytest.raises(IRError, match=r"experts 0\.\.4, but %id comes of a route among 4, from 0"):
            verify(module)


def test_reading_before_the_write_is_right() -> None:
    early = STEP.replace(READ, "").replace(WRITE, READ.replace("%c2", "%c") + WRITE)
    verify(parse_module(early))


def test_a_cache_passed_twice_has_two_successors() -> None:
    text = f"""\
moec.ir 1 module @m

func @two(%layer: index, %a: {CACHE}, %b: {CACHE}) -> ({CACHE}, {CACHE})
  return %a, %b
end

func @step(%a: {CACHE}, %b: {CACHE}) -> ({CACHE}, {CACHE})
  %c, %d = call @two(%a, %b) {{layers=0..3}} : {CACHE}, {CACHE}
  return %c, %d
end
"""
    verify(parse_module(text))
    with pytest.raises(IRError, match="%a has two successors"):
        verify(parse_module(text.replace("@two(%a, %b)", "@two(%a, %a)")))
    with pytest.raises(IRError, match="%c has two successors"):
        verify(parse_module(text.replace("return %c, %d", "return %c, %c")))


def test_a_cache_that_a_loop_only_reads_lives_on() -> None:
    text = f"""\
moec.ir 1 module @m

func @one(%layer: index, %a: {CACHE}, %b: {CACHE}) -> {CACHE}
  return %a
end

func @step(%a: {CACHE}, %b: {CACHE}) -> ({CACHE}, {CACHE})
  %c = call @one(%a, %b) {{layers=0..3}} : {CACHE}
  return %c, %b
end
"""
    verify(parse_module(text))
    with pytest.raises(IRError, match="%a has two successors"):
        verify(parse_module(text.replace("return %c, %b", "return %c, %a")))


def test_recursion_is_refused() -> None:
    text = """\
moec.ir 1 module @m

func @f(%layer: index, %x: f32[4]) -> f32[4]
  %y = call @g(%x) {layers=0..1} : f32[4]
  return %y
end

func @g(%layer: index, %x: f32[4]) -> f32[4]
  %y = call @f(%x) {layers=0..1} : f32[4]
  return %y
end
"""
    with pytest.raises(IRError, match="functions run each other in a circle: @f -> @g"):
        verify(parse_module(text))
    with pytest.raises(IRError, match="in a circle: @f"):
        verify(parse_module(text.replace("call @g", "call @f")))


def test_a_function_must_return() -> None:
    module = Module("m")
    module.add(Function("f"))
    with pytest.raises(IRError, match="@f doesn't return"):
        verify(module)
    module["f"].ret()
    verify(module)


@pytest.mark.parametrize(
    ("name", "good"),
    [("x", True), ("x.q-1", True), ("", False), ("a b", False), ("x\n", False), ("a,b", False)],
)
def test_names(name: str, good: bool) -> None:
    for where in ("module", "function", "argument", "parameter"):
        module = Module(name if where == "module" else "m")
        function = module.add(Function(name if where == "function" else "f"))
        function.ret()
        if where == "argument":
            function.add_argument(name, TensorType(f32, ()))
        if where == "parameter":
            function.param(name, TensorType(f32, ()))
        if good:
            verify(module)
        else:
            with pytest.raises(IRError, match="name"):
                verify(module)


def test_symbols_are_defined() -> None:
    text = """\
moec.ir 1 func @f(%x: f32[N,4]) -> f32[4*M]
  %y = reshape(%x) {shape=[4*M]} : f32[4*M]
  return %y
end
"""
    with pytest.raises(TypeMismatch, match=r"%x is f32\[N,4\], which has another number of elements than"):
        parse_module(text)
    verify(parse_module(text.replace("M", "N")))
    module = Module("m", bounds={"N": 3})
    function = module.add(Function("f"))
    function.ret(
        function.create(op_class("sigmoid")([function.param("w", TensorType(f32, (symbol("M"),)))])).results[
            0
        ]
    )
    with pytest.raises(IRError, match=r"nothing defines the symbol M of %y: f32\[M\]"):
        verify(module)
    module.bounds["M"] = 3
    verify(module)
    for bound in (0, -1):
        module.bounds["M"] = bound
        with pytest.raises(IRError, match=f"'M' <= {bound} is no bound"):
            verify(module)


def test_a_rewrite_that_leaves_stale_types_is_found() -> None:
    module = parse_module(STEP)
    layer = module["layer"]
    norm = layer.named("h").op  # type: ignore[attr-defined]
    layer.set_operand(norm, 0, layer.add_argument("wide", TensorType(bf16, (symbol("N"), 4))))
    with pytest.raises(
        TypeMismatch, match=r"rms_norm: %h is f32\[N,4\] but its operands make it bf16\[N,4\]"
    ):
        verify(module)
    layer.set_operand(norm, 0, layer.add_argument("narrow", TensorType(f32, (symbol("N"), 3))))
    with pytest.raises(TypeMismatch, match=r"rms_norm: K is 3 in %narrow but 4 in \$w"):
        verify(module)


GOOD = """\
moec.ir 1 module @m sym={N<=8}

func @f(%x: f32[N,4], %kv: cache<f32[4], page=2>, %slots: i64[N]) -> (f32[N,4], cache<f32[4], page=2>)
  %h = call @body(%x) {layers=0..1, scope=l.*} : f32[N,4] ; model.py:3
  %i = call @body(%h) {layers=2..3, scope=l.*} : f32[N,4] ; model.py:4
  return %i, %kv
end

func @body(%layer: index, %x: f32[N,4]) -> f32[N,4]
  %y = sigmoid(%x) : f32[N,4] ; model.py:9
  return %y
end
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "token"),
    [
        ("call @body(%h)", "call @bod(%h)", 5, "@bod("),
        ("layers=2..3", "layers=3..2", 5, "layers"),
        ("scope=l.*} : f32[N,4] ; model.py:4", "scope=l} : f32[N,4] ; model.py:4", 5, "scope"),
        ("  %y = sig", "  %z = call @f2(%x) {layers=0..0, scope=m.*} : f32[N,4]\n  %y = sig", 10, "@f2"),
        ("  return %y\n", "", 9, "-> f32"),
    ],
)  # fmt: skip
def test_an_edited_text_is_wrong_at_a_line_of_it(old: str, new: str, line: int, token: str) -> None:
    """Whatever the verifier finds in a module that was read is told with the line of the text."""
    verify(parse_module(GOOD))
    assert old in GOOD
    with pytest.raises(MoecError) as caught:
        verify(parse_module(GOOD.replace(old, new), "edited.moec"))
    text = str(caught.value)
    assert f"--> edited.moec:{line}:" in text, text
    shown, caret = [part for part in text.splitlines() if part.startswith("   | ")]
    assert shown[caret.index("^") :].startswith(token), text


def test_the_models_line_is_noted_beside_the_texts() -> None:
    with pytest.raises(MoecError) as caught:
        verify(parse_module(GOOD.replace("layers=2..3", "layers=3..2"), "edited.moec"))
    assert str(caught.value).splitlines()[-1] == "  of the model's line model.py:4"


def test_a_module_that_was_built_points_at_the_model_alone() -> None:
    module = parse_module(GOOD)
    for function in module:
        function.written = None
        for op in function.ops:
            op.written = None
    module["f"].ops[1].attrs["layers"] = Range(3, 2)
    with pytest.raises(MoecError) as caught:
        verify(module)
    assert str(caught.value).splitlines()[1:] == ["  --> model.py:4"]
