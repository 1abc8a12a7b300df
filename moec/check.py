"""A package against the reference interpreter, on the same tokens and the same weights.

The interpreter runs the package's naive IR (``ir/000_naive.moec``, before any pass) op by op; the package
runs what was generated from the optimised IR. In fewer bits than fp32 it runs the last dump too, and both get
the package's routing: see Pair. Both prefill ragged prompts, go on with many tokens of one, a few of another
and one of the last in one batch, and then decode through the paged cache: by ``@decode`` where there is one,
and by ``@step``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moec import runtime
from moec.dumps import dumps
from moec.errors import BadOption
from moec.ir import Interpreter, Module, TensorType, read_module
from moec.ir.types import CacheType
from moec.paired import Pair
from moec.routing import Injection
from moec.runtime.batch import next_batch
from moec.runtime.cache import CachedSequence
from moec.runtime.checkpoint import open_checkpoint
from moec.runtime.dtypes import DTYPES
from moec.trial import Tensors

# Largest error of any token that counts as equal, by the dtype; then that of the median token. Measured
# on all tiny presets, four seeds, each layer given the package's input and its choices of experts:
#   f32            package and naive IR differ by the order of sums alone
#   bf16, f16      worst token 2.0e-2 and 2.5e-3, median 1.3e-2 and 1.3e-3
#   f32 in fp8     worst token 4.5e-2: another order of sums takes a value over a rounding boundary of e4m3, a
#                  whole step away. The median token met none: 5e-7
#   bf16, f16 ..   the same, more often: worst token 9.9e-2 and 7.0e-2, median of three tokens 4.6e-2, 3.4e-2
TOLERANCE = {
    "f32": 1e-4, "bf16": 4e-2, "f16": 5e-3, "f32 in fp8": 1e-1, "bf16 in fp8": 2e-1, "f16 in fp8": 1.5e-1,
}  # fmt: skip
MEDIAN = {
    "f32": 1e-4, "bf16": 3e-2, "f16": 3e-3, "f32 in fp8": 1e-3, "bf16 in fp8": 8e-2, "f16 in fp8": 6e-2,
}  # fmt: skip
# The same of a router's logits, where these decide whether rounding explains a choice: at least that of all
# tokens in bf16, since every token is asked.
ROUTER = 8e-2
# Least SQNR in dB against the naive IR, which rounds elsewhere or not at all; then of values of fewer than
# MANY tokens, where one that is off counts for much. Measured, the least of all: 26, 44, in fp8 10.5 and 5.6.
SQNR = {
    "bf16": (20.0, 20.0), "f16": (37.0, 37.0),
    "f32 in fp8": (8.0, 3.0), "bf16 in fp8": (8.0, 3.0), "f16 in fp8": (8.0, 3.0),
}  # fmt: skip
MANY = 16
# Tokens that the mixed batch adds to the next ones of the first prompt and of the second: a chunk over a
# cached prefix, long enough for attention to expand the latents of small models, and a shorter one.
CHUNK, FEW = 40, 2


@dataclass(frozen=True)
class Row:
    """Errors of one value, relative to its largest magnitude; each token counts by its worst element."""

    value: str
    shape: tuple[int, ...]
    worst: float
    median: float
    ok: bool
    nan: bool = False  # the reference itself isn't a number somewhere: there is nothing to agree with
    sqnr: float | None = None  # in dB against the naive IR, where that is not what ``worst`` is taken against


@dataclass(frozen=True)
class Verdict:
    rows: list[Row]
    tolerance: float
    judged: str  # "worst" or "median"
    same_tokens: int
    tokens: int
    exact: bool = True  # fp32: then each greedy token must be the same
    flipped: int = 0  # of ``routed`` choices of experts for a token, those that rounding decided otherwise
    routed: int = 0
    wrong: int = 0  # choices that no rounding explains

    @property
    def ok(self) -> bool:
        """Something was compared, each value is within its limit, no choice of experts is wrong and, in fp32,
        each token the same."""
        tokens = not self.exact or self.same_tokens == self.tokens
        return bool(self.rows) and all(r.ok for r in self.rows) and tokens and not self.wrong


def verify_package(
    package: Path,
    weights: Any,
    *,
    tokens: int | None = None,
    decode: int | None = None,
    seed: int = 0,
    prompts: Iterable[list[int]] | None = None,
    tolerance: float | None = None,
    allow_edited: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Compares the package with the interpreter of its naive IR.

    Random prompts of ``tokens`` tokens (by default a page of the cache and a few more), a third of that, and
    one token (or ``prompts``); a mixed batch; then ``decode`` greedy steps (by default 4). What isn't given
    shrinks to what the model has room for. ``allow_edited`` takes files that aren't those that were built.
    Raises BadOption and the errors of ``moec.load``.
    """
    for name, value, least in (("tokens", tokens, 1), ("decode", decode, 0), ("seed", seed, 0)):
        if value is not None and value < least:
            raise BadOption(f"{name} is {value}; it must be at least {least}")
    model = runtime.load(package, weights, verify=not allow_edited)
    files = dumps(package)
    tensors = Tensors(open_checkpoint(weights, model.manifest["checkpoint"]))
    dtype = model.manifest["dtype"]
    layer, last = isinstance(model, runtime.LayerModel), read_module(files[-1])
    scaled = has_scales(last)
    exact = dtype == "f32" and not scaled
    limits = f"{dtype} in fp8" if scaled else dtype
    compare = Comparison(TOLERANCE[limits] if tolerance is None else tolerance)
    if not exact:
        compare.median, compare.floors = MEDIAN[limits], SQNR[limits]
    if layer and not exact:
        compare = Comparison(MEDIAN[limits] if tolerance is None else tolerance, "median")
    if isinstance(model, runtime.LayerModel):
        module = last if scaled else read_module(files[0])
        _verify_layer(model, module, tensors, tokens or 24, seed, compare)
        return compare.verdict(exact)
    generator = torch.Generator().manual_seed(seed)
    page = model.cache_specs[0].page if model.cache_specs else 1
    room = model.max_positions
    given = None if prompts is None else [list(p) for p in prompts]
    least = max(map(len, given)) if given else tokens or 1
    if decode is None:
        decode = max(0, min(4, (room - least - 1) // 2))
    chunk = max(0, min(CHUNK, room - least - 1 - decode))
    after = decode + 1 + chunk  # tokens of the longest prompt's sequence beyond the prompt
    if given is None:
        tokens = tokens or max(1, min(page + 8, room - after))
        lengths = (tokens, max(1, tokens // 3), 1)
        given = [torch.randint(model.vocab, (n,), generator=generator).tolist() for n in lengths]
    new = given
    longest = max(map(len, new))
    if longest + after > room:
        raise BadOption(
            f"a prompt of {longest} tokens and {after} more don't fit the model's {room} positions"
        )
    pair = Pair(
        model,
        read_module(files[0]),
        None if exact else last,
        tensors,
        len(new),
        sum(map(len, new)) + (after + page) * len(new),
        max(ROUTER, TOLERANCE[limits]),
    )
    say(f"prefill of {sum(map(len, new))} tokens")
    new = pair.step("prefill", new, compare)
    say("a mixed batch")
    for row, tokens in zip(new, (chunk, min(FEW, chunk)), strict=False):
        row += torch.randint(model.vocab, (tokens,), generator=generator).tolist()
    new = pair.step("mixed", new, compare)
    for number in range(1, decode + 1):
        say(f"decode step {number} of {decode}")
        new = pair.step(f"decode {number}", new, compare)
    return compare.verdict(exact)


def _verify_layer(
    model: runtime.LayerModel, module: Module, tensors: Tensors, rows: int, seed: int, compare: Comparison
) -> None:
    """Two steps of two sequences; a block that keeps no cache just takes two inputs. In fp8 ``module`` is the
    last dump, which rounds as the package does."""
    args = module["forward"].args
    generator = torch.Generator().manual_seed(seed)
    interpreter = Interpreter(module, tensors)
    cache = model.new_cache(2 * (2 * rows + model.page))
    sequences = [CachedSequence(cache), CachedSequence(cache)]
    state = {
        arg.name: interpreter.new_cache(arg.type, max(spec.layers) + 1, cache.pages)
        for arg in args
        if isinstance(arg.type, CacheType)
        for spec in model.cache_specs
        if spec.name == arg.name
    }
    for label, counts in (("first step", (rows - rows // 2, rows // 2)), ("second step", (1, rows))):
        batch = next_batch(sequences, [[0] * n for n in counts])
        x = torch.randn(len(batch.ids), model.manifest["hidden"], generator=generator)
        x = x.to(DTYPES[model.manifest["dtype"]])
        context = [state[a.name] if a.name in state else getattr(batch, a.name) for a in args[1:]]
        expected, *after = interpreter.run("forward", x, *context)
        state = dict(zip(state, after, strict=True))
        compare.add(f"{label}: y", expected, model.forward(x, batch, cache))


def has_scales(module: Module) -> bool:
    """Whether a value of it, or a cache, holds 8-bit numbers with scales."""
    caches = (a.type for f in module for a in f.args)
    values = (r.type for f in module for op in f.ops for r in op.results)
    return any(isinstance(t, CacheType) and t.quantised for t in caches) or any(
        isinstance(t, TensorType) and bool(t.scale) for t in values
    )


class Comparison:
    """Collects rows and token counts."""

    median = math.inf  # limit of the median token, beside that of the worst
    floors: tuple[float, float] | None = None  # of the SQNR, in dB: of many tokens and of few

    def __init__(self, limit: float, judged: str = "worst") -> None:
        if not limit > 0:
            raise BadOption(f"tolerance is {limit}; it must be above 0")
        self.limit, self.judged = limit, judged
        self.rows: list[Row] = []
        self.same = self.tokens = self.flipped = self.routed = self.wrong = 0

    def add(self, value: str, expected: torch.Tensor, got: torch.Tensor, signal: float | None = None) -> None:
        """``signal`` is the SQNR against the naive IR, in dB."""
        error = token_errors(expected, got)
        worst = float(error.max()) if error.numel() else 0.0
        median = float(error.median()) if error.numel() else 0.0
        nan = bool(expected.isnan().any())
        ok = not nan and (worst if self.judged == "worst" else median) <= self.limit and median <= self.median
        if signal is not None and self.floors is not None:
            ok = ok and signal >= self.floors[len(error) < MANY]
        self.rows.append(Row(value, tuple(expected.shape), worst, median, ok, nan, signal))

    def count_tokens(self, expected: torch.Tensor, got: torch.Tensor) -> None:
        self.tokens += expected.numel()
        self.same += int((expected == got).sum())

    def count_choices(self, injection: Injection) -> None:
        self.flipped += injection.flipped
        self.routed += injection.tokens
        self.wrong += injection.wrong
        injection.flipped = injection.tokens = injection.wrong = 0

    def verdict(self, exact: bool = True) -> Verdict:
        return Verdict(
            self.rows,
            self.limit,
            self.judged,
            self.same,
            self.tokens,
            exact,
            self.flipped,
            self.routed,
            self.wrong,
        )


def token_errors(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """[rows]: each row's largest difference over the largest magnitude of all; infinite where one is NaN."""
    a, b = expected.double().flatten(1), got.double().flatten(1)
    if a.shape != b.shape:
        return torch.full((max(a.shape[0], 1),), torch.inf)
    if not a.numel():
        return torch.zeros(0)
    scale = a[a.isfinite()].abs().max() if a.isfinite().any() else torch.tensor(1.0)
    difference = (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return difference.amax(1) / scale.clamp(min=1e-30)
