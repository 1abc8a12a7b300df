"""From logits to the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moec.errors import BadInput
from moec.runtime.values import number, whole


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token. BadInput for values out of range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", number("temperature", self.temperature))
        object.__setattr__(self, "top_k", whole("top_k", self.top_k))
        object.__setattr__(self, "top_p", number("top_p", self.top_p))
        if not 0.0 <= self.temperature < float("inf"):
            raise BadInput(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise BadInput(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise BadInput(f"top_p is {self.top_p}; it must be in (0, 1]")

    def pick(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """The next token of one sequence: logits [vocab] of any float dtype, -inf for one that can't come.

        Raises BadInput where the best logit is NaN or infinite: nothing can be chosen by it.
        """
        best = float(logits.max())
        if not math.isfinite(best):
            raise BadInput(
                f"the best logit is {best}: the weights, or the activations they make, aren't finite"
            )
        if self.temperature == 0.0:
            return int(logits.argmax())
        probabilities = self.probabilities(logits)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What ``pick`` draws from: [vocab] fp32, the dropped tokens at 0.

        top_k keeps the k best, top_p then the smallest set of best tokens whose probabilities reach p
        (Holtzman et al. 2020); the first token is always kept.
        """
        scores, order = logits.float().sort(descending=True, stable=True)
        if self.top_k:
            scores = scores[: self.top_k]
        # The best score is 0 before the division: a temperature near 0 can't overflow it.
        kept = ((scores.double() - scores[0]) / self.temperature).softmax(-1)
        if self.top_p < 1.0:
            before = kept.cumsum(-1) - kept
            kept = torch.where(before < self.top_p, kept, 0.0)
            kept = kept / kept.sum()
        out = torch.zeros(logits.shape[-1], dtype=torch.float32)
        out[order[: kept.shape[0]]] = kept.float()
        return out
