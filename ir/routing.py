"""What a router is assumed to do: how many experts get rows, how many each, and what row tiles waste.

Costs hold ``active(E, k, T)``, the experts that have rows when each of T tokens chooses k of E. With numbers
in it that is a number: the one for a router that chooses at random, ``Uniform``. Where costs are evaluated
(``moec.ir.roofline``) another assumption may answer instead.

Tokens choose independently, so that an assumption is no more than the probability that a token chooses expert
i: its rows are Binomial(T, p_i). A recorded trace has its own counts instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sympy

from moec.errors import BadOption, nearest

Array = Any  # a numpy array of float64 or int64


class active(sympy.Function):
    """active(E, k, T): the experts that have rows, E·(1 - (1 - k/E)^T) of them on average."""

    nargs = 3

    @classmethod
    def eval(cls, experts: Any, k: Any, tokens: Any) -> Any:
        if experts.is_Number and k.is_Number and tokens.is_Number:
            return sympy.Float(random_choice(float(experts), float(k), float(tokens)))
        return None


def random_choice(experts: float, k: float, tokens: float) -> float:
    """E·(1 - (1 - k/E)^T). Exactly k for one token; E where each token takes all."""
    if k >= experts:
        return experts if tokens else 0.0
    return experts * -math.expm1(tokens * math.log1p(-k / experts))


@dataclass(frozen=True)
class Load:
    """One step's rows over E experts: what is expected of them.

    active   experts that have rows
    mean     rows of each of these, on average
    most     rows of the expert that has most
    tiles    row tiles of height ``tile``, each of one expert
    waste    the share of the tiles' rows that are no rows of anyone
    """

    experts: int
    k: int
    tokens: int
    active: float
    mean: float
    most: float
    tile: int
    tiles: float
    waste: float


class Routing:
    """An assumption about routers. ``str()`` is what ``parse_routing`` reads."""

    def load(self, experts: int, k: int, tokens: int, tile: int = 64) -> Load:
        """Raises BadOption where the assumption can't be made of such a router."""
        raise NotImplementedError

    def active(self, experts: int, k: int, tokens: float) -> float:
        return self.load(experts, k, math.ceil(tokens)).active


class Independent(Routing):
    """Tokens that choose independently, expert i with probability ``chosen(E, k)[i]``."""

    def chosen(self, experts: int, k: int) -> Array:
        """[E] probabilities, k in sum."""
        raise NotImplementedError

    def active(self, experts: int, k: int, tokens: float) -> float:
        p, times = np.unique(self.chosen(experts, k), return_counts=True)
        return float((times * -np.expm1(tokens * np.log1p(-np.minimum(p, 1 - 1e-16)))).sum())

    def load(self, experts: int, k: int, tokens: int, tile: int = 64) -> Load:
        p, times = np.unique(self.chosen(experts, k), return_counts=True)
        if tokens == 0:
            return Load(experts, k, 0, 0.0, 0.0, 0.0, tile, 0.0, 0.0)
        at_most = [binomial_cdf(tokens, each) for each in p]  # P(X <= x), x = 0, 1, ...
        tiles = float(sum(n * (1 - each[::tile]).sum() for n, each in zip(times, at_most, strict=True)))
        # The largest of E: as if they were independent, where in truth they add up to k·T.
        longest = max(map(len, at_most))
        padded = [np.pad(each, (0, longest - len(each)), constant_values=1) for each in at_most]
        most = float(-np.expm1(times @ np.log(np.maximum(padded, 1e-300))).sum())
        has_rows = self.active(experts, k, tokens)
        mean, waste = tokens * k / has_rows, 1 - tokens * k / (tiles * tile)
        return Load(experts, k, tokens, has_rows, mean, max(most, mean), tile, tiles, max(waste, 0.0))


class Uniform(Independent):
    """All experts alike."""

    def chosen(self, experts: int, k: int) -> Array:
        return np.full(experts, min(k / experts, 1.0))

    def active(self, experts: int, k: int, tokens: float) -> float:
        return random_choice(experts, k, tokens)

    def __str__(self) -> str:
        return "uniform"


@dataclass(frozen=True)
class Zipf(Independent):
    """Expert i of 1..E is preferred in proportion to i^-s; a token's k choices are drawn one after the other,
    in proportion to what is left: no expert twice.
    """

    s: float

    def chosen(self, experts: int, k: int) -> Array:
        return chosen_in_turn(tuple(np.arange(1, experts + 1, dtype=np.float64) ** -self.s), k)

    def __str__(self) -> str:
        return f"zipf:{self.s:g}"


# Of log t in the integral below: half of it changes no digit of the first ten.
LOG_STEP = 0.125


@cache
def chosen_in_turn(preferences: tuple[float, ...], k: int) -> Array:
    """[E] probabilities to be among k drawn without replacement, each draw in proportion to ``preferences``.

    Such a draw is the order in which independent Exp(p_i) clocks ring, so expert i is chosen where fewer than
    k others rang before it:  ∫ p_i·exp(-p_i·t) · P(fewer than k others by t) dt.  The others' count is a sum
    of independent ones, its probabilities a product of polynomials. Clocks may differ by many powers of ten,
    so the integral is over log t: smooth and vanishing at both ends, where equal steps are most exact.
    """
    p = np.asarray(preferences) / sum(preferences)
    count = len(p)
    if k >= count:
        return np.ones(count)
    # Before the first time no clock has rung but for 1e-14, after the last all have.
    u = np.arange(math.log(1e-14 / p.max()), math.log(40 / p.min()), LOG_STEP)
    t = np.exp(u)
    rang = -np.expm1(-np.outer(p, t))  # [E, times]

    def times_item(poly: Array, i: int) -> Array:  # [k, times]: the probabilities of 0..k-1 having rung
        shifted = np.vstack([np.zeros_like(t), poly[:-1]])
        return poly * (1 - rang[i]) + shifted * rang[i]

    one = np.vstack([np.ones_like(t), np.zeros((k - 1, len(t)))])
    before, after = [one], [one]
    for i in range(count):
        before.append(times_item(before[-1], i))
        after.append(times_item(after[-1], count - 1 - i))
    found = np.empty(count)
    for i in range(count):
        others_before, others_after = before[i], np.cumsum(after[count - 1 - i], axis=0)
        fewer = sum(others_before[a] * others_after[k - 1 - a] for a in range(k))
        found[i] = (p[i] * t * np.exp(-p[i] * t) * fewer).sum() * LOG_STEP  # dt = t·du
    return np.minimum(found, 1.0)


def binomial_cdf(n: int, p: float) -> Array:
    """P(X <= x) of Binomial(n, p), for x = 0, 1, ... until it is 1 but for 1e-15 or so."""
    if p >= 1:
        return np.concatenate([np.zeros(n), [1.0]])
    last = min(n, math.ceil(n * p + 12 * math.sqrt(n * p * (1 - p)) + 40))
    x = np.arange(last + 1, dtype=np.float64)
    steps = np.log((n - x[:-1]) / (x[:-1] + 1)) + math.log(p / (1 - p)) if p > 0 else np.full(last, -1e9)
    return np.minimum(np.cumsum(np.exp(n * math.log1p(-p) + np.concatenate([[0.0], np.cumsum(steps)]))), 1.0)


class Trace(Routing):
    """Recorded choices: runs of T tokens that follow each other in the trace, over all of its layers.

    ``ids`` [layers, tokens, k]; negative ones fill up where a layer chooses fewer. A trace of prompts holds
    runs of one text, not of a batch of texts: record what you want to know about.
    """

    def __init__(self, ids: Array, name: str = "trace") -> None:
        self.ids, self.name = ids, name

    @cached_property
    def _cache(self) -> dict[tuple[int, int, int, int], Load]:
        return {}

    def load(self, experts: int, k: int, tokens: int, tile: int = 64) -> Load:
        key = (experts, k, tokens, tile)
        if key not in self._cache:
            self._cache[key] = self._load(*key)
        return self._cache[key]

    def _load(self, experts: int, k: int, tokens: int, tile: int) -> Load:
        recorded = self.ids.shape[1]
        ids = [layer for layer in self.ids if ((layer >= 0).sum(1) == k).all()]
        if not ids:
            raise BadOption(f"{self.name}: no layer in it chooses {k} experts a token, as the model's does")
        if max(int(layer.max()) for layer in ids) >= experts:
            highest = max(int(layer.max()) for layer in ids)
            raise BadOption(f"{self.name}: chooses expert {highest}, but the model has {experts}")
        if tokens > recorded:
            raise BadOption(f"{self.name}: holds {recorded} tokens, fewer than a step's {tokens}")
        if tokens == 0:
            return Load(experts, k, 0, 0.0, 0.0, 0.0, tile, 0.0, 0.0)
        counts = []
        for layer in ids:
            for start in range(0, recorded - tokens + 1, tokens):
                chosen = layer[start : start + tokens].ravel()
                counts.append(np.bincount(chosen[chosen >= 0], minlength=experts))
        rows = np.array(counts)
        has_rows = float((rows > 0).sum(1).mean())
        tiles = float((-(-rows // tile)).sum(1).mean())
        waste = 1 - tokens * k / (tiles * tile)
        most = float(rows.max(1).mean())
        return Load(experts, k, tokens, has_rows, tokens * k / has_rows, most, tile, tiles, waste)

    def __str__(self) -> str:
        return self.name


def read_trace(path: Path | str) -> Array:
    """Ids [layers, tokens, k] of a trace. Raises BadOption for what isn't one.

    A trace is a .npy file, never pickled: integers [layers, tokens, k] or [tokens, k], or what
    ``moec run --record-routing`` writes, records [layers, tokens] with a field ``id`` of k integers.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = getattr(error, "strerror", None) or "it is no .npy file of numbers"
        raise BadOption(f"can't read the trace {path}: {why}") from None
    if not isinstance(found, np.ndarray):
        raise BadOption(f"can't read the trace {path}: it is an archive, not a .npy file")
    ids = found["id"] if "id" in (found.dtype.names or ()) else found
    if ids.dtype.kind not in "iu" or ids.ndim not in (2, 3) or 0 in ids.shape:
        raise BadOption(
            f"{path} is no trace: {found.dtype} {list(found.shape)} is neither integers [layers, tokens, k] "
            "nor records with a field id of these"
        )
    ids = ids.astype(np.int64).reshape((1, *ids.shape) if ids.ndim == 2 else ids.shape)
    ordered = np.sort(ids, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        layer, token, _ = np.argwhere(twice)[0]
        raise BadOption(f"{path} is no trace: token {token} of its layer {layer} chooses an expert twice")
    return ids


def parse_routing(text: str) -> Routing:
    """``uniform``, ``zipf:1.2`` or a trace's ``file.npy``. Raises BadOption."""
    kind, _, value = text.partition(":")
    if text == "uniform":
        return Uniform()
    if kind == "zipf":
        try:
            s = float(value)
        except ValueError:
            s = math.nan
        if not 0 <= s <= 10:
            raise BadOption(f"routing {text!r}: zipf takes an exponent from 0 to 10, as zipf:1.2")
        return Zipf(s)
    if text.endswith(".npy"):
        return Trace(read_trace(text), Path(text).name)
    hint = nearest(kind, ["uniform", "zipf"])
    raise BadOption(f"no routing is called {text!r}; there is uniform, zipf:S and FILE.npy{hint}")
