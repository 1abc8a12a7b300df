"""Stand-ins that let a CPU run every branch: a peer that pads, one that is wrong, fails, or isn't there."""

from __future__ import annotations

import torch
from gpu.peers import Adapter, Experts, padded
from gpu.problem import Weights
from torch import Tensor


def padding(given: Weights, top_k: int) -> Experts:
    def product(a: Tensor, w: Tensor, out: Tensor, group: Tensor) -> None:
        """out[r] = w[group[r]] · a[r]; a padded row's result is NaN."""
        for e in range(len(w)):
            out[group == e] = (a[group == e].double() @ given.matrix(w, e).T).to(out.dtype)
        out[group < 0] = torch.nan

    return padded(given, top_k, product, block=4)


def wrong(given: Weights, top_k: int) -> Experts:
    return lambda x, weights, ids: x


def failing(given: Weights, top_k: int) -> Experts:
    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        raise RuntimeError("it doesn't take this")

    return run


def missing(given: Weights, top_k: int) -> Experts:
    raise ModuleNotFoundError("No module named 'nobody'", name="nobody")


STAND_INS: dict[str, Adapter] = {"padding": padding, "wrong": wrong, "failing": failing, "missing": missing}
