"""Modules as packages: emitted into a folder, loaded with the runtime, compared with the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import strategies as st

from moec.codegen import target, write_package
from moec.ir import Builder, Function, Interpreter, Module, TensorType, Value, verify
from moec.ir.cached import PagedCache, load
from moec.ir.op import OpResult
from moec.ir.scaled import Scaled
from moec.ir.types import STATE_TYPES, Type, f32, i32
from moec.runtime import values as runtime
from moec.runtime.checkpoint import InMemory
from moec.runtime.package import Package
from moec.runtime.weights import load_weights
from tests.strategies_ir import DRAW, B, Case, Draw, Graph, N

# Largest difference from the reference, over the largest magnitude. Below fp32 both round once and differ by
# one unit in the last place, or by two where a kernel rounds an intermediate.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float8_e4m3fn: 2**-3}

ABOUT = {"name": "tests", "dtype": "f32", "hidden": 3, "ignored": []}


class Emitted:
    """A module's package, its weights loaded: ``run(*args)`` calls its ``forward``."""

    def __init__(self, folder: Path, module: Module, weights: Mapping[str, torch.Tensor]) -> None:
        self.manifest = write_package(folder, module, target("cpu"), "0.1.0", ABOUT)
        self.package = Package(folder)
        self.weights = load_weights(InMemory(weights), self.manifest, self.package.module("weights"))
        self.code = self.package.module("model")

    def run(self, *args: Any) -> tuple[Any, ...]:
        with torch.inference_mode():
            out = self.code.forward(*args, self.weights)
        return out if type(out) is tuple else () if out is None else (out,)


def emitted(module: Module, weights: Mapping[str, torch.Tensor], *args: Any) -> tuple[Any, ...]:
    """What the package of ``module`` makes of ``args``."""
    with TemporaryDirectory() as folder:
        return Emitted(Path(folder), module, weights).run(*args)


def pages_of(cache: PagedCache) -> list[torch.Tensor]:
    """The interpreter's cache as the package takes it: pages, a spare one last."""
    layers = []
    for slots in cache.layers.values():
        pages = slots.unflatten(0, (-1, cache.page))
        layers.append(
            torch.cat([pages, torch.full_like(pages[:1], torch.nan if pages.is_floating_point() else 0xFF)])
        )
    return layers


def as_given(value: Any) -> Any:
    """An argument of the interpreter's as the package takes it."""
    if isinstance(value, PagedCache):
        return pages_of(value)
    return runtime.Scaled(value.q, value.scale) if isinstance(value, Scaled) else value


def agree(
    module: Module, weights: Mapping[str, torch.Tensor], args: list[Any], tolerance: float = 0.0
) -> None:
    """The package and the interpreter return the same, and leave the same in the caches."""
    expected = Interpreter(module, weights).run("forward", *args)
    given = [as_given(a) for a in args]
    got = iter(emitted(module, weights, *given))
    caches = dict(zip(module["forward"].args, given, strict=True))
    for value, want in zip(module["forward"].outputs, expected, strict=True):
        if isinstance(value.type, STATE_TYPES):
            pages_of = caches[written_into(value)]
            have = torch.stack([pages[:-1].flatten(0, 1) for pages in pages_of])
            want = torch.stack(list(want.layers.values()))
            if value.type.quantised:  # what it means: a scale's last bit is no concern
                have, want = (load(stored.flatten(0, 1), value.type) for stored in (have, want))
                close(have, want, value, TOLERANCE[torch.float8_e4m3fn])
                continue
        else:
            have = next(got)
        close(have, want, value, tolerance)


def written_into(state: Value) -> Value:
    """The argument that ``state`` is a later version of."""
    while isinstance(state, OpResult):
        state = next(v for v in state.op.operands if v is not None and v.type == state.type)
    return state


def close(have: Any, want: Any, value: Value, tolerance: float = 0.0) -> None:
    """Equal within the dtype's tolerance. Integers are equal, whatever their width: slots are int64 here."""
    if isinstance(want, Scaled):
        assert isinstance(have, runtime.Scaled), value
        close(
            have.scale, want.scale, value, max(tolerance, 2**-7)
        )  # of products that were rounded to 16 bits
        close(have.q, want.q, value, tolerance)
        return
    assert have.shape == want.shape, value
    if not want.is_floating_point():
        assert torch.equal(have.long(), want.long()), value
        return
    assert have.dtype == want.dtype, value
    limit = max(tolerance, TOLERANCE[want.dtype])
    have, want = have.double(), want.double()
    finite = want[want.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    torch.testing.assert_close(
        have, want, rtol=0, atol=limit * scale + 1e-30, equal_nan=True, msg=lambda text: f"{value!r}: {text}"
    )


Write = Callable[..., Any]


def forward(write: Write, *args: Type) -> Module:
    """A module whose ``@forward`` takes ``args``; ``write(builder, *arguments)`` makes its results."""
    module = Module("tests", "cpu", {"N": 64})
    function = module.add(Function("forward", [(f"x{i}", type) for i, type in enumerate(args)]))
    out = write(Builder(module, function, f32), *function.args)
    function.ret(*(out if isinstance(out, tuple) else (out,)))
    verify(module)
    return module


class WideGraph(Graph):
    """A graph that computes in fp32 throughout, where one op's rounding can't change what another chooses."""

    def floats(self) -> list[Value]:
        return [v for v in super().floats() if v.type.dtype == f32]

    def x(self, *shape: Any) -> Value:
        known = self.known(lambda t: t.shape == shape) if shape else None
        return known or self.fresh(f32, *(shape or (N, self.draw(st.integers(1, 4)))))


@st.composite
def programs(draw: Draw, ops: tuple[str, ...] = (), most: int = 0, kind: type[Graph] = Graph) -> Case:
    """``@forward`` made of ``ops`` and up to ``most`` others; it returns every tensor and the cache."""
    module = Module("tests", "cpu", {"N": 8})
    g = kind(draw, module, Function("forward"), draw(st.lists(st.integers(0, 3), max_size=3)))
    g.argument(TensorType(f32, (N, 3)), g.data(f32, g.tokens, 3))
    g.argument(TensorType(i32, (B,)), torch.tensor(g.lengths, dtype=torch.int32))
    others = st.lists(st.sampled_from(sorted(DRAW.keys() - {"bind"})), max_size=most)
    for name in (*ops, *(draw(others) if most else [])):
        DRAW[name](g)
    tensors = [v for v in g.function.values() if isinstance(v.type, TensorType)]
    g.function.ret(*tensors, *([g.cache] if g.cache is not None else []))
    module.add(g.function)
    return Case(module, g.args, g.weights)
