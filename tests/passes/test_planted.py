"""A mistake planted in each pass, of the kind that one makes: the oracle finds it. Else it's silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moec.codegen  # noqa: F401 - select asks it for kernels
from moec import models
from moec.errors import ToleranceExceeded
from moec.ir import CacheType, Interpreter, Module, Op, Value
from moec.passes import (
    PASSES,
    Oracle,
    PassManager,
    cleanup,
    decode_entry,
    expert_grouping,
    fp8_cast,
    loading,
    merge_projections,
)
from moec.passes.manager import Pass, parse_pipeline
from moec.passes.pattern import Match
from tests.passes.whole_models import Run, checkpoint

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]


def spoil(op_name: str, *, order: tuple[int, ...] = (), **changes: Callable[[Any], Any]) -> Plant:
    """Rewrites create ``op_name`` with its operands in another order, or with attributes changed."""
    create = Match.create

    def spoiled(m: Match, name: str, *operands: Value | None, **attrs: Any) -> Any:
        if name == op_name:
            operands = tuple(operands[i] for i in order) or operands
            attrs |= {key: change(attrs[key]) for key, change in changes.items()}
        return create(m, name, *operands, **attrs)

    return lambda patch: patch.setattr(Match, "create", spoiled)


def ignore_attributes(patch: Patch) -> None:
    """Equal ops are those with the same operands, whatever their attributes."""
    patch.setattr(cleanup, "sorted", lambda attrs: [], raising=False)


def swap_parts(module: Any) -> Plant:
    """Weights are joined in the wrong order."""

    def emit(m: Module, holder: Any, op: str, parts: list[Value], attrs: Any, out: str) -> Op:
        return loading.emit(m, holder, op, parts[::-1] if op == "concat" else parts, attrs, out)

    return lambda patch: patch.setattr(module, "emit", emit)


def annotate_too_much(patch: Patch) -> None:
    """An annotation lands among what the op means."""

    def annotate(op: Op, key: str, value: Any) -> bool:
        if op.name == "swiglu" and op.attrs["act"] != "gelu":
            op.attrs["act"] = "gelu"
            return True
        return False

    patch.setattr(Op, "annotate", annotate)


def forget_attributes(patch: Patch) -> None:
    """What is cloned gets the defaults of all that needn't be given."""

    def attrs(self: Any, op: Op) -> dict[str, Any]:
        return {key: op.attrs[key] for key, spec in op.attr_specs.items() if spec.required or spec.hidden}

    patch.setattr(decode_entry._Clones, "_attrs", attrs)


def confuse_weights(patch: Patch) -> None:
    """Weights of one shape are taken for one."""
    known: dict[Any, Any] = {}
    weight = fp8_cast.FP8Cast._weight

    def confused(it: Any, m: Match, w: Any) -> Any:
        key = (m.function, w.type)
        if key not in known:
            known[key] = weight(it, m, w)
        return known[key]

    patch.setattr(fp8_cast.FP8Cast, "_weight", confused)


# Passes that round: the largest error that may be theirs. Such a one may turn a router's choice: no router.
ROUND = {"fp8-cast": 0.2}
# By pass: what is done before it, and the mistake.
PLANTED: dict[str, tuple[str, Plant]] = {
    "canonicalise": ("expert-grouping", ignore_attributes),
    "decode-entry": ("canonicalise,mla-absorb{absorb_below=9},canonicalise", forget_attributes),
    "expert-grouping": ("canonicalise", swap_parts(expert_grouping)),
    "fp8-cast": ("canonicalise", confuse_weights),
    "merge-projections": ("canonicalise", swap_parts(merge_projections)),
    "mla-absorb": ("canonicalise", spoil("latent_attention", scale=lambda scale: 1.0)),
    "norm-fusion": ("canonicalise", spoil("add_rms_norm", eps=lambda eps: 1.0)),
    "one-launch": (
        "canonicalise,expert-grouping,permute-fusion{route_sort=true,combine=true}",
        spoil("routed_experts", scale=lambda scale: 1.0),
    ),
    "paged-attention": ("canonicalise", spoil("paged_attention", scale=lambda scale: 1.0)),
    "permute-fusion": (
        "canonicalise,expert-grouping",
        spoil("gather_grouped_linear", per_row=lambda per_row: 2 * per_row),
    ),
    "plan": ("canonicalise", annotate_too_much),
    "rope-cache-fusion": ("canonicalise", spoil("latent_cache_write", eps=lambda eps: 1.0)),
    "select": ("canonicalise", annotate_too_much),
    "sort-quant-fusion": (
        "canonicalise,expert-grouping,fp8-cast,permute-fusion{route_sort=true}",
        spoil("route_sort_and_quant", quant_scale=lambda scale: "ue8m0"),
    ),
}
REGISTERED = sorted(name for name, cls in PASSES.items() if cls.__module__.startswith("moec.passes."))


def model(routers: bool) -> models.Model:
    """Something for every pass: two kinds of attention and of rotation, experts, shared ones, FP8."""
    latent = models.MLA(2, 8, 8, 8, 8, 8, models.RoPE(100.0, "interleaved"))
    grouped = models.GQA(2, 2, 8, models.RoPE(10000.0, "half"), qk_norm="head")
    router = models.Router(4, 2, score="sigmoid", renorm=True, scale=2.5, bias=True)
    routed = models.MoE(router, models.Experts(4, 8), models.SwiGLU(8, name="shared_experts"))
    layers = [
        models.Decoder(latent, routed if routers else models.SwiGLU(16)),
        models.Decoder(grouped, models.SwiGLU(8)),
        models.Decoder(latent, routed if routers else models.SwiGLU(16)),
    ]
    fp8 = models.BlockFP8((4, 4))
    return models.Model(13, 16, layers, dtype="f32", page=2, max_positions=32, quantization=fp8)


def oracle(module: Module, weights: dict[str, torch.Tensor], tolerance: float) -> Oracle:
    """Two sequences of five new tokens and three."""
    counts, pages = (5, 3), torch.tensor([[4, 0, 2], [5, 1, 3]], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in counts])
    slots = torch.cat(
        [pages[b].long()[torch.arange(n) // 2] * 2 + torch.arange(n) % 2 for b, n in enumerate(counts)]
    )
    lens = torch.tensor(counts, dtype=torch.int32)
    batch = [
        torch.arange(8) % 13,
        positions,
        torch.tensor([0, 5, 8], dtype=torch.int32),
        lens,
        pages,
        slots,
    ]
    interpreter = Interpreter(module, weights)
    types = [a.type for a in module["step"].args if isinstance(a.type, CacheType)]
    return Oracle({"step": [*batch, *(interpreter.new_cache(t, 3, 6) for t in types)]}, weights, tolerance)


def prepared(name: str) -> tuple[Module, Pass, Oracle]:
    module = models.lower(model(routers=name not in ROUND))
    weights = checkpoint(module, Run((), 6, seed=0, ties=False, all_to=None))
    for each in parse_pipeline(PLANTED[name][0]) if PLANTED[name][0] else []:
        each.run(module)
    (it,) = parse_pipeline(name)
    return module, it, oracle(module, weights, ROUND.get(name, 1e-5))


@pytest.mark.parametrize("name", REGISTERED)
def test_a_planted_mistake_is_found(name: str, monkeypatch: Patch) -> None:
    assert name in PLANTED, f"{name}: plant a mistake in it that the oracle finds"
    module, it, watch = prepared(name)
    PLANTED[name][1](monkeypatch)
    with pytest.raises(ToleranceExceeded, match=rf"{name} changed (step|decode)\.\d by \S+, more than"):
        PassManager([it], [watch]).run(module)


@pytest.mark.parametrize("name", REGISTERED)
def test_without_it_nothing_is_found(name: str) -> None:
    module, it, watch = prepared(name)
    (done,) = PassManager([it], [watch]).run(module)
    assert done.changed, f"{name} does nothing here: the mistake would be found in nothing"


def test_nothing_is_planted_in_what_is_gone() -> None:
    assert set(PLANTED) == set(REGISTERED)
