"""Routers that are in use, and odd ones; inputs with ties, NaN and infinities; and who may be chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.ir.op import Op
from moec.ir.ops.moe import SortByExpert
from tests.codegen.triton_kernels import route_op

V3: dict[str, Any] = {"score": "sigmoid", "bias": True, "renorm": True, "scale": 2.5}
# Experts, choices, and the rest as route_op takes it.
ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "deepseek-v1": (64, 6, {"score": "softmax", "shared": 2}),
    "deepseek-v2": (
        160,
        6,
        {"score": "softmax", "scale": 16.0, "groups": 8, "topk_groups": 3, "masked": "zero", "shared": 2},
    ),
    "deepseek-v2-lite": (64, 6, {"score": "softmax", "shared": 2}),
    "deepseek-v3": (
        256,
        8,
        V3 | {"groups": 8, "topk_groups": 4, "group_score": "top2sum", "shared": 1},
    ),
    "deepseek-v4": (
        384,
        6,
        {"score": "sqrtsoftplus", "bias": True, "renorm": True, "scale": 1.5, "shared": 1},
    ),
    "mixtral": (8, 2, {"score": "softmax", "renorm": True, "dtype": "bf16"}),
    "qwen3": (128, 8, {"score": "softmax", "renorm": True, "dtype": "bf16", "to": "bf16"}),
    "qwen3-next": (512, 10, {"score": "softmax", "renorm": True, "dtype": "bf16", "shared": 1}),
    "olmoe": (64, 8, {"score": "softmax", "dtype": "bf16", "to": "bf16"}),
    "qwen2-moe": (60, 4, {"score": "softmax"}),
    "one expert": (1, 1, {"score": "sigmoid", "renorm": True}),
    "all experts": (19, 19, {"score": "softmax", "bias": "bf16", "dtype": "f16", "to": "f16", "shared": 3}),
    "the most": (1024, 16, V3 | {"groups": 32, "topk_groups": 3, "group_score": "top2sum", "dtype": "f16"}),
    "groups of 11": (33, 16, V3 | {"groups": 3, "topk_groups": 2, "masked": "zero", "bias": "f16"}),
    "groups of 2": (6, 5, V3 | {"groups": 3, "topk_groups": 3, "group_score": "top2sum"}),
    "masked ones are taken": (12, 7, V3 | {"groups": 6, "topk_groups": 2, "masked": "zero", "bias": False}),
}
KINDS = ("steps", "normal", "one value", "wide", "odd")


def router(name: str, op: str = "route_sort") -> Op:
    experts, k, how = ROUTERS[name]
    return route_op(op, experts, k, **how)


def inputs(op: Op, tokens: int, kind: str, seed: int) -> list[Tensor]:
    """Logits, and a bias where there is one: with many ties (steps), without, all equal, to ± 200, or with
    NaN and infinities here and there.
    """
    generator = torch.Generator().manual_seed(seed)
    shape: Any = op.operands[0].type.shape  # type: ignore[union-attr]
    logits = torch.randn(tokens, shape[1], generator=generator) * 2
    if kind == "steps":
        logits = (logits * 2).round() / 2
    elif kind == "one value":
        logits = torch.full_like(logits, 0.75)
    elif kind == "wide":
        logits = logits * 100
    elif kind == "odd":
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
        which = torch.randint(0, 4, logits.shape, generator=generator)
        logits = torch.where(torch.rand(logits.shape, generator=generator) < 0.05, values[which], logits)
    made = [logits]
    if op.operands[1] is not None:
        bias = torch.randn(shape[1], generator=generator)
        made.append((bias * 2).round() / 4 if kind in ("steps", "one value") else bias)
    types = [v.type.dtype.torch for v in op.operands if v is not None]  # type: ignore[union-attr]
    return [value.to(dtype) for value, dtype in zip(made, types, strict=True)]


def check(op: Op, found: tuple[Tensor, ...], operands: list[Tensor]) -> None:
    """``found`` is what the reference gives; where two scores differ by less than rounding, either order."""
    w, id, *order = found
    expected_w, expected_id, *_ = type(op).reference(*operands, **op.attrs)
    assert id.dtype == torch.int32 and id.shape == expected_id.shape and w.dtype == expected_w.dtype
    other = (id != expected_id).any(1).nonzero().flatten().tolist()
    for t in other:
        row = [operands[0][t : t + 1], *operands[1:]]
        assert admissible(op, id[t], row), f"token {t}: {id[t].tolist()}, not {expected_id[t].tolist()}"
    assert len(other) <= 2 + len(id) // 10  # ties of sums, which each rounds in its way
    same = (id == expected_id).all(1)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[w.dtype]
    torch.testing.assert_close(w[same], expected_w[same], rtol=tolerance, atol=1e-7, equal_nan=True)
    if op.name == "route":
        assert not order
        return
    experts = operands[0].shape[1] + op.attrs["shared"]
    for have, want in zip(order, SortByExpert.reference(id, experts=experts), strict=True):
        assert torch.equal(have, want)


def admissible(op: Op, id: Tensor, operands: list[Tensor]) -> bool:
    """Whether this choice for one token is right in double precision but for differences of rounding."""
    close = 2e-6
    scores = scores_of_64(operands[0], op.attrs["score"])[0]
    choice = scores + (operands[1].double() if len(operands) > 1 else 0.0)
    experts, groups = len(choice), op.attrs["groups"]
    chosen = id[: op.attrs["k"]].long()
    if len(set(chosen.tolist())) < len(chosen) or not bool(choice.isfinite().all()):
        return False
    may = torch.ones(experts, dtype=torch.bool)
    if groups > 1:
        best = choice.view(groups, -1).sort(dim=1, descending=True).values
        of_group = best[:, :2].sum(1) if op.attrs["group_score"] == "top2sum" else best[:, 0]
        least = of_group.sort(descending=True).values[op.attrs["topk_groups"] - 1]
        if bool(((of_group - least).abs() < close).sum() > 1):
            return True  # groups that rounding may exchange
        may = (of_group >= least).repeat_interleave(experts // groups)
    if op.attrs["masked"] == "zero":
        choice = torch.where(may, choice, 0.0)
    elif not bool(may[chosen].all()):
        return False
    taken = choice[chosen]
    rest = may if op.attrs["masked"] != "zero" else torch.ones_like(may)
    rest = rest.clone()
    rest[chosen] = False
    in_order = bool((taken[:-1] - taken[1:] > -close).all())
    ties = bool(((taken[:-1] != taken[1:]) | (chosen[:-1] < chosen[1:])).all())
    return in_order and ties and not bool((choice[rest] > taken.min() + close).any())


def scores_of_64(logits: Tensor, score: str) -> Tensor:
    x = logits.double()
    if score == "softmax":
        return x.softmax(-1)
    return x.sigmoid() if score == "sigmoid" else torch.nn.functional.softplus(x).sqrt()
