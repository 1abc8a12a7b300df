"""Registration with PyTorch: schemas, implementations, fakes, and what a backward pass says.

Beside the public operators there are the halves of ``fused_experts``, for integrations that apply an
activation of their own between them: ``experts_begin`` and ``experts_end``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moec.errors import DeviceUnavailable, NotDifferentiable
from moec.ir.devices import GPUS
from moec.ops import inputs
from moec.ops.compiled import Key, function, target_of
from moec.ops.options import options
from moec.ops.scales import Scales, check_scaled_experts

Op = Callable[..., Any]

_ROUTING = "Tensor topk_weights, Tensor topk_ids"
ACTIVATION = "str activation, float? limit"
SCALES = "Tensor? w13_scale, Tensor? w2_scale, Tensor? x_scale"
INVARIANT = "bool batch_invariant"
_FUSED = f"Tensor x, Tensor w13, Tensor w2, {_ROUTING}, Tensor? shared, {ACTIVATION}, int first, {SCALES}"
_FUSED += f", {INVARIANT}"
_GROUPED = f"Tensor x_sorted, Tensor off, Tensor w13, Tensor w2, {ACTIVATION}, {SCALES}, {INVARIANT}"
_BEGIN = f"Tensor x, Tensor w, {_ROUTING}"
_END = "Tensor h, Tensor w2, Tensor topk_weights, Tensor slot, Tensor off, Tensor? plus"


def register(name: str, schema: str, implementation: Op, fake: Op) -> None:
    """``moec::name``: a functional operator without a derivative."""
    op = torch.library.custom_op(f"moec::{name}", implementation, mutates_args=(), schema=schema)
    op.register_fake(fake)

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotDifferentiable(
            f"{name} has no derivative: call it under torch.no_grad(), or train with another"
        )

    op.register_autograd(backward)


def register_out(name: str, arguments: str, implementation: Op, fake: Op) -> None:
    """``moec::name_out``: the same, into its last argument."""

    def into(*given: Any) -> None:
        *rest, out = given
        y = implementation(*rest)
        inputs.check_like("out", out, y)
        inputs.check_devices(x=y, out=out)
        out.copy_(y)

    def fake_into(*given: Any) -> None:
        *rest, out = given
        inputs.check_like("out", out, fake(*rest))

    op = torch.library.custom_op(
        f"moec::{name}_out", into, mutates_args=("out",), schema=f"({arguments}, Tensor(a!) out) -> ()"
    )
    op.register_fake(fake_into)


# Whole experts.
def check_weights(
    name: str, x: Tensor, w13: Tensor, w2: Tensor, *scales: Tensor | None
) -> dict[str, Tensor | None]:
    """x, experts and scales fit each other; the scales by their names. Raises BadInput."""
    named = dict(zip(("w13_scale", "w2_scale", "x_scale"), scales, strict=True))
    if any(scale is not None for scale in scales):
        check_scaled_experts(x, w13, w2, contiguous(x), **named, name=name)
    else:
        inputs.check_experts(x, w13, w2, contiguous(x), name)
    return named


def _check_fused(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared: Tensor | None,
    activation: str,
    limit: float | None,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    x_scale: Tensor | None,
) -> None:
    scales = check_weights("x", x, w13, w2, w13_scale, w2_scale, x_scale)
    dtype = result(x)
    inputs.check_routing(x, topk_weights, topk_ids, dtype)
    if shared is not None:
        inputs.want("shared", shared, x.shape, "like x", dtype)
    inputs.check_activation(activation, limit)
    given = {"topk_weights": topk_weights, "topk_ids": topk_ids, "shared": shared}
    inputs.check_devices(x=x, w13=w13, w2=w2, **given, **scales)


def _fused(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared: Tensor | None,
    activation: str,
    limit: float | None,
    first: int,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    x_scale: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    given = w13_scale, w2_scale, x_scale
    _check_fused(x, w13, w2, topk_weights, topk_ids, shared, activation, limit, *given)
    inputs.check_count(topk_ids.numel())
    scales = Scales(x, w13, w2, *given)
    if scales.weights and x.device.type == "cpu":
        chosen = topk_ids.unique().long() - first
        scales.check(chosen[(chosen >= 0) & (chosen < w13.shape[0])])
    key = make_key(
        scales.form("fused"),
        x,
        (w13.shape[0], w13.shape[2], w13.shape[1]),
        k=topk_ids.shape[1],
        weights=topk_weights.dtype,
        integers=topk_ids.dtype,
        activation=activation,
        limit=limit,
        plus=None if shared is None else shared.dtype,
        first=first,
        batch_invariant=batch_invariant,
        **scales.constants,
    )
    y: Tensor = call(key, x, w13, w2, topk_weights, topk_ids, shared, *scales.arguments)
    return y


def _fused_fake(x: Tensor, *rest: Any) -> Tensor:
    _check_fused(x, *rest[:7], *rest[8:-1])  # all but the first expert's number and batch_invariant
    return x.new_empty(x.shape, dtype=result(x))


def _check_grouped(
    x_sorted: Tensor,
    off: Tensor,
    w13: Tensor,
    w2: Tensor,
    activation: str,
    limit: float | None,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    x_scale: Tensor | None,
) -> None:
    scales = check_weights("x_sorted", x_sorted, w13, w2, w13_scale, w2_scale, x_scale)
    inputs.want("off", off, (w13.shape[0] + 1,), "[E+1]", *inputs.INTEGERS)
    inputs.check_activation(activation, limit)
    inputs.check_devices(x_sorted=x_sorted, off=off, w13=w13, w2=w2, **scales)


def _grouped(
    x_sorted: Tensor,
    off: Tensor,
    w13: Tensor,
    w2: Tensor,
    activation: str,
    limit: float | None,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    x_scale: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    given = w13_scale, w2_scale, x_scale
    _check_grouped(x_sorted, off, w13, w2, activation, limit, *given)
    inputs.check_count(x_sorted.shape[0])
    inputs.check_offsets(off, x_sorted.shape[0])
    scales = Scales(x_sorted, w13, w2, *given)
    if scales.weights and off.device.type == "cpu":
        scales.check(off.diff().nonzero()[:, 0])
    key = make_key(
        scales.form("grouped"),
        x_sorted,
        (w13.shape[0], w13.shape[2], w13.shape[1]),
        integers=off.dtype,
        activation=activation,
        limit=limit,
        batch_invariant=batch_invariant,
        **scales.constants,
    )
    rows = x_sorted.shape[0]
    slot = torch.arange(rows, dtype=torch.int32, device=off.device) if key.in_place else None
    y: Tensor = call(key, x_sorted, off, w13, w2, slot, *scales.arguments)
    return y


def _grouped_fake(x_sorted: Tensor, *rest: Any) -> Tensor:
    _check_grouped(x_sorted, *rest[:-1])
    return x_sorted.new_empty(x_sorted.shape, dtype=result(x_sorted))


# The two halves.
def _check_begin(x: Tensor, w: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
    inputs.want("x", x, (None, None), "[T, H]", *inputs.FLOATS)
    inputs.want("w", w, (None, None, x.shape[1]), "[E, N, H]", x.dtype)
    inputs.check_layout("w", w, contiguous(x))
    inputs.check_routing(x, topk_weights, topk_ids)
    inputs.check_devices(x=x, w=w, topk_weights=topk_weights, topk_ids=topk_ids)


def _begin(
    x: Tensor, w: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows by expert [T·k, N], weights and ids [T, k] of choices (E and weight 0: no expert's), slot, off."""
    _check_begin(x, w, topk_weights, topk_ids)
    inputs.check_count(topk_ids.numel())
    key = make_key(
        "begin",
        x,
        (w.shape[0], w.shape[2], w.shape[1]),
        k=topk_ids.shape[1],
        weights=topk_weights.dtype,
        integers=topk_ids.dtype,
    )
    rows, kept, local, slot, off = call(key, x, w, topk_weights, topk_ids)
    return rows, kept, local, slot.to(torch.int32), off


def _begin_fake(
    x: Tensor, w: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_begin(x, w, topk_weights, topk_ids)
    rows, shape = topk_ids.shape[0] * topk_ids.shape[1], topk_ids.shape
    slot, off = (topk_ids.new_empty(size, dtype=torch.int32) for size in (rows, w.shape[0] + 1))
    return x.new_empty(rows, w.shape[1]), topk_weights.new_empty(shape), topk_ids.new_empty(shape), slot, off


def _check_end(
    h: Tensor, w2: Tensor, topk_weights: Tensor, slot: Tensor, off: Tensor, plus: Tensor | None
) -> None:
    inputs.want("h", h, (None, None), "[T·k, I]", *inputs.FLOATS)
    inputs.want("w2", w2, (None, None, h.shape[1]), "[E, H, I]", h.dtype)
    inputs.check_layout("w2", w2, contiguous(h))
    inputs.want("topk_weights", topk_weights, (None, None), "[T, k]", *inputs.FLOATS)
    inputs.want("slot", slot, (h.shape[0],), "[T·k]", torch.int32)
    inputs.want("off", off, (w2.shape[0] + 1,), "[E+1]", torch.int32)
    if plus is not None:
        shape = (topk_weights.shape[0], w2.shape[1])
        inputs.want("plus", plus, shape, "[T, H]", *dict.fromkeys((torch.float32, h.dtype)))
    inputs.check_devices(h=h, w2=w2, topk_weights=topk_weights, slot=slot, off=off, plus=plus)


def _end(
    h: Tensor, w2: Tensor, topk_weights: Tensor, slot: Tensor, off: Tensor, plus: Tensor | None
) -> Tensor:
    """Each token's sum [T, H] of its rows times w2; weights, slot and off are those of ``experts_begin``."""
    _check_end(h, w2, topk_weights, slot, off, plus)
    inputs.want("h", h, (topk_weights.numel(), None), "[T·k, I]", h.dtype)
    key = make_key(
        "end",
        h,
        (w2.shape[0], w2.shape[1], w2.shape[2]),
        k=topk_weights.shape[1],
        weights=topk_weights.dtype,
        plus=None if plus is None else plus.dtype,
    )
    y: Tensor = call(key, h, w2, topk_weights, slot, off, plus)
    return y


def _end_fake(
    h: Tensor, w2: Tensor, topk_weights: Tensor, slot: Tensor, off: Tensor, plus: Tensor | None
) -> Tensor:
    _check_end(h, w2, topk_weights, slot, off, plus)
    return h.new_empty(topk_weights.shape[0], w2.shape[1])


# What they share.
def result(x: Tensor) -> torch.dtype:
    """x's dtype; what is quantised already gives bfloat16."""
    return torch.bfloat16 if x.dtype == inputs.E4M3 else x.dtype


def make_key(form: str, x: Tensor, sizes: tuple[int, int, int], **constants: Any) -> Key:
    """``sizes``: experts, hidden and width. MOEC_BATCH_INVARIANT makes all calls batch invariant."""
    target, interpret = target_of(x.device)
    constants["batch_invariant"] = constants.get("batch_invariant", False) or options().batch_invariant
    if "blocks" in constants and target in GPUS and not GPUS[target].fp8:
        raise DeviceUnavailable(
            f"experts in float8_e4m3fn: {target} multiplies no fp8",
            notes=["give it the weights in bfloat16: each value times the scale of its block"],
        )
    experts, hidden, width = sizes
    return Key(form, target, interpret, result(x), experts, hidden, width, **constants)


def contiguous(x: Tensor) -> bool:
    """Whether weights must be contiguous: wherever generated kernels read them."""
    return target_of(x.device)[0] != "cpu"


def call(key: Key, *arguments: Tensor | None) -> Any:
    """The compiled function of the arguments that are there; activations contiguous, weights as they are."""
    given = [a if a.dim() == 3 else a.contiguous() for a in arguments if a is not None]
    return function(key)(*given, {})


register("fused_experts", f"({_FUSED}) -> Tensor", _fused, _fused_fake)
register("grouped_experts", f"({_GROUPED}) -> Tensor", _grouped, _grouped_fake)
register("experts_begin", f"({_BEGIN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _begin, _begin_fake)
register("experts_end", f"({_END}) -> Tensor", _end, _end_fake)
register_out("fused_experts", _FUSED, _fused, _fused_fake)
register_out("grouped_experts", _GROUPED, _grouped, _grouped_fake)
