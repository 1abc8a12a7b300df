"""Registration of the operators that choose experts, ``route`` and ``hash_route``, and of the whole layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.ops import inputs
from moec.ops.library import (
    ACTIVATION,
    INVARIANT,
    SCALES,
    call,
    check_weights,
    make_key,
    register,
    register_out,
    result,
)
from moec.ops.scales import Scales

_ROUTER = (
    "Tensor? bias, int k, str score, int groups, int topk_groups, "
    "str group_score, str masked, bool renorm, float scale"
)
_ROUTE = f"Tensor logits, {_ROUTER}"
_HASH_ROUTE = "Tensor logits, Tensor table, Tensor tokens, str score, bool renorm, float scale"
_ROUTED = (
    f"Tensor x, Tensor logits, Tensor w13, Tensor w2, {_ROUTER}, "
    f"Tensor? shared, {ACTIVATION}, {SCALES}, {INVARIANT}"
)


def _attributes(
    score: str, groups: int, topk_groups: int, group_score: str, masked: str, renorm: bool, scale: float
) -> tuple[tuple[str, Any], ...]:
    """Those of the IR's route."""
    router: dict[str, Any] = {"score": score, "renorm": renorm, "scale": scale}
    if groups > 1:
        router |= {"groups": groups, "topk_groups": topk_groups, "group_score": group_score, "masked": masked}
    return tuple(router.items())


# Choosing alone.
def _route(logits: Tensor, bias: Tensor | None, k: int, *how: Any) -> tuple[Tensor, Tensor]:
    _check_route(logits, bias, k, *how)
    made = make_key(
        "route",
        logits,
        (logits.shape[1], 0, 0),
        k=k,
        bias=None if bias is None else bias.dtype,
        router=_attributes(*how),
    )
    w, id = call(made, logits, bias)
    return w, id


def _check_route(logits: Tensor, bias: Tensor | None, *how: Any) -> None:
    inputs.check_router(logits, bias, *how)
    inputs.check_devices(logits=logits, bias=bias)


def _route_fake(logits: Tensor, bias: Tensor | None, k: int, *how: Any) -> tuple[Tensor, Tensor]:
    _check_route(logits, bias, k, *how)
    shape = logits.shape[0], k
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _hash_route(
    logits: Tensor, table: Tensor, tokens: Tensor, score: str, renorm: bool, scale: float
) -> tuple[Tensor, Tensor]:
    _check_hash_route(logits, table, tokens, score, renorm, scale)
    made = make_key(
        "hash_route",
        logits,
        (logits.shape[1], 0, table.shape[0]),
        k=table.shape[1],
        weights=tokens.dtype,
        integers=table.dtype,
        router=(("score", score), ("renorm", renorm), ("scale", scale)),
    )
    w, id = call(made, logits, table, tokens)
    return w, id


def _check_hash_route(
    logits: Tensor, table: Tensor, tokens: Tensor, score: str, renorm: bool, scale: float
) -> None:
    inputs.check_hash_router(logits, table, tokens, score, scale)
    inputs.check_devices(logits=logits, table=table, tokens=tokens)


def _hash_route_fake(logits: Tensor, table: Tensor, tokens: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    _check_hash_route(logits, table, tokens, *how)
    shape = logits.shape[0], table.shape[1]
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


# The whole layer.
def _check_routed(
    x: Tensor,
    logits: Tensor,
    w13: Tensor,
    w2: Tensor,
    bias: Tensor | None,
    router: tuple[Any, ...],
    shared: Tensor | None,
    activation: str,
    limit: float | None,
    *scales: Tensor | None,
) -> None:
    """``router``: from k to scale."""
    named = check_weights("x", x, w13, w2, *scales)
    inputs.want("logits", logits, (x.shape[0], w13.shape[0]), "[T, E]", *inputs.FLOATS)
    inputs.check_router(logits, bias, *router)
    if shared is not None:
        inputs.want("shared", shared, x.shape, "like x", result(x))
    inputs.check_activation(activation, limit)
    inputs.check_devices(x=x, logits=logits, w13=w13, w2=w2, bias=bias, shared=shared, **named)


def _routed(x: Tensor, logits: Tensor, w13: Tensor, w2: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    router, (shared, activation, limit, *given, batch_invariant) = rest[:8], rest[8:]
    _check_routed(x, logits, w13, w2, bias, router, shared, activation, limit, *given)
    inputs.check_count(x.shape[0] * router[0])
    scales = Scales(x, w13, w2, *given)
    if x.device.type == "cpu":
        scales.check(torch.arange(w13.shape[0]))
    made = make_key(
        scales.form("routed"),
        x,
        (w13.shape[0], w13.shape[2], w13.shape[1]),
        k=router[0],
        weights=logits.dtype,
        bias=None if bias is None else bias.dtype,
        router=_attributes(*router[1:]),
        activation=activation,
        limit=limit,
        plus=None if shared is None else shared.dtype,
        batch_invariant=batch_invariant,
        **scales.constants,
    )
    y: Tensor = call(made, x, w13, w2, logits, bias, shared, *scales.arguments)
    return y


def _routed_fake(
    x: Tensor, logits: Tensor, w13: Tensor, w2: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor:
    _check_routed(x, logits, w13, w2, bias, rest[:8], *rest[8:-1])
    return x.new_empty(x.shape, dtype=result(x))


register("route", f"({_ROUTE}) -> (Tensor, Tensor)", _route, _route_fake)
register("hash_route", f"({_HASH_ROUTE}) -> (Tensor, Tensor)", _hash_route, _hash_route_fake)
register("routed_experts", f"({_ROUTED}) -> Tensor", _routed, _routed_fake)
register_out("routed_experts", _ROUTED, _routed, _routed_fake)
