"""The paged KV cache: for each layer one tensor of pages, and for each sequence a list of page numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.errors import CacheFull
from moec.runtime.dtypes import DTYPES


@dataclass(frozen=True)
class CacheSpec:
    """What one token keeps in each of ``layers``: ``entry`` elements of ``dtype``, ``page`` tokens a page."""

    name: str
    dtype: str
    entry: tuple[int, ...]
    page: int
    layers: tuple[int, ...]

    @staticmethod
    def of(manifest: dict[str, Any]) -> CacheSpec:
        fields = dict(manifest)
        return CacheSpec(**fields | {"entry": tuple(fields["entry"]), "layers": tuple(fields["layers"])})

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token keeps over all layers."""
        elements = 1
        for size in self.entry:
            elements *= size
        return elements * DTYPES[self.dtype].itemsize * len(self.layers)


class KVCache:
    """Pages for ``pages`` × page tokens in every layer, and who owns them.

    ``tensors[name][layer]`` is [pages + 1, page, *entry]: the page at the end is spare, where padded tokens
    (slot -1) write and nobody reads.
    """

    def __init__(self, specs: Sequence[CacheSpec], pages: int, device: str = "cpu") -> None:
        self.specs, self.pages = tuple(specs), pages
        self.page = specs[0].page if specs else 1
        self.tensors: dict[str, list[torch.Tensor | None]] = {}
        for spec in specs:
            layers: list[torch.Tensor | None] = [None] * (max(spec.layers, default=-1) + 1)
            for layer in spec.layers:
                layers[layer] = torch.empty(
                    (pages + 1, spec.page, *spec.entry), dtype=DTYPES[spec.dtype], device=device
                )
            self.tensors[spec.name] = layers
        self._free = list(range(pages - 1, -1, -1))

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the spare pages included."""
        return sum(t.nbytes for layers in self.tensors.values() for t in layers if t is not None)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` free pages. Raises CacheFull, taking none, where there are fewer."""
        if count > len(self._free):
            raise CacheFull(f"{count} pages of {self.page} tokens are needed, {len(self._free)} are free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)


@dataclass
class CachedSequence:
    """One sequence's place in a cache: its pages, and how many tokens they hold."""

    cache: KVCache
    pages: list[int] = field(default_factory=list)
    length: int = 0

    def reserve(self, tokens: int) -> None:
        """Pages for ``tokens`` more. Raises CacheFull."""
        want = -(-(self.length + tokens) // self.cache.page)
        if want > len(self.pages):
            self.pages += self.cache.take(want - len(self.pages))

    def slots(self, first: int, last: int) -> list[int]:
        """The slots of positions first … last - 1."""
        page = self.cache.page
        return [self.pages[p // page] * page + p % page for p in range(first, last)]

    def release(self) -> None:
        self.cache.give_back(self.pages)
        self.pages, self.length = [], 0
