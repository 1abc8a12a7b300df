"""Bytes that a stretch of code holds at most: of every storage that it made, while that is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``peak``: the most bytes, after any PyTorch operator, of the storages that operators have made.

    What an operator allocates within itself isn't seen. What comes in from outside isn't counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._outside: set[int] = set()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._outside |= {key for key, _ in storages((args, kwargs))} - self._live.keys()
        out = func(*args, **(kwargs or {}))
        for key, storage in storages(out):
            if key not in self._outside and key not in self._live:
                self._live[key] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def storages(tree: Any) -> Iterator[tuple[int, torch.UntypedStorage]]:
    for tensor in tree_leaves(tree):
        if isinstance(tensor, torch.Tensor):
            yield tensor.untyped_storage()._cdata, tensor.untyped_storage()
