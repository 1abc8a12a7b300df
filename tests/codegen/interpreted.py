"""What tests in Triton's interpreter share: poisoned memory, routings, calls with programs in either order.

They run in a process of their own (test_triton_kernels.py), since Triton fixes its mode when it is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from triton.runtime.interpreter import interpreter_builder

from moec.runtime import counters
from moec.runtime.triton_mode import interpreting
from tests.codegen import interpreter_casts, triton_kernels

assert interpreting(), "TRITON_INTERPRET=1 must be set"
interpreter_casts.install()

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}
FOLDER: dict[str, Path] = {}


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    FOLDER["kernels"] = tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows: it is NaN, or a number that is no row's."""
    empty = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(self, *size, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else -99)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@st.composite
def routings(draw: Any, most_tokens: int = 12) -> tuple[int, int, torch.Tensor]:
    """Experts, choices a token, ids [T, k]: at random, all to one, to two of many, or some to none."""
    experts = draw(st.sampled_from([1, 3, 4, 8]))
    k = draw(st.sampled_from([1, 2, 6]))
    tokens = draw(st.sampled_from([0, 1, 2, 5, most_tokens]))
    kind = draw(st.sampled_from(["random", "one", "skew", "skip", "none"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    low, high = {
        "random": (0, experts),
        "one": (experts - 1, experts),
        "skew": (0, min(2, experts)),
        "skip": (-2, experts + 2),
        "none": (experts, experts + 3),
    }[kind]
    ids = torch.randint(low, high, (tokens, k), generator=generator, dtype=torch.int32)
    return experts, k, ids


def normal(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(op: Any, text: str, folder: Path, *operands: Any) -> Any:
    """What the kernel makes of ``operands``.

    It must be the same bits whether its programs run from first to last or from last to first: then none
    writes what is another's, and sums are in one order whoever comes last. Counters are left as zeros.
    """
    taken: list[torch.Tensor] = []
    index, zeroed = interpreter_builder.set_grid_idx, counters.zeroed

    def mirrored(x: int, y: int, z: int) -> None:
        index(interpreter_builder.grid_dim[0] - 1 - x, y, z)

    def counted(device: torch.device, words: int) -> torch.Tensor:
        taken.append(zeroed(device, words))
        return taken[-1]

    with patch.object(counters, "zeroed", counted):
        forwards = triton_kernels.call(op, text, folder, *operands)
        with patch.object(interpreter_builder, "set_grid_idx", mirrored):
            backwards = triton_kernels.call(op, text, folder, *operands)
    torch.testing.assert_close(backwards, forwards, rtol=0, atol=0, equal_nan=True)
    assert not any(t.any() for t in taken)
    return forwards


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, equal_nan=True)
