"""Counters: zero at first, each stream's own, fresh for each launch that is recorded."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from moec.runtime import counters, driver

CPU = torch.device("cpu")


class Cuda:
    """Stands in for torch.cuda; tensors stay on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.waits = 1, False, 0
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
        fake = {
            "current_device": lambda: 0,
            "current_stream": lambda index: SimpleNamespace(cuda_stream=self.stream),
            "is_current_stream_capturing": lambda: self.capturing,
            "synchronize": self.wait,
        }
        for name, function in fake.items():
            monkeypatch.setattr(torch.cuda, name, function)
        for name in ("_of_stream", "_reserve", "_taken", "_cleared"):
            monkeypatch.setattr(counters, name, {})
        self.recording = 1
        monkeypatch.setattr(driver, "recording", lambda stream: self.recording)

    def wait(self, index: int) -> None:
        self.waits += 1

    def take(self, words: int = 3) -> torch.Tensor:
        return counters.zeroed(torch.device("cuda"), words)


def test_the_cpu_gets_new_ones() -> None:
    assert torch.equal(counters.zeroed(CPU, 3), torch.zeros(3, dtype=torch.int32))


def test_a_stream_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    first = cuda.take()
    assert first.tolist() == [0, 0, 0] and first.dtype == torch.int32
    assert cuda.take(5).data_ptr() == first.data_ptr()
    cuda.stream = 2
    assert cuda.take().data_ptr() != first.data_ptr()
    assert len(cuda.take(16385)) == 16385 and not cuda.take(16385).any()


def test_recorded_launches_share_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    eager = cuda.take()
    counters.prepare(0)
    counters.prepare(0)
    assert cuda.waits == 1
    cuda.capturing = True
    taken = [cuda.take(words) for words in (3, 33, 1)]
    starts = [t.data_ptr() for t in taken]
    assert [b - a for a, b in pairwise(starts)] == [128, 256]
    assert eager.data_ptr() not in starts


def test_without_a_reserve_a_recording_clears_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all that a stream records in one graph; other streams and graphs have others."""
    cuda = Cuda(monkeypatch)
    cuda.capturing = True
    one, same = cuda.take(50), cuda.take(60)
    assert one.data_ptr() == same.data_ptr() and (one.numel(), same.numel()) == (50, 60)
    kept = [one, cuda.take(20000)]
    cuda.recording = 2
    kept.append(cuda.take(50))
    cuda.stream = 2
    kept.append(cuda.take(50))
    assert len({t.data_ptr() for t in kept}) == 4
    monkeypatch.setattr(counters, "RESERVED", 64)
    counters.prepare(0)
    reserve = counters._reserve[0]
    inside = [0 <= cuda.take(50).data_ptr() - reserve.data_ptr() < 256 for _ in range(2)]
    assert inside == [True, False]  # the second finds too little left
