"""What benchmarks/gpu counts, against hand calculations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import shapes as found

    yield found
    for name in [n for n in sys.modules if n == "gpu" or n.startswith("gpu.")]:
        del sys.modules[name]


def test_the_floor_of_deepseek_v3(shapes: Any) -> None:
    """One expert is 44.04M weights; 64 tokens choose 222.4 of 256 experts; 0.7 GFLOP a token."""
    v3 = shapes.SHAPES["deepseek-v3"]
    assert v3.expert == 44_040_192
    assert v3.active(1) == pytest.approx(8)
    assert v3.active(64) == pytest.approx(222.4, abs=0.05)
    assert v3.active(4096) == pytest.approx(256)
    assert v3.flops(1) == 2 * 8 * 44_040_192
    activations = 2 * 64 * (7168 + 8 * 2048)
    assert v3.bytes(64, 2) == pytest.approx(2 * (v3.active(64) * 44_040_192 + activations))


def test_a_slice_is_a_part(shapes: Any) -> None:
    whole, slice4 = shapes.SHAPES["deepseek-v3"], shapes.SHAPES["deepseek-v3-tp4"]
    assert whole.weights == 4 * slice4.weights
