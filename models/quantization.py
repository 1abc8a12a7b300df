"""Checkpoints whose linear weights are stored in FP8 blocks (DeepSeek-V3 report, section 3.3)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from moec.errors import SpecError, UnsupportedModel
from moec.ir import DType, Function, Module, Op, TensorType
from moec.ir.op import Param
from moec.ir.ops.control import Loop
from moec.ir.ops.hash_route import HashRoute
from moec.ir.ops.linear import Linear
from moec.ir.ops.route import Route
from moec.ir.ops.scaled import Dequant, Scaled
from moec.ir.ops.weights import Bind
from moec.ir.types import DTYPES, f32
from moec.ir.weights import weights_of
from moec.models.blocks.base import Declared

SCALE_FORMATS = ("fp32", "ue8m0")


@dataclass(frozen=True)
class BlockFP8(Declared):
    """``X.weight`` in e4m3 beside ``X.weight_scale_inv`` fp32 [ceil(N/b0), ceil(K/b1)]: W = q × scale_inv.

    ``scale_fmt``: fp32, or ue8m0, powers of two, stored in fp32 too; activations then get such as well.

    All linear weights are stored so, but the head's, those that a router's logits come from, and those of the
    modules in ``keep``: a name from the start, a name's end, or a regex.
    """

    block: tuple[int, int] = (128, 128)
    keep: tuple[str, ...] = ()
    scale_fmt: str = "fp32"

    def __post_init__(self) -> None:
        self.as_tuple("block", "keep")

    def check(self) -> None:
        fits = isinstance(self.block, tuple) and len(self.block) == 2
        fits = fits and all(type(n) is int and 0 < n <= 2**20 for n in self.block)
        self.need(fits, f"block is two positive integers, not {self.block!r}")
        self.need_one_of("scale_fmt", *SCALE_FORMATS)
        self.need(isinstance(self.keep, tuple), f"keep must be a tuple of texts, not {self.keep!r}")
        for pattern in self.keep:
            self.need_regex("keep", pattern)

    def keeps(self, module: str) -> bool:
        """Whether a module's weight is stored plainly; the rule of transformers' quantizers."""
        return any(re.match(rf"(?:{k})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(k) for k in self.keep)


def read_quantized(module: Module, how: BlockFP8, dtype: DType) -> None:
    """Adds to the load-time functions what makes each stored weight the model's parameter."""
    names = _prefixes(module)
    for function in list(module):
        for param in _candidates(function):
            kept = {how.keeps(p + param.name.removesuffix(".weight")) for p in names[function.name]}
            if kept == {True, False}:
                raise UnsupportedModel(
                    f"{param.name} of @{function.name} is quantised in some layers and plain in others"
                )
            if kept == {False}:
                _dequantize(module, function.name, param, how, dtype)


def _prefixes(module: Module) -> dict[str, list[str]]:
    """What stands before the parameter names of each function, for every layer and expert that runs it."""
    found: dict[str, list[str]] = {f.name: [] for f in module}

    def walk(name: str, prefixes: list[str]) -> None:
        found[name] += prefixes
        for op in module[name].ops:
            if isinstance(op, Loop):
                walk(op.callee, [p + op.prefix(n) for p in prefixes for n in op.range])

    called = {op.attrs["callee"] for f in module for op in f.ops if isinstance(op, Loop)}
    for function in module:
        if function.name not in called:
            walk(function.name, [""])
    return found


def _candidates(function: Function) -> Iterator[Param]:
    """The weights of linears, but a router's and the head's."""
    if function.name == "head":
        return
    for op in function.ops:
        if isinstance(op, Linear) and isinstance(op.w, Param) and not _feeds_route(function, op):
            yield op.w


def _feeds_route(function: Function, op: Op) -> bool:
    return any(isinstance(user, Route | HashRoute) for user in function.users(op.results[0]))


def _dequantize(module: Module, body: str, param: Param, how: BlockFP8, dtype: DType) -> None:
    if not isinstance(param.type, TensorType) or not param.name.endswith("weight"):
        raise SpecError(f"{param.text} is no linear weight that a checkpoint could store in blocks")
    load = weights_of(module, body)
    rows, columns = (int(d) for d in param.type.shape)
    blocks = (-(-rows // how.block[0]), -(-columns // how.block[1]))
    q = load.param(param.name, TensorType(DTYPES["f8e4m3"], (rows, columns)))
    scale = load.param(f"{param.name}_scale_inv", TensorType(f32, blocks))
    name = param.name.removesuffix(".weight")
    short = name.rpartition(".")[2]
    (pair,) = load.create(
        Scaled((q, scale), {"block": how.block, "scale_fmt": how.scale_fmt}), (f"{short}.q",)
    ).results
    (w,) = load.create(Dequant((pair,), {"to": dtype}), (name,)).results
    load.create(Bind((w,), {"param": param.name}))
