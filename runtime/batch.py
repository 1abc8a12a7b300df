"""One step's input: the new tokens of several sequences, one sequence after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moec.errors import BadInput
from moec.runtime.cache import CachedSequence
from moec.runtime.values import whole

_DTYPES = {
    "ids": torch.int64,
    "positions": torch.int64,
    "cu_seqlens": torch.int32,
    "seq_lens": torch.int32,
    "block_table": torch.int32,
    "slot_mapping": torch.int64,
}


@dataclass(frozen=True)
class Batch:
    """N new tokens of B sequences: prefill, decode or both at once.

    ids           [N] int64    the tokens
    positions     [N] int64    where each stands in its sequence
    cu_seqlens    [B+1] int32  sequence b owns tokens cu_seqlens[b] … cu_seqlens[b+1] - 1
    seq_lens      [B] int32    tokens of each sequence in the cache once these are written
    block_table   [B, P] int32 the pages of each sequence; what lies beyond its length is never read
    slot_mapping  [N] int64    page · page size + place for each token's entry, -1 to drop it
    max_new       None, or the most new tokens that any sequence has: what a GPU's batch doesn't show without
                  being read back, and what decides whether ``@decode`` can run
    """

    ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_new: int | None = None

    def __post_init__(self) -> None:
        """Raises BadInput where shapes or dtypes don't fit each other; values aren't looked at."""
        sizes: dict[str, int] = {}
        for field, dims in (
            ("ids", "N"),
            ("positions", "N"),
            ("slot_mapping", "N"),
            ("seq_lens", "B"),
            ("block_table", "BP"),
            ("cu_seqlens", "C"),
        ):
            tensor = getattr(self, field)
            if not isinstance(tensor, torch.Tensor):
                raise BadInput(f"batch.{field} must be a tensor, not {type(tensor).__name__}")
            if tensor.dtype != _DTYPES[field] or tensor.dim() != len(dims):
                raise BadInput(
                    f"batch.{field} must be {_DTYPES[field]} of rank {len(dims)}, not {describe(tensor)}"
                )
            for dim, size in zip(dims, tensor.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise BadInput(
                        f"batch.{field} is {describe(tensor)}, but {dim} is {sizes[dim]} elsewhere"
                    )
        if self.max_new is not None:
            object.__setattr__(self, "max_new", whole("batch.max_new", self.max_new))
            if self.max_new < 0:
                raise BadInput(f"batch.max_new is {self.max_new}; it must be a number, 0 or more")
        if sizes["C"] != sizes["B"] + 1:
            raise BadInput(
                f"batch.cu_seqlens has {sizes['C']} entries for {sizes['B']} sequences: one more is needed"
            )

    def check(self, vocab: int | None, max_positions: int, pages: int | None, page: int | None) -> None:
        """Raises BadInput where values are out of range: what a kernel would read or write elsewhere.

        Without a vocabulary or a cache, what would index it isn't looked at. With a cache, a sequence's new
        tokens are its last ones, and each goes where its block table says, to a slot of its own, or nowhere.
        Tokens beyond ``cu_seqlens[-1]`` belong to no sequence; their slot is -1.
        """
        tokens = len(self.ids)
        if vocab is not None:
            _within("ids", self.ids, 0, vocab, f"token id {{}} is outside the vocabulary of {vocab}")
        _within("positions", self.positions, 0, max_positions)
        counts = self.cu_seqlens.diff()
        _within("cu_seqlens", self.cu_seqlens, 0, tokens + 1)
        if int(self.cu_seqlens[0]) != 0 or bool((counts < 0).any()):
            raise BadInput("batch.cu_seqlens must start at 0 and never fall")
        if self.max_new is not None and bool((counts > self.max_new).any()):
            raise BadInput(
                f"batch.max_new is {self.max_new}, but a sequence has {int(counts.max())} new tokens"
            )
        if pages is None or page is None:
            return
        _within("slot_mapping", self.slot_mapping, -1, pages * page)
        owned = int(self.cu_seqlens[-1])
        if owned < tokens and bool((self.slot_mapping[owned:] >= 0).any()):
            raise BadInput("batch.slot_mapping gives a slot to a token that no sequence owns")
        width = self.block_table.shape[1]
        _within("seq_lens", self.seq_lens, 0, min(width * page, max_positions) + 1)
        if bool((self.seq_lens < counts).any()):
            raise BadInput(
                "batch.seq_lens must count the new tokens too: one is less than those of cu_seqlens"
            )
        used = torch.arange(width, device=self.seq_lens.device) * page < self.seq_lens[:, None]
        _within("block_table", self.block_table[used], 0, pages)
        if owned:
            self._check_places(owned, page)

    def _check_places(self, owned: int, page: int) -> None:
        """Raises BadInput where a token isn't where its sequence has it: what attention reads was written.

        In NumPy, whose calls cost a third of PyTorch's on a few numbers: this runs in every decode step.
        """
        positions, cu_seqlens, seq_lens, block_table, slots = (
            tensor.numpy(force=True)
            for tensor in (
                self.positions[:owned],
                self.cu_seqlens,
                self.seq_lens,
                self.block_table,
                self.slot_mapping[:owned],
            )
        )
        ends = cu_seqlens[1:]
        sequence = np.repeat(np.arange(len(ends)), ends - cu_seqlens[:-1])
        if not np.array_equal(positions, np.arange(owned) + (seq_lens - ends)[sequence]):
            raise BadInput("batch.positions must be each sequence's last ones, to seq_lens - 1")
        kept = block_table[sequence, positions // page] * np.int64(page) + positions % page
        if ((slots != kept) & (slots >= 0)).any():
            raise BadInput("batch.slot_mapping gives a token another slot than its block table does")
        if owned > 1:
            slots = np.sort(slots)
            if ((slots[1:] == slots[:-1]) & (slots[1:] >= 0)).any():
                raise BadInput("batch.slot_mapping gives two tokens the same slot")

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order in which ``@step`` takes them."""
        return tuple(getattr(self, name) for name in _DTYPES)

    def adds_at_most(self, tokens: int) -> bool:
        """Whether the host knows, without waiting for a GPU, that no sequence has more new ones:
        from ``max_new``, from the batch's size, or from a batch on the CPU.
        """
        if self.max_new is not None:
            return self.max_new <= tokens
        if len(self.ids) <= tokens:
            return True
        return self.cu_seqlens.device.type == "cpu" and bool((self.cu_seqlens.diff() <= tokens).all())


def _within(field: str, values: torch.Tensor, least: int, end: int, message: str = "") -> None:
    """Raises BadInput unless all values are in [least, end)."""
    if not values.numel():
        return
    low, high = (int(v) for v in values.aminmax())
    if low < least or high >= end:
        bad = low if low < least else high
        raise BadInput((message or f"batch.{field} holds {{}}, not in {least}..{end - 1}").format(bad))


def describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def next_batch(sequences: Sequence[CachedSequence], new: Sequence[Sequence[int]]) -> Batch:
    """Appends ``new[b]`` to sequence b: reserves its pages and advances its length.

    Raises CacheFull; then no sequence is longer than before.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    bounds = [0]
    for sequence, tokens in zip(sequences, new, strict=True):
        sequence.reserve(len(tokens))  # all of them before any is lengthened
    for sequence, tokens in zip(sequences, new, strict=True):
        first = sequence.length
        sequence.length += len(tokens)
        ids += tokens
        positions += range(first, sequence.length)
        slots += sequence.slots(first, sequence.length)
        bounds.append(len(ids))
    width = max((len(s.pages) for s in sequences), default=0)
    return Batch(
        ids=torch.tensor(ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        seq_lens=torch.tensor([s.length for s in sequences], dtype=torch.int32),
        block_table=torch.tensor(
            [s.pages + [0] * (width - len(s.pages)) for s in sequences], dtype=torch.int32
        ).view(len(sequences), width),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        max_new=max(map(len, new), default=0),
    )
