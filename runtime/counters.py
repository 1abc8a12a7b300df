"""Words of device memory that are zero between launches: blocks of one launch count in them who has arrived.

A launch finds its words zero and leaves them zero, so nothing clears them in between. Launches that may
overlap never share any: each stream has words of its own, and each launch that a CUDA graph records takes
fresh ones, since graphs that one stream recorded may be replayed side by side. Once those run out, what a
stream records in one graph shares words of the graph's own memory, which each replay clears once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.runtime import driver

WORDS = 16384  # a stream's, until a launch asks for more
RESERVED = 1 << 20  # of all recorded launches on a device, 4 bytes each
_LINE = 32  # words of 128 bytes: counters of two launches are never in one

_of_stream: dict[tuple[int, int], Tensor] = {}
_reserve: dict[int, Tensor] = {}
_taken: dict[int, int] = {}
_cleared: dict[tuple[int, int], tuple[int, Tensor]] = {}  # by device and stream, with the recording's number


def zeroed(device: torch.device, words: int) -> Tensor:
    """int32 [words] of zeros for one launch on ``device``'s current stream, which must leave them zero."""
    if device.type != "cuda":
        return torch.zeros(words, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (index, torch.cuda.current_stream(index).cuda_stream)
    if torch.cuda.is_current_stream_capturing():
        return _for_a_recording(device, key, words)
    kept = _of_stream.get(key)
    if kept is None or len(kept) < words:
        # The old ones' memory is the allocator's again, which gives it to later work of this stream only.
        kept = _of_stream[key] = torch.zeros(max(words, WORDS), dtype=torch.int32, device=device)
    return kept[:words]


def _for_a_recording(device: torch.device, key: tuple[int, int], words: int) -> Tensor:
    index, stream = key
    first = _taken.get(index, 0)
    if index not in _reserve or first + words > RESERVED:
        recording = driver.recording(stream)
        known, kept = _cleared.get(key, (-1, None))
        if kept is None or known != recording or len(kept) < words:  # recorded too: cleared at each replay
            kept = torch.zeros(max(words, WORDS), dtype=torch.int32, device=device)
            _cleared[key] = recording, kept
        return kept[:words]
    _taken[index] = first + -(-words // _LINE) * _LINE
    return _reserve[index][first : first + words]


def prepare(index: int) -> None:
    """Clears what recordings on a device will take; waits until that is done, so that any stream may."""
    if index not in _reserve:
        _reserve[index] = torch.zeros(RESERVED, dtype=torch.int32, device=torch.device("cuda", index))
        torch.cuda.synchronize(index)
