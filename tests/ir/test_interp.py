"""The reference interpreter: sizes learned from inputs, parameters by scope, caches, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.errors import BadInput, WeightsMisshapen, WeightsMissing
from moec.ir import CacheType, Interpreter, Op, parse_module, verify
from moec.ir.types import bf16, f32

LOOP = """\
moec.ir 1 module @m

func @layer(%layer: index, %x: f32[N,2]) -> f32[N,2]
  param $w: f32[2,2]
  %y = linear(%x, $w) : f32[N,2]
  return %y
end

func @step(%x: f32[N,2]) -> f32[N,2]
  param $norm.weight: f32[2]
  %y = call @layer(%x) {layers=3..5, scope=layers.*} : f32[N,2]
  %z = rms_norm(%y, $norm.weight) {eps=1e-06} : f32[N,2]
  return %z
end
"""


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"layers.{n}.w": torch.randn(2, 2) for n in (3, 4, 5)}
    return made | {"norm.weight": torch.randn(2)}


def test_a_loop_runs_its_body_in_order_with_the_parameters_of_each_number() -> None:
    seen: list[tuple[str, str, str]] = []

    def observe(function: str, op: Op, scope: str, results: tuple[Any, ...]) -> None:
        seen.append((function, op.name, scope))
        assert len(results) == len(op.results)

    w, x = weights(), torch.randn(3, 2)
    module = parse_module(LOOP)
    verify(module)
    (found,) = Interpreter(module, w, observe).run("step", x)
    y = x @ w["layers.3.w"].T @ w["layers.4.w"].T @ w["layers.5.w"].T
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(y, (2,), w["norm.weight"], 1e-6))
    assert seen == [
        ("layer", "linear", "layers.3."),
        ("layer", "linear", "layers.4."),
        ("layer", "linear", "layers.5."),
        ("step", "call", ""),
        ("step", "rms_norm", ""),
    ]


def test_an_empty_loop_changes_nothing_and_one_without_scope_shares_parameters() -> None:
    x = torch.randn(3, 2)
    empty = LOOP.replace("3..5", "0..-1").replace("return %z", "return %y")
    (found,) = Interpreter(parse_module(empty), weights()).run("step", x)
    assert torch.equal(found, x)
    shared = LOOP.replace(", scope=layers.*", "").replace("return %z", "return %y")
    w = torch.randn(2, 2)
    (found,) = Interpreter(parse_module(shared), weights() | {"w": w}).run("step", x)
    torch.testing.assert_close(found, x @ w.T @ w.T @ w.T)


def test_weights_that_are_missing_or_misshapen() -> None:
    module, x = parse_module(LOOP), torch.randn(3, 2)
    short = weights()
    del short["layers.4.w"]
    with pytest.raises(WeightsMissing, match=r"no weight is called layers\.4\.w"):
        Interpreter(module, short).run("step", x)
    with pytest.raises(WeightsMisshapen, match=r"norm\.weight is \[3\] but f32\[2\] is wanted"):
        Interpreter(module, weights() | {"norm.weight": torch.ones(3)}).run("step", x)
    Interpreter(module, weights() | {"norm.weight": torch.ones(2).bfloat16()}).run("step", x)
    for dtype in (torch.float8_e4m3fn, torch.int64):
        with pytest.raises(
            WeightsMisshapen, match=r"norm\.weight is torch\.\w+, which can't be read as f32\[2\]"
        ):
            Interpreter(module, weights() | {"norm.weight": torch.ones(2).to(dtype)}).run("step", x)


SHAPES = """\
moec.ir 1 func @f(%off: i32[B+1], %pairs: f32[2*N,3], %n: i32[B], %wide: f32[N*B]) -> f32[6*N]
  %y = reshape(%pairs) {shape=[6*N]} : f32[6*N]
  return %y
end
"""


def shapes(off: int, pairs: int, n: int, wide: int) -> tuple[torch.Tensor, ...]:
    return torch.zeros(off).int(), torch.ones(pairs, 3), torch.zeros(n).int(), torch.zeros(wide)


def test_symbols_are_learned_wherever_they_stand() -> None:
    run = Interpreter(parse_module(SHAPES), {}).run
    (y,) = run("f", *shapes(3, 4, 2, 4))
    assert y.shape == (12,)
    (y,) = run("f", *shapes(1, 0, 0, 0))
    assert y.shape == (0,)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 4, 2, 4), r"%off is i32\[B\+1\] but got \[2\]; B = 2"),
        ((3, 5, 2, 4), r"%pairs is f32\[2\*N,3\] but got \[5, 3\]; B = 2"),  # no whole N
        ((3, 4, 2, 5), r"%wide is f32\[B\*N\] but got \[5\]; B = 2, N = 2"),
    ],
)
def test_sizes_that_contradict(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Interpreter(parse_module(SHAPES), {}).run("f", *shapes(*sizes))


def test_inputs_of_another_kind() -> None:
    run = Interpreter(parse_module(SHAPES), {}).run
    off, pairs, n, wide = shapes(3, 4, 2, 4)
    with pytest.raises(BadInput, match="@f takes 4 arguments, got 1"):
        run("f", off)
    with pytest.raises(BadInput, match=r"%pairs is f32\[2\*N,3\] but got torch.bfloat16 \[4, 3\]"):
        run("f", off, pairs.bfloat16(), n, wide)
    with pytest.raises(BadInput, match=r"%pairs is f32\[2\*N,3\] but got torch.float32 \[12\]"):
        run("f", off, pairs.flatten(), n, wide)
    with pytest.raises(BadInput, match=r"%n is i32\[B\] but got 2"):
        run("f", off, pairs, 2, wide)


@pytest.mark.parametrize(
    ("dim", "size", "message"),
    [
        ("M*N", 6, r"M\*N has more than one size that nothing says"),
        ("N//2", 3, "N//2 alone doesn't say how large N is"),
        ("N*N", 8, r"%x is f32\[N\*N\] but got \[8\]"),
        ("N*N", 9, ""),
        ("N*N-N", 2, ""),
    ],
)
def test_a_size_that_nothing_says(dim: str, size: int, message: str) -> None:
    text = f"moec.ir 1 func @f(%x: f32[{dim}]) -> f32[{dim}]\n  return %x\nend\n"
    interp, x = Interpreter(parse_module(text), {}), torch.zeros(size)
    if not message:
        assert interp.run("f", x)[0] is x
    else:
        with pytest.raises(BadInput, match=message):
            interp.run("f", x)


CACHE = """\
moec.ir 1 func @f(%c: TYPE, %l: index, %x: f32[N,2], %s: i32[N], %t: i32[B,P], %n: i32[B]) -> f32[S,2]
  %c2 = cache_write(%c, %l, %x, %s) : TYPE
  %e = cache_read(%c2, %l, %t, %n) : f32[S,2]
  return %e
end
""".replace("TYPE", "cache<f32[2], page=4>")
PAGE = CacheType(f32, (2,), 4)


def test_what_was_not_written_is_nan_and_never_read() -> None:
    interp = Interpreter(parse_module(CACHE), {})
    cache = interp.new_cache(PAGE, layers=2, pages=3)
    assert all(pages.shape == (12, 2) and pages.isnan().all() for pages in cache.layers.values())
    x = torch.randn(3, 2)
    slots = torch.tensor(
        [9, -1, 8], dtype=torch.int32
    )  # page 2, places 1 and 0; the token between is skipped
    table = torch.tensor([[2, 77], [-5, 10**6]], dtype=torch.int32)
    lens = torch.tensor([2, 0], dtype=torch.int32)
    (found,) = interp.run("f", cache, 1, x, slots, table, lens)
    assert torch.equal(found, x[[2, 0]])
    assert all(pages.isnan().all() for pages in cache.layers.values())  # the given cache is left as it was
    (found,) = interp.run("f", cache, 1, x, slots, table, lens + torch.tensor([1, 0]).int())
    assert found[2].isnan().all()  # one entry too many shows


def test_a_cache_that_does_not_fit() -> None:
    interp = Interpreter(parse_module(CACHE), {})
    rest = (0, torch.zeros(0, 2), torch.zeros(0).int(), torch.zeros(0, 1).int(), torch.zeros(0).int())
    interp.run("f", interp.new_cache(PAGE, 1, 1), *rest)
    with pytest.raises(BadInput, match=r"%c is cache<f32\[2\], page=4> but got None"):
        interp.run("f", None, *rest)
    for other in (CacheType(f32, (2,), 8), CacheType(f32, (3,), 4), CacheType(bf16, (2,), 4)):
        with pytest.raises(BadInput, match=r"%c is cache<f32\[2\], page=4> but got pages of"):
            interp.run("f", interp.new_cache(other, 1, 1), *rest)


WEIGHTS = """\
moec.ir 1 module @m

func @weights() -> ()
  param $q: f8e4m3[2,2]
  param $q_scale: f32[1,1]
  for_each @weights.expert() {experts=0..2, scope=experts.*}
  %q = scaled($q, $q_scale) {block=2x2} : f8e4m3[2,2]@s2x2
  %w = dequant(%q) {to=f32} : f32[2,2]
  bind(%w) {param=q}
  %q.again = scaled($q, $q_scale) {block=2x2} : f8e4m3[2,2]@s2x2
  %again = dequant(%q.again) {to=f32} : f32[2,2]
  bind(%again) {param=second}
  return
end

func @weights.expert(%expert: index) -> ()
  param $up: f32[2]
  param $gate: f32[2]
  %both = concat($gate, $up) {axis=0} : f32[4]
  bind(%both) {param=w13}
  return
end

func @forward(%x: f32[N,2]) -> (f32[N,2], f32[N,2], f32[3,4])
  param $q: f32[2,2]
  param $second: f32[2,2]
  param $experts.*.w13: f32[4]
  %y = linear(%x, $q) : f32[N,2]
  %z = linear(%x, $second) : f32[N,2]
  %s = stack($experts.*.w13) {experts=0..2} : f32[3,4]
  return %y, %z, %s
end
"""


def test_parameters_are_what_weights_binds_or_else_the_checkpoint_s() -> None:
    module = parse_module(WEIGHTS)
    verify(module)
    q = torch.tensor([[1.0, 2.0], [-4.0, 0.5]]).to(torch.float8_e4m3fn)
    checkpoint = {"q": q, "q_scale": torch.tensor([[3.0]])}
    checkpoint |= {f"experts.{n}.up": torch.full((2,), n + 0.5) for n in range(3)}
    checkpoint |= {f"experts.{n}.gate": torch.full((2,), float(n)) for n in range(3)}
    x = torch.randn(3, 2)
    y, z, s = Interpreter(module, checkpoint).run("forward", x)
    torch.testing.assert_close(y, x @ (q.float() * 3).T)
    assert torch.equal(y, z)  # the second dequant reads the checkpoint, not what was bound under that name
    assert torch.equal(s, torch.tensor([[n, n, n + 0.5, n + 0.5] for n in range(3)]))
