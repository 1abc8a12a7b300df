"""moec's own rows: the experts as they are built without a word, and with options for some of them.

A row more is an entry more: what it is called, the options of its builds, the device that it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu.goals import INVARIANT
from gpu.problem import Weights
from gpu.routers import asked
from gpu.shapes import Shape
from torch import Tensor

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, weights, ids -> y
Layer = Callable[[Tensor, Tensor], Tensor]  # x, logits -> y


class NotHere(Exception):
    """Why a row isn't measured on this device."""


@dataclass(frozen=True)
class Variant:
    """``options`` are those of ``moec.ops.building``, ``capability`` is that of the GPUs that it is for.

    With more than ``most_tokens`` it is what another row is, and isn't measured.
    """

    options: dict[str, Any] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    most_tokens: int | None = None

    def experts(self, given: Weights, top_k: int) -> Experts:
        """Raises NotHere."""
        from moec.ops import building, fused_experts

        self._here()
        scales = _scales(given)

        def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            with building(**self.options):
                return fused_experts(x, given.w13, given.w2, weights, ids, **scales)

        return run

    def layer(self, given: Weights, shape: Shape) -> Layer:
        """From the router's logits on in one call. Raises NotHere."""
        from moec.ops import building, routed_experts

        self._here()
        how: dict[str, Any] = {**asked(shape), **_scales(given)}

        def run(x: Tensor, logits: Tensor) -> Tensor:
            with building(**self.options):
                return routed_experts(x, logits, given.w13, given.w2, given.bias, **how)

        return run

    def _here(self) -> None:
        if self.capability is None or not torch.cuda.is_available():  # a self-test runs every row
            return
        here = torch.cuda.get_device_capability()
        if here != self.capability:
            wanted, found = (".".join(map(str, c)) for c in (self.capability, here))
            raise NotHere(f"it is for compute capability {wanted}, and this is {found}")


def _scales(given: Weights) -> dict[str, Tensor | None]:
    """None in other dtypes than fp8."""
    return {"w13_scale": given.w13_scale, "w2_scale": given.w2_scale}


GLUON = "moec (gluon)"
ONE_LAUNCH = "moec (one launch)"
# That of GPUs, with one-launch before kernels are chosen. In fp8 x is quantised in a launch of its own.
TOGETHER = (
    "canonicalise,expert-grouping,canonicalise,permute-fusion{route_sort=true,combine=true},"
    "sort-quant-fusion,one-launch,select,plan"
)
VARIANTS = {
    "moec": Variant(),
    INVARIANT: Variant({"batch_invariant": True}),  # one schedule whatever M is
    GLUON: Variant({"kernels": "gluon"}, (9, 0)),  # warps with tasks of their own, for many tokens
    ONE_LAUNCH: Variant({"passes": TOGETHER}, most_tokens=16),
}
