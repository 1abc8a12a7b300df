"""Stand-ins that let a CPU run all branches: products, a peer to tune, one that is wrong, one that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from gpu.deepgemm import Composed
from gpu.peers import Adapter, Experts
from gpu.problem import BLOCK, Weights, spread
from gpu.tuning import Config, Tunable
from torch import Tensor


class Products:
    """What ``gpu.deepgemm`` wants of the module deep_gemm, in double precision. Rows of nobody become NaN."""

    owned = 0  # rows that the last contiguous product had to compute

    @staticmethod
    def get_mk_alignment_for_contiguous_layout() -> int:
        return 4

    @staticmethod
    def m_grouped_bf16_gemm_nt_contiguous(a: Any, b: Any, d: Tensor, owner: Tensor) -> None:
        assert len(owner) == len(d) and len(d) % 4 == 0
        Products.owned = int((owner >= 0).sum())
        rows, weights = _wide(a), b[0] if isinstance(b, tuple) else b
        d.fill_(torch.nan)
        for e in range(len(weights)):
            mine = (owner == e).nonzero()[:, 0]
            assert not len(mine) or int(mine[0]) % 4 == 0
            d[mine] = (rows[mine] @ _matrix(b, e).T).to(d.dtype)

    @staticmethod
    def m_grouped_bf16_gemm_nt_masked(a: Any, b: Any, d: Tensor, sizes: Tensor, expected: int) -> None:
        assert expected >= 1
        rows = _wide(a)
        d.fill_(torch.nan)
        for e, size in enumerate(sizes.tolist()):
            d[e, :size] = (rows[e, :size] @ _matrix(b, e).T).to(d.dtype)

    m_grouped_fp8_gemm_nt_contiguous = m_grouped_bf16_gemm_nt_contiguous
    m_grouped_fp8_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked


def _wide(a: Any) -> Tensor:
    """[·, K] in double precision; scales must lie column-major, as TMA wants them."""
    if not isinstance(a, tuple):
        return a.double()
    values, scale = a
    assert scale.stride(-2) == 1 and scale.stride(-1) == scale.shape[-2]
    return values.double() * scale.repeat_interleave(BLOCK, -1)[..., : values.shape[-1]]


def _matrix(b: Any, e: int) -> Tensor:
    if not isinstance(b, tuple):
        return b[e].double()
    return b[0][e].double() * spread(b[1][e], b[0].shape[1:])


def contiguous(given: Weights, top_k: int) -> Experts:
    """DeepGEMM's contiguous layout round a stand-in for its products."""
    composed = Composed(given, top_k, Products, masked=False, many=8)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = composed(x, weights, ids)
        assert Products.owned == ids.numel()  # what pads an expert's rows is nobody's, and isn't computed
        return y

    return run


def masked(given: Weights, top_k: int) -> Experts:
    """DeepGEMM's masked layout round a stand-in for its products."""
    return Composed(given, top_k, Products, masked=True)


CACHE = 2**14  # bytes: two or three copies and inputs rotate, which Triton's interpreter can bear
told: list[Config] = []  # the configuration that is in force


def tuned(given: Weights, top_k: int) -> Experts:
    """One that is slow in its own configuration, and takes some that are wrong or that it can't have."""

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        config = told[-1] if told else {"BLOCK_SIZE_M": 0, "num_warps": 4, "num_stages": 3}
        if config["num_stages"] == 4:
            raise RuntimeError("out of resource: shared memory")
        y = torch.zeros(x.shape, dtype=torch.float64)
        for _ in range(1 if told else 3):
            y.zero_()
            for e in ids.unique().tolist():
                token, choice = (ids == e).nonzero(as_tuple=True)
                gate, up = (x[token].double() @ given.matrix(given.w13, e).T).chunk(2, dim=-1)
                part = (F.silu(gate) * up) @ given.matrix(given.w2, e).T
                y.index_add_(0, token, weights[token, choice, None] * part)
        return (y * (2 if config["num_warps"] == 8 else 1)).to(x.dtype)

    return run


@contextmanager
def override(config: Config) -> Iterator[None]:
    """As vLLM's and SGLang's: an error in the ``with`` leaves it in force."""
    told.append(config)
    yield
    told.pop()


def wrong(given: Weights, top_k: int) -> Experts:
    return lambda x, weights, ids: x


def failing(given: Weights, top_k: int) -> Experts:
    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        raise RuntimeError("it doesn't take this")

    return run


def missing(given: Weights, top_k: int) -> Experts:
    raise ModuleNotFoundError("No module named 'nobody'", name="nobody")


STAND_INS: dict[str, Adapter] = {
    "contiguous": contiguous,
    "masked": masked,
    "tuned": tuned,
    "wrong": wrong,
    "failing": failing,
    "missing": missing,
}
TUNABLE = {"tuned": Tunable(override, lambda shape, dtype: False)}
