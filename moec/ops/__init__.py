"""A Mixture-of-Experts layer's router and experts as PyTorch operators, for models that moec didn't build.

>>> weights, ids = moec.ops.route(logits, k=8, score="softmax", renorm=True)
>>> y = moec.ops.fused_experts(x, w13, w2, weights, ids)

Each is a custom operator of ``torch.library`` (``torch.ops.moec``) with a fake: it stands in a graph of
``torch.compile(fullgraph=True)``, shapes may be dynamic. What runs is compiled by moec at the first call with
new constants (sizes of the experts, dtypes, activation; not the number of tokens) and kept for the process:
PyTorch for tensors on the CPU, generated kernels for tensors on a GPU. With MOEC_INTERPRET=1 and
TRITON_INTERPRET=1 from the process's start, tensors on the CPU run the GPU's kernels in Triton's interpreter.
Options of these builds are the environment's, or those of a ``with moec.ops.building(...)`` around the calls.

Common to all:

* x, w13 and w2 share one dtype: bfloat16, float16 or float32. Products are summed in fp32. With scales the
  weights are float8_e4m3fn.
* Routing weights and what passes between tokens may have any strides. On a GPU, and in the interpreter, w13
  and w2 must be contiguous: they are never copied.
* A choice of no expert here (an id below 0 or past the last one, an id outside ``expert_range``) contributes
  nothing, exactly: no weight is read for it, whatever its routing weight, and no NaN or infinity comes of it.
  A row that is NaN stays in its own token.
* The result depends on the inputs alone: a token's experts are added in the order of its choices.
  With ``batch_invariant`` a token's result depends on that token alone, to the bit.
* Nothing is read back from a GPU. Values are checked on the CPU only: offsets must rise, scales of experts
  that are chosen be finite. On a GPU a scale that is NaN makes NaN of what it scales.
* Experts in fp8 need a GPU that multiplies fp8 (sm_89 or newer), or the CPU, where products are emulated.
* They are for inference. A backward pass through one raises NotDifferentiable.

Errors are ``moec.MoecError``: BadInput (M0601) names the argument, and says what it is and should be.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from moec.errors import BadInput, NotDifferentiable
from moec.ops import library as library
from moec.ops import routed as routed
from moec.ops.inputs import (
    LARGEST,
    describe,
    need_flags,
    need_integers,
    need_limit,
    need_scale,
    need_tensors,
    need_tensors_or_none,
    need_words,
    shown,
)
from moec.ops.options import building

ExpertRange: TypeAlias = "tuple[int, int] | range"

__all__ = [
    "ExpertRange",
    "building",
    "fused_experts",
    "grouped_experts",
    "hash_route",
    "route",
    "routed_experts",
]


def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    score: str,
    renorm: bool,
    scale: float = 1.0,
    groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    masked: str = "neginf",
) -> tuple[Tensor, Tensor]:
    """Each token's k experts, best first: weights [T, k] float32 and ids [T, k] int32.

    logits       [T, E] bfloat16, float16 or float32; T may be 0, E and k are whatever they are
    bias         [E] float32 or logits' dtype: takes part in choosing, not in the weights
    score        ``softmax`` over the experts; of each alone ``sigmoid`` or ``sqrtsoftplus``, in fp32
    renorm       the weights are divided by their sum + 1e-20
    scale        multiplies the weights last
    groups       that many equal runs of experts, of which the ``topk_groups`` best may be chosen from
    group_score  a group's best score, ``max``, or its two best summed, ``top2sum``
    masked       what the other groups' experts score: ``neginf``, or ``zero``, by which they may be chosen
                 where k is more than the kept groups have; they weigh nothing

    ====================  ================================================================================
    DeepSeek V1, OLMoE    k=6, score="softmax", renorm=False
    DeepSeek V2           k=6, score="softmax", renorm=False, scale=16, groups=8, topk_groups=3, masked="zero"
    DeepSeek V3           bias, k=8, score="sigmoid", renorm=True, scale=2.5, groups=8, topk_groups=4,
                          group_score="top2sum"
    DeepSeek V4           bias, k=6, score="sqrtsoftplus", renorm=True, scale=1.5; see ``hash_route``
    Mixtral, Qwen3-MoE    k=2, score="softmax", renorm=True
    ====================  ================================================================================

    Equal scores go to the lower id, of groups too. A logit that is NaN counts as the highest score, so that
    its token gets weights that are NaN; it still goes to k different experts that there are, and no other
    token changes. A NaN in the bias has its expert chosen; the weights are of the logits alone.

    Raises BadInput, also for routers that aren't defined: a ``top2sum`` of one expert a group, or k beyond
    what the kept groups have; otherwise as ``fused_experts``.
    """
    need_tensors(logits=logits)
    need_tensors_or_none(bias=bias)
    router = _router(k, score, groups, topk_groups, group_score, masked, renorm, scale)
    weights, ids = torch.ops.moec.route(logits, bias, *router)
    return weights, ids


def hash_route(
    logits: Tensor, table: Tensor, tokens: Tensor, *, score: str, renorm: bool, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The experts that a table gives each token, weighed by the gate (DeepSeek V4's first layers).

    Weights [T, k] float32 and ids [T, k] int32, in the table's order.

    logits  [T, E] bfloat16, float16 or float32
    table   [vocab, k] int32 or int64: a token's experts
    tokens  [T] int32 or int64: rows of the table
    score   of each logit alone: ``sigmoid`` or ``sqrtsoftplus`` (V4, with renorm and scale=1.5)

    An entry that names no expert, and each choice of a token that has no row, becomes E with weight 0: the
    experts skip it. Raises BadInput; otherwise as ``fused_experts``.
    """
    need_tensors(logits=logits, table=table, tokens=tokens)
    _, score, *_, renorm, scale = _router(1, score, 1, 1, "max", "zero", renorm, scale)
    weights, ids = torch.ops.moec.hash_route(logits, table, tokens, score, renorm, scale)
    return weights, ids


def fused_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    shared: Tensor | None = None,
    activation: str = "swiglu",
    limit: float | None = None,
    expert_range: ExpertRange | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """y[t] = Σ_j topk_weights[t, j] · expert_{topk_ids[t, j]}(x[t]), plus shared[t]: [T, H] in x's dtype.

    expert_e(x) = w2[e] · (act(gate) ⊙ up), where [gate; up] = w13[e] · x (Shazeer 2020, GLU variants).

    x             [T, H]; T may be 0
    w13           [E, 2·I, H]: an expert's gate rows, then its up rows
    w2            [E, H, I]
    topk_weights  [T, k] float32 or x's dtype
    topk_ids      [T, k] int32; int64, as ``torch.topk`` gives it, is taken too
    shared        [T, H] in x's dtype: what the shared experts gave, added before the result is rounded
    activation    ``swiglu`` (SiLU), ``geglu`` (GELU), ``geglu_tanh`` (its tanh approximation)
    limit         gate is clamped to at most this and up to ± this before the activation (DeepSeek V4)
    expert_range  (first, end), or ``range(first, end)``: topk_ids number the experts of all ranks, w13 and w2
                  hold these; the result is this rank's part of the sum
    w13_scale     float32 or float8_e8m0fnu, makes w13 float8_e4m3fn: a weight is its value times the scale of
                  its block of 128 x 128 [E, ceil(2·I/128), ceil(H/128)], its row [E, 2·I, 1], its half (gate
                  or up) [E, 2, 1], refused where blocks have that shape too, or its expert [E, 1, 1]. Both
                  products are of fp8 then: x and what lies between them get scales for blocks of 1 x 128.
                  Of float8_e8m0fnu x's are powers of two as well, rounded up. Where a checkpoint says so
                  (``"scale_fmt": "ue8m0"``, DeepSeek-V3.1) but stores them in float32, ``.to`` it is exact
    w2_scale      the same of w2, which has no halves; its dtype decides for what lies between the products
    x_scale       float32: x is float8_e4m3fn already, and what has x's dtype is bfloat16. A scale is that of
                  1 x 128 values [T, ceil(H/128)], of a row [T, 1] or of all [1]
    batch_invariant  each product has one schedule whatever T is: a token's bits depend on that token alone.
                  On the CPU, where products are PyTorch's, that can't be had: the first call warns
    out           [T, H] in x's dtype, receives the result and is returned; it may be x

    Raises BadInput; DeviceUnavailable for a device that nothing is built for, or that multiplies no fp8 where
    experts are fp8; InterpreterOff; on a GPU Misaligned, for x, shared or weights that don't start at a
    multiple of 16 bytes.
    """
    need_tensors(x=x, w13=w13, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids)
    _how(shared, activation, limit, w13_scale, w2_scale, x_scale, batch_invariant, out)
    first = _first_expert(expert_range, w13)
    scales = (w13_scale, w2_scale, x_scale)
    layer = (x, w13, w2, topk_weights, topk_ids, shared, activation, limit, first)
    arguments = (*layer, *scales, batch_invariant)
    if out is None:
        result: Tensor = torch.ops.moec.fused_experts(*arguments)
        return result
    _refuse_gradients("fused_experts", x, w13, w2, topk_weights, shared, out)
    torch.ops.moec.fused_experts_out(*arguments, out)
    return out


def routed_experts(
    x: Tensor,
    logits: Tensor,
    w13: Tensor,
    w2: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    score: str,
    renorm: bool,
    scale: float = 1.0,
    groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    masked: str = "neginf",
    shared: Tensor | None = None,
    activation: str = "swiglu",
    limit: float | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``fused_experts`` of the choices that ``route`` makes: [T, H] in x's dtype.

    In one call, so that choosing and sorting are one kernel. On the CPU the scales of all experts are to be
    finite: which ones are chosen is known only inside.

    x, w13, w2    and all that ``fused_experts`` takes, as there
    logits        [T, E] and all that ``route`` takes, as there; all E experts are here

    Raises as both do.
    """
    need_tensors(x=x, logits=logits, w13=w13, w2=w2)
    need_tensors_or_none(bias=bias)
    _how(shared, activation, limit, w13_scale, w2_scale, x_scale, batch_invariant, out)
    router = _router(k, score, groups, topk_groups, group_score, masked, renorm, scale)
    scales = (w13_scale, w2_scale, x_scale)
    arguments = (x, logits, w13, w2, bias, *router, shared, activation, limit, *scales, batch_invariant)
    if out is None:
        result: Tensor = torch.ops.moec.routed_experts(*arguments)
        return result
    _refuse_gradients("routed_experts", x, logits, w13, w2, bias, shared, out)
    torch.ops.moec.routed_experts_out(*arguments, out)
    return out


def grouped_experts(
    x_sorted: Tensor,
    off: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    activation: str = "swiglu",
    limit: float | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """expert_e of rows off[e] … off[e+1] - 1 of x_sorted: [R, H] in x_sorted's dtype.

    For engines that sort, send and weigh tokens themselves. Rows from off[E] on are no expert's and come out
    as zeros, whatever they hold.

    x_sorted           [R, H]: rows sorted by expert
    off                [E+1] int32 (or int64): 0 = off[0] ≤ off[1] ≤ … ≤ off[E] ≤ R, checked on the CPU only
    w13, w2            as for ``fused_experts``, like activation, limit, all scales and batch_invariant;
                       x_scale's are those of the rows of x_sorted
    out                [R, H] in x_sorted's dtype, receives the result and is returned; it may be x_sorted

    Raises as ``fused_experts`` does.
    """
    need_tensors(x_sorted=x_sorted, off=off, w13=w13, w2=w2)
    _how(None, activation, limit, w13_scale, w2_scale, x_scale, batch_invariant, out)
    scales = (w13_scale, w2_scale, x_scale)
    arguments = (x_sorted, off, w13, w2, activation, limit, *scales, batch_invariant)
    if out is None:
        result: Tensor = torch.ops.moec.grouped_experts(*arguments)
        return result
    _refuse_gradients("grouped_experts", x_sorted, w13, w2, out)
    torch.ops.moec.grouped_experts_out(*arguments, out)
    return out


def _router(
    k: int,
    score: str,
    groups: int,
    topk_groups: int,
    group_score: str,
    masked: str,
    renorm: bool,
    scale: float,
) -> tuple[int, str, int, int, str, str, bool, float]:
    """The same, each known to be of its kind."""
    need_integers(k=k, groups=groups, topk_groups=topk_groups)
    need_words(score=score, group_score=group_score, masked=masked)
    need_flags(renorm=renorm)
    need_scale(scale)
    return k, score, groups, topk_groups, group_score, masked, renorm, float(scale)


def _how(
    shared: Tensor | None,
    activation: str,
    limit: float | None,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    x_scale: Tensor | None,
    batch_invariant: bool,
    out: Tensor | None,
) -> None:
    """What experts may be given beside their tensors is of its kind."""
    need_tensors_or_none(shared=shared, w13_scale=w13_scale, w2_scale=w2_scale, x_scale=x_scale, out=out)
    need_words(activation=activation)
    need_limit(limit)
    need_flags(batch_invariant=batch_invariant)


def _first_expert(expert_range: ExpertRange | None, w13: Tensor) -> int:
    if expert_range is None:
        return 0
    if isinstance(expert_range, range):
        if expert_range.step != 1:
            raise BadInput(f"expert_range is {expert_range}: its experts must follow each other")
        first, end = expert_range.start, expert_range.stop
    else:
        if not isinstance(expert_range, tuple | list) or len(expert_range) != 2:
            raise BadInput(f"expert_range is {shown(expert_range)}: it must be (first, end) or a range")
        first, end = expert_range
        if any(not isinstance(n, int) or isinstance(n, bool) for n in (first, end)):
            raise BadInput(
                f"expert_range is ({shown(first)}, {shown(end)}): it must be (first, end), two integers"
            )
    if not 0 <= first < end <= LARGEST:
        raise BadInput(
            f"expert_range is ({shown(first)}, {shown(end)}): "
            f"it must be (first, end) with 0 <= first < end <= {LARGEST}"
        )
    if w13.shape[0] != end - first:
        raise BadInput(
            f"expert_range ({first}, {end}) means {end - first} experts, but w13 is {describe(w13)}"
        )
    return first


def _refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    """An operator that writes into ``out`` can't say later that it has no derivative: it says so at once."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotDifferentiable(f"{op} writes into out and has no derivative: call it under torch.no_grad()")
