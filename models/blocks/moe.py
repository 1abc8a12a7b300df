"""Mixture of experts: a router, many small MLPs, and those that every token takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.ir import Builder, Range, Value
from moec.ir.types import f32
from moec.models.blocks.base import Block, Declared, is_name, width
from moec.models.blocks.router import Router
from moec.models.blocks.swiglu import ACTIVATIONS, SwiGLU


@dataclass(frozen=True)
class Experts(Declared):
    """``count`` gated MLPs of ``intermediate`` columns; ``weights`` name their gate, up and down.

    limit: as that of ``SwiGLU``.
    """

    count: int
    intermediate: int
    act: str = "silu"
    weights: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    name: str = "experts"
    limit: float | None = None

    def __post_init__(self) -> None:
        self.as_tuple("weights")

    def check(self) -> None:
        self.need_positive("count", "intermediate")
        self.need_one_of("act", *ACTIVATIONS)
        self.need_name("name")
        self.need_number(*(["limit"] if self.limit is not None else []), above=0)
        names = self.weights if isinstance(self.weights, tuple) else ()
        fits = len({n for n in names if isinstance(n, str) and is_name(n)}) == len(names) == 3
        self.need(fits, f"weights names three projections, not {self.weights!r}")

    def lower(self, b: Builder, x: Value, w: Value, id: Value) -> Value:
        """Σ_j w[t, j] · expert id[t, j] of x [T, H], summed in fp32: one loop over the experts."""
        H, I = width(x), self.intermediate
        gate, up, down = self.weights
        k = width(id)

        def body(b: Builder, e: Value, y: Value, x: Value, w: Value, id: Value) -> Sequence[Value]:
            slot = b.expert_slots(id, e)
            xe = b.gather_rows(x, slot, per_row=k, out="xe")  # [R, H]
            g = b.project(xe, gate, I, out="g")
            u = b.project(xe, up, I, out="u")
            h = b.swiglu(g, u, act=self.act, limit=self.limit and float(self.limit), out="h")
            d = b.project(h, down, H, out="d")
            return [b.scatter_add(y, d, slot, w, per_row=k, out="y")]

        start = b.zeros_like(x, dtype=f32, out="y")
        scope, name = f"{self.name}.*", _unused(b, f"{b.function.name}.expert")
        (y,) = b.loop("for_each", Range(0, self.count - 1), scope, name, [start], [x, w, id], body)
        return y


def _unused(b: Builder, name: str) -> str:
    number, candidate = 1, name
    while candidate in b.module:
        number += 1
        candidate = f"{name}{number}"
    return candidate


@dataclass(frozen=True)
class MoE(Block):
    """The experts that ``router`` picks, plus ``shared``, which every token takes.

    shared_gate: the shared MLP's output is multiplied by sigmoid(W·x), one number a token (Qwen2-MoE).
    """

    router: Router
    experts: Experts
    shared: SwiGLU | None = None
    shared_gate: str = ""
    name: str = "mlp"

    def check(self) -> None:
        self.need_a("router", Router)
        self.need_a("experts", Experts)
        self.need(
            self.router.experts == self.experts.count,
            f"the router chooses among {self.router.experts} experts, but there are {self.experts.count}",
        )
        self.need(
            self.shared is None or isinstance(self.shared, SwiGLU),
            f"shared must be a SwiGLU, not {self.shared!r}",
        )
        self.need_name("name", "shared_gate", empty=True)
        self.need(not self.shared_gate or self.shared is not None, "shared_gate without a shared MLP")

    def lower(self, b: Builder, x: Value) -> Value:
        """x [N, H] to [N, H]."""
        with b.scope(self.name):
            w, id = self.router.lower(b, x)
            routed = self.experts.lower(b, x, w, id)
            y = b.cast(routed, b.dtype, out="routed")
            if self.shared is None:
                return y
            both: Value = b.add(y, self._shared(b, x, self.shared), out="mlp")
            return both

    def _shared(self, b: Builder, x: Value, shared: SwiGLU) -> Value:
        y = shared.lower(b, x)
        if not self.shared_gate:
            return y
        gate = b.project(x, self.shared_gate, 1, out="shared.logit")
        gated: Value = b.mul(b.sigmoid(gate, out="shared.weight"), y, out="shared")
        return gated
