"""Generation: all prompts in one ragged prefill, then one step a token for those that go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moec.errors import BadInput
from moec.runtime.batch import describe, next_batch
from moec.runtime.cache import CachedSequence, KVCache
from moec.runtime.sampling import Sampling
from moec.runtime.values import whole, wholes

if TYPE_CHECKING:
    from moec.runtime.model import LanguageModel


@dataclass(frozen=True)
class Prompts:
    """Checked prompts as lists of ids; ``rectangular`` where they came as one tensor [B, T]."""

    ids: list[list[int]]
    rectangular: bool

    @staticmethod
    def of(given: Any, vocab: int, max_positions: int, new_tokens: int) -> Prompts:
        """Raises BadInput: no prompts, an empty one, ids outside the vocabulary, too many positions."""
        if hasattr(given, "__array_interface__"):  # NumPy's
            given = _tensor(given)
        rectangular = isinstance(given, torch.Tensor)
        if isinstance(given, torch.Tensor):
            if given.dim() != 2 or given.dtype not in (torch.int64, torch.int32):
                raise BadInput(f"input_ids must be int64 [B, T], not {describe(given)}")
            rows = given.tolist()
        elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
            rows = [_row(number, prompt) for number, prompt in enumerate(given)]
        else:
            raise BadInput(
                f"input_ids must be a tensor [B, T] or a list of prompts, not {type(given).__name__}"
            )
        if not rows:
            raise BadInput("there is no prompt")
        for number, row in enumerate(rows):
            _check(number, row, vocab, max_positions, new_tokens)
        return Prompts(rows, rectangular)


def _row(number: int, prompt: Any) -> list[int]:
    if isinstance(prompt, torch.Tensor):
        if prompt.dim() != 1 or prompt.dtype not in (torch.int64, torch.int32):
            raise BadInput(f"prompt {number} must be int64 [T], not {describe(prompt)}")
        return [int(i) for i in prompt.tolist()]
    if hasattr(prompt, "__array_interface__"):
        return _row(number, _tensor(prompt))
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes):
        raise BadInput(f"prompt {number} must be a 1-D tensor or a list of ids")
    return [whole(f"a token id of prompt {number}", i) for i in prompt]


def _tensor(array: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(array)
    except TypeError:
        raise BadInput(f"input_ids holds an array of {array.dtype}, not of token ids") from None


def _check(number: int, row: list[int], vocab: int, max_positions: int, new_tokens: int) -> None:
    if not row:
        raise BadInput(f"prompt {number} is empty: a model needs at least one token to go on from")
    for place, token in enumerate(row):
        if not 0 <= token < vocab:
            raise BadInput(
                f"token id {token} at place {place} of prompt {number} is outside the vocabulary of {vocab}"
            )
    if len(row) + new_tokens > max_positions:
        raise BadInput(
            f"prompt {number} has {len(row)} tokens; with {new_tokens} new ones that is more than the "
            f"{max_positions} positions of the model"
        )


class Generation:
    """One call of ``generate``: iterating it runs the steps and yields each step's tokens, one a prompt."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Prompts,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        eos: Any,
        cache: KVCache,
    ) -> None:
        self.model, self.prompts, self.sampling = model, prompts, sampling
        self.max_new_tokens = max_new_tokens
        self.eos = set(wholes("eos_token_id", eos))
        self.new: list[list[int]] = [[] for _ in prompts.ids]
        self.cache = cache
        self.sequences = [CachedSequence(cache) for _ in prompts.ids]
        seed = whole("seed", seed)
        self.generators = [_generator(seed, number) for number in range(len(prompts.ids))]

    def __iter__(self) -> Iterator[list[int | None]]:
        going = list(range(len(self.prompts.ids)))
        tokens = self.prompts.ids
        for _ in range(self.max_new_tokens):
            batch = next_batch([self.sequences[i] for i in going], tokens)
            logits = self.model.step(batch, self.cache).cpu()
            picked: list[int | None] = [None] * len(self.prompts.ids)
            for i, row in zip(going, logits, strict=True):
                token = self.sampling.pick(row, self.generators[i])
                self.new[i].append(token)
                picked[i] = token
            yield picked
            for i in going:
                if self.new[i][-1] in self.eos:
                    self.sequences[i].release()
            going = [i for i in going if self.new[i][-1] not in self.eos]
            if not going:
                return
            tokens = [[self.new[i][-1]] for i in going]

    def result(self) -> torch.Tensor | list[torch.Tensor]:
        """Prompts and their continuations, in the form that the prompts came in."""
        if not self.prompts.rectangular:
            return [torch.tensor(p + n) for p, n in zip(self.prompts.ids, self.new, strict=True)]
        longest = max(len(n) for n in self.new)
        rows = [p + n + n[-1:] * (longest - len(n)) for p, n in zip(self.prompts.ids, self.new, strict=True)]
        return torch.tensor(rows)


def _generator(seed: int, number: int) -> torch.Generator:
    """What is drawn for prompt ``number`` depends on nothing else in the batch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
