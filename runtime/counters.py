"""Words of device memory that are zero between launches: blocks of one launch count in them who has arrived.

A launch finds its words zero and leaves them zero, so nothing clears them in between. Launches that may
overlap never share any: each stream has words of its own, and each launch that a CUDA graph records takes
fresh ones, since graphs that one stream recorded may be replayed side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.errors import BadArgument

WORDS = 16384  # a stream's, and so the most that one launch may ask for
RESERVED = 1 << 20  # of all recorded launches on a device, 4 bytes each
_LINE = 32  # words of 128 bytes: counters of two launches are never in one

_of_stream: dict[tuple[int, int], Tensor] = {}
_reserve: dict[int, Tensor] = {}
_taken: dict[int, int] = {}


def zeroed(device: torch.device, words: int) -> Tensor:
    """int32 [words] of zeros for one launch on ``device``'s current stream, which must leave them zero.

    Raises BadArgument for more than WORDS.
    """
    if words > WORDS:
        raise BadArgument(f"a launch may have {WORDS} counters, not {words}")
    if device.type != "cuda":
        return torch.zeros(words, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        return _for_a_recording(device, index, words)
    key = (index, torch.cuda.current_stream(index).cuda_stream)
    if key not in _of_stream:
        _of_stream[key] = torch.zeros(WORDS, dtype=torch.int32, device=device)
    return _of_stream[key][:words]


def _for_a_recording(device: torch.device, index: int, words: int) -> Tensor:
    first = _taken.get(index, 0)
    if index not in _reserve or first + words > RESERVED:
        return torch.zeros(words, dtype=torch.int32, device=device)  # recorded too: cleared at each replay
    _taken[index] = first + -(-words // _LINE) * _LINE
    return _reserve[index][first : first + words]


def prepare(index: int) -> None:
    """Clears what recordings on a device will take; waits until that is done, so that any stream may."""
    if index not in _reserve:
        _reserve[index] = torch.zeros(RESERVED, dtype=torch.int32, device=torch.device("cuda", index))
        torch.cuda.synchronize(index)
