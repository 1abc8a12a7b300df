"""The functions behind the operators: small IR modules, built like any other and kept by their constants."""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moec import __version__
from moec.config import BuildOptions
from moec.errors import DeviceUnavailable
from moec.ir import Builder, DType, Function, Module, TensorType, Value
from moec.ir.types import Dim, as_dim, f32, i32, symbol
from moec.ops.inputs import ACTIVATIONS, E4M3
from moec.ops.options import options
from moec.runtime.devices import FAMILIES
from moec.runtime.launch import preload
from moec.runtime.package import Package
from moec.runtime.triton_mode import require_interpreter

ROWS = (1, 128)  # the blocks of activations in fp8
INTERPRETED = "sm_90a"  # whose kernels Triton's interpreter runs
Compiled = Callable[..., Any]


@dataclass(frozen=True)
class Key:
    """What a function is specialised to; the numbers of tokens and rows are not among it.

    ``options`` are those of its build.

    ``form`` names one of the functions of FORMS below, ``width`` is how many rows an expert's first weights
    have (2·I, or I where nothing gates), ``k`` is 0 and dtypes None where a form has no such thing.
    """

    form: str
    target: str
    interpret: bool
    dtype: torch.dtype
    experts: int
    hidden: int
    width: int
    k: int = 0
    weights: torch.dtype | None = None
    integers: torch.dtype = torch.int32
    activation: str = "swiglu"
    limit: float | None = None
    plus: torch.dtype | None = None
    first: int = 0
    blocks: tuple[tuple[int, int], ...] = ()  # of w13's and w2's scales, where they are fp8
    formats: tuple[str, str] = ("fp32", "fp32")  # of w13's and w2's scales, and of what they multiply
    x_block: tuple[int, int] | None = None  # of x's scales, where it comes with such
    batch_invariant: bool = False
    router: tuple[tuple[str, Any], ...] = ()  # a route's attributes
    bias: torch.dtype | None = None  # of the router
    options: BuildOptions = field(default_factory=options)

    @property
    def in_place(self) -> bool:
        """Whether sorted rows are gathered from where they are, by a slot that counts: on GPUs the product of
        gathered rows has the activation, and in fp8 the quantisation, in its epilogue.
        """
        return self.form.startswith("grouped") and self.target != "cpu"


_functions: dict[Key, Compiled] = {}
_numbers = itertools.count()
_lock = threading.Lock()


def function(key: Key) -> Compiled:
    """The compiled function of a key, built where it is new. It takes its form's arguments, then ``{}``."""
    found = _functions.get(key)
    if found is None:
        with _lock:
            found = _functions.get(key)
            if found is None:
                if key.interpret:
                    require_interpreter(f"moec.ops {key.form}", str(_dtype(key.dtype)))
                found = _functions[key] = _build(key)
    return found


def _build(key: Key) -> Compiled:
    """Builds the package of a key and imports it.

    It holds IR dumps and sources, as any does. Its kernels' cubins come from the cache of kernels, which is
    keyed by their content: a second process compiles none. So the package itself needs to last no longer than
    the process.
    """
    from moec import codegen
    from moec.codegen.choosing import choose_by
    from moec.driver import choosing, compiler, optimise, pipeline_of, schedules

    goal = codegen.target(key.target)
    module = lower(key)
    folder = _scratch() / f"{next(_numbers)}-{key.form}"
    how = choosing(replace(key.options, batch_invariant=key.batch_invariant), goal.name)
    with codegen.staging(folder, force=False) as aside, choose_by(how):
        optimise(module, pipeline_of(replace(key.options, target=goal.name)), aside, lambda line: None)
        compile = None if key.interpret else compiler(goal, key.options, lambda line: None)
        about = _about(key) | schedules(module, goal.name, how)
        codegen.write_package(aside, module, goal, __version__, about, compile)
    code = Package(folder).module("model")
    if goal.device == "cuda" and not key.interpret:
        # A later call may be one that a CUDA graph records, with other tokens: no kernel is loaded then.
        preload(code.__name__.rpartition(".")[0], torch.cuda.current_device())
    compiled: Compiled = code.forward
    return compiled


def _about(key: Key) -> dict[str, Any]:
    return {
        "name": f"moec.ops {key.form}",
        "dtype": str(_dtype(key.dtype)),
        "hidden": key.hidden,
        "vocab": None,
        "max_positions": None,
        "eos": [],
        "options": key.options.as_manifest(),
        "ignored": [],
    }


@cache
def _scratch() -> Path:
    """Where this process's packages are, for its lifetime."""
    folder = tempfile.mkdtemp(prefix="moec-ops-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def target_of(device: torch.device) -> tuple[str, bool]:
    """What to build for tensors on ``device``, and whether to interpret it.

    Raises DeviceUnavailable, or InterpreterOff where MOEC_INTERPRET is set and TRITON_INTERPRET isn't.
    """
    if device.type == "cpu":
        if not options().interpret:
            return "cpu", False
        require_interpreter("an operator's kernels")
        return INTERPRETED, True
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        fitting = [f for f in FAMILIES.values() if f.runs_on(capability)]
        if fitting:
            return max(fitting, key=lambda f: f.number).arch, False
        raise DeviceUnavailable(
            f"no kernels are built for compute capability {'.'.join(map(str, capability))}"
        )
    raise DeviceUnavailable(f"moec's operators run on cpu and cuda, not on {device}")


# The functions, as IR.
def lower(key: Key) -> Module:
    """The naive module of a key, with one function, @forward."""
    module = Module(f"moec.ops.{key.form}", target=key.target)
    forward = module.add(Function("forward"))
    b = Builder(module, forward, _dtype(key.dtype))
    forward.ret(*FORMS[key.form](b, key))
    return module


def fused(b: Builder, key: Key) -> tuple[Value, ...]:
    """(x, w13, w2, weights, ids[, shared]) -> y: ``moec.ops.fused_experts``.

    With a router (x, w13, w2, logits[, bias][, shared]) -> y: ``moec.ops.routed_experts``.
    """
    x = _argument(b, "x", "T", key.hidden)
    w13, w2 = _experts(b, key)
    kept, slot, off = _choices(b, key)
    shared = _argument(b, "shared", "T", key.hidden, dtype=key.plus) if key.plus else None
    gathered = b.gather_rows(x, slot, per_row=key.k, out="xe")
    gate_up = b.grouped_linear(gathered, w13, off, out="gate_up")
    down = b.grouped_linear(b.swiglu(gate_up, **_act(key), out="h"), w2, off, out="down")
    return (b.combine(down, slot, kept, shared, out="y"),)


def fused_fp8(b: Builder, key: Key) -> tuple[Value, ...]:
    """(x, w13, w2, weights, ids[, shared], w13_scale, w2_scale[, x_scale]) -> y: the same, in fp8.

    With a router logits[, bias] in place of weights, ids.
    What enters a product is quantised as DeepSeek-V3 does it, 1 x 128, with scales as the weights'.
    """
    x = _argument(b, "x", "T", key.hidden, dtype=E4M3 if key.x_block else None)
    w13, w2 = _experts(b, key, E4M3)
    kept, slot, off = _choices(b, key)
    shared = _argument(b, "shared", "T", key.hidden, dtype=key.plus) if key.plus else None
    xq, w13, w2 = _all_scaled(b, key, x, w13, w2)
    h = b.gather_grouped_linear(xq, w13, slot, off, per_row=key.k, **_epilogue(key), out="h")
    down = b.grouped_linear(h, w2, off, slot, to=b.dtype, out="down")
    return (b.combine(down, None, kept, shared, out="y"),)


def grouped(b: Builder, key: Key) -> tuple[Value, ...]:
    """(x, off, w13, w2[, slot]) -> y: ``moec.ops.grouped_experts``."""
    x, off = _sorted(b, key, b.dtype)
    w13, w2 = _experts(b, key)
    if key.in_place:
        x = b.gather_rows(x, _slot(b, key, symbol("R")), per_row=1, out="xe")
    gate_up = b.grouped_linear(x, w13, off, out="gate_up")
    return (b.grouped_linear(b.swiglu(gate_up, **_act(key), out="h"), w2, off, out="y"),)


def grouped_fp8(b: Builder, key: Key) -> tuple[Value, ...]:
    """(x, off, w13, w2[, slot], w13_scale, w2_scale[, x_scale]) -> y: the same in fp8."""
    x, off = _sorted(b, key, _dtype(E4M3) if key.x_block else b.dtype)
    w13, w2 = _experts(b, key, E4M3)
    slot = _slot(b, key, symbol("R")) if key.in_place else None
    xq, w13, w2 = _all_scaled(b, key, x, w13, w2)
    if slot is not None:
        h = b.gather_grouped_linear(xq, w13, slot, off, per_row=1, **_epilogue(key), out="h")
    else:
        gate_up = b.grouped_linear(xq, w13, off, to=b.dtype, out="gate_up")
        h = b.quant(b.swiglu(gate_up, **_act(key)), block=ROWS, scale=key.formats[1], out="h.q")
    return (b.grouped_linear(h, w2, off, to=b.dtype, out="y"),)


def _sorted(b: Builder, key: Key, dtype: DType) -> tuple[Value, Value]:
    groups = None if key.in_place else key.experts
    x = b.function.add_argument("x", TensorType(dtype, (symbol("R"), key.hidden), groups))
    return x, _argument(b, "off", key.experts + 1, dtype=key.integers)


def _slot(b: Builder, key: Key, rows: Dim) -> Value:
    return b.function.add_argument("slot", TensorType(i32, (rows,), key.experts))


def begin(b: Builder, key: Key) -> tuple[Value, ...]:
    """(x, w, weights, ids) -> the first product's rows by expert; weights and ids that count; slot; off."""
    x = _argument(b, "x", "T", key.hidden)
    w = _argument(b, "w", key.experts, key.width, key.hidden)
    kept, local, slot, off = _here(b, key)
    gathered = b.gather_rows(x, slot, per_row=key.k, out="xe")
    return b.grouped_linear(gathered, w, off, out="gate_up"), kept, local, slot, off


def end(b: Builder, key: Key) -> tuple[Value, ...]:
    """(h, w2, weights, slot, off[, plus]) -> y: the second product of rows by expert, summed by token."""
    rows = as_dim(key.k * symbol("T"))
    h = b.function.add_argument("h", TensorType(b.dtype, (rows, key.width), key.experts))
    w2 = _argument(b, "w2", key.experts, key.hidden, key.width)
    weights = _argument(b, "weights", "T", key.k, dtype=key.weights)
    slot = _slot(b, key, rows)
    off = _argument(b, "off", key.experts + 1, dtype=torch.int32)
    plus = _argument(b, "plus", "T", key.hidden, dtype=key.plus) if key.plus else None
    return (b.combine(b.grouped_linear(h, w2, off, out="down"), slot, weights, plus, out="y"),)


def route(b: Builder, key: Key) -> tuple[Value, ...]:
    """(logits[, bias]) -> weights, ids: ``moec.ops.route``."""
    logits = _argument(b, "logits", "T", key.experts)
    bias = _argument(b, "bias", key.experts, dtype=key.bias) if key.bias else None
    w, id = b.route(logits, bias, k=key.k, **dict(key.router), out=("w", "id"))
    return w, id


def hash_route(b: Builder, key: Key) -> tuple[Value, ...]:
    """(logits, table, tokens) -> weights, ids: ``moec.ops.hash_route``; ``width`` is the table's rows."""
    logits = _argument(b, "logits", "T", key.experts)
    table = _argument(b, "table", key.width, key.k, dtype=key.integers)
    tokens = _argument(b, "tokens", "T", dtype=key.weights)
    w, id = b.hash_route(logits, table, tokens, k=key.k, **dict(key.router), out=("w", "id"))
    return w, id


FORMS: dict[str, Callable[[Builder, Key], tuple[Value, ...]]] = {
    "fused": fused,
    "fused_fp8": fused_fp8,
    "routed": fused,
    "routed_fp8": fused_fp8,
    "grouped": grouped,
    "grouped_fp8": grouped_fp8,
    "route": route,
    "hash_route": hash_route,
    "begin": begin,
    "end": end,
}


def _choices(b: Builder, key: Key) -> tuple[Value, Value, Value]:
    """Each choice's weight [T, k], the slots by expert, and where each expert's begin."""
    if not key.router:
        kept, _, slot, off = _here(b, key)
        return kept, slot, off
    logits = _argument(b, "logits", "T", key.experts, dtype=key.weights)
    bias = _argument(b, "bias", key.experts, dtype=key.bias) if key.bias else None
    w, id = b.route(logits, bias, k=key.k, **dict(key.router), out=("w", "id"))
    slot, off = b.sort_by_expert(id, experts=key.experts, out=("slot", "off"))
    return w, slot, off


def _here(b: Builder, key: Key) -> tuple[Value, ...]:
    """Weights and ids of the choices that count, their slots by expert, and where each expert's begin."""
    weights = _argument(b, "weights", "T", key.k, dtype=key.weights)
    ids = _argument(b, "ids", "T", key.k, dtype=key.integers)
    here = {"first": key.first, "experts": key.experts}
    kept, local = b.local_experts(weights, ids, out=("kept", "local"), **here)
    return kept, local, *b.sort_by_expert(local, experts=key.experts, out=("slot", "off"))


def _act(key: Key) -> dict[str, Any]:
    """The attributes of swiglu."""
    return {"act": ACTIVATIONS[key.activation], "limit": key.limit}


def _epilogue(key: Key) -> dict[str, Any]:
    """Those of a product in fp8 with the activation and the quantisation behind it."""
    return {"epilogue": "swiglu", **_act(key), "quant": ROWS, "scale": key.formats[1]}


def _experts(b: Builder, key: Key, dtype: torch.dtype | None = None) -> tuple[Value, Value]:
    w13 = _argument(b, "w13", key.experts, key.width, key.hidden, dtype=dtype)
    return w13, _argument(b, "w2", key.experts, key.hidden, key.width // 2, dtype=dtype)


def _all_scaled(b: Builder, key: Key, x: Value, w13: Value, w2: Value) -> tuple[Value, Value, Value]:
    """x, w13 and w2 with their scales, which are the last arguments; x is quantised here if it has none."""
    weights = zip((w13, w2), ("w13", "w2"), key.blocks, key.formats, strict=True)
    w13, w2 = (_scaled(b, *each) for each in weights)
    if key.x_block is None:
        return b.quant(x, block=ROWS, scale=key.formats[0], out="x.q"), w13, w2
    return _scaled(b, x, "x", key.x_block), w13, w2


def _scaled(b: Builder, q: Value, name: str, block: tuple[int, int], scale_fmt: str = "fp32") -> Value:
    """``q`` with an argument for its scales."""
    shape = q.type.with_(scale=block).scale_shape  # type: ignore[union-attr]
    scale = b.function.add_argument(f"{name}_scale", TensorType(f32, shape))
    value: Value = b.scaled(q, scale, block=block, scale_fmt=scale_fmt, out=f"{name}.q")
    return value


def _argument(b: Builder, name: str, *shape: int | str, dtype: torch.dtype | None = None) -> Value:
    sizes = tuple(symbol(size) if isinstance(size, str) else size for size in shape)
    return b.function.add_argument(name, TensorType(_dtype(dtype) if dtype else b.dtype, sizes))


def _dtype(dtype: torch.dtype) -> DType:
    return DType.of(str(dtype))
