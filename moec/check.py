"""A package against the reference interpreter, on the same tokens and the same weights.

The interpreter runs the package's naive IR (``ir/000_naive.moec``, before any pass) op by op; the package
runs what was generated from the optimised IR. In fewer bits than fp32 it runs the last dump too, and both get
the package's routing: see _Pair. Both prefill ragged prompts, go on with many tokens of one, a few of another
and one of the last in one batch, and then decode through the paged cache: by ``@decode`` where there is one,
and by ``@step``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moec import runtime
from moec.codegen.render import identifier
from moec.dumps import dumps
from moec.errors import BadOption
from moec.ir import Interpreter, Module, TensorType, read_module
from moec.ir.op import Op
from moec.ir.ops.control import Call
from moec.ir.types import CacheType
from moec.ir.weights import forms
from moec.passes.instruments import sqnr
from moec.routing import Injection
from moec.runtime.batch import Batch, next_batch
from moec.runtime.cache import CachedSequence
from moec.runtime.checkpoint import open_checkpoint
from moec.runtime.dtypes import DTYPES
from moec.trial import Tensors

# Largest error of any token that counts as equal, by the model's dtype. In fp32 package and naive IR differ
# by the order of sums alone. In 16 bits, with the same choices of experts, the worst token of tiny presets
# and two seeds was 6.1e-2 (bf16) and 1.1e-2 (f16). The median token's limit is tighter. SQNR against the
# naive IR, which rounds elsewhere, was at least 26 and 43 dB.
TOLERANCE = {"f32": 1e-4, "bf16": 8e-2, "f16": 2e-2}
MEDIAN = {"f32": 1e-4, "bf16": 4e-2, "f16": 1e-2}
SQNR = {"bf16": 20.0, "f16": 37.0}
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
    limits = (
        dtype if exact or dtype != "f32" else "bf16"
    )  # scaled values round as coarsely as 16 bits at least
    compare = _Comparison(TOLERANCE[limits] if tolerance is None else tolerance)
    if not exact:
        compare.median, compare.floor = MEDIAN[limits], None if scaled else SQNR[limits]
    if layer and not exact:
        compare = _Comparison(MEDIAN[limits] if tolerance is None else tolerance, "median")
    if isinstance(model, runtime.LayerModel):
        _verify_layer(model, read_module(files[0]), tensors, tokens or 24, seed, compare)
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
    pair = _Pair(
        model,
        read_module(files[0]),
        None if exact else last,
        tensors,
        len(new),
        sum(map(len, new)) + (after + page) * len(new),
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
    model: runtime.LayerModel, module: Module, tensors: Tensors, rows: int, seed: int, compare: _Comparison
) -> None:
    """Two steps of two sequences; a block that keeps no cache just takes two inputs."""
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
    values = (r.type for f in module for op in f.ops for r in op.results)
    return any(isinstance(t, TensorType) and bool(t.scale) for t in values)


class _Comparison:
    """Collects rows and token counts."""

    median = math.inf  # limit of the median token, beside that of the worst
    floor: float | None = None  # of the SQNR, in dB

    def __init__(self, limit: float, judged: str = "worst") -> None:
        if limit <= 0:
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
        if signal is not None and self.floor is not None:
            ok = ok and signal >= self.floor
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


class _Reference:
    """One module in the interpreter, with its own cache, keeping what each layer gives."""

    def __init__(
        self, module: Module, tensors: Tensors, wanted: dict[str, Any], layers: list[int], pages: int
    ) -> None:
        self.module, self.wanted = module, wanted
        self.injection = Injection(TOLERANCE["bf16"])
        self.layers: dict[str, torch.Tensor] = {}
        self.interpreter = Interpreter(module, tensors, self._observe, self.injection.alter)
        types = [a.type for a in module["step"].args if isinstance(a.type, CacheType)]
        self.state = [
            self.interpreter.new_cache(t, count, pages) for t, count in zip(types, layers, strict=True)
        ]

    def _observe(self, function: str, op: Op, scope: str, results: tuple[Any, ...]) -> None:
        """Keeps a layer's first output under its scope, when the op that makes it has run."""
        outputs = self.module[function].outputs
        if scope.removesuffix(".") in self.wanted and outputs and outputs[0] in op.results:
            self.layers[scope.removesuffix(".")] = results[[r is outputs[0] for r in op.results].index(True)]

    def step(self, batch: Batch, choices: Mapping[int, Any]) -> torch.Tensor:
        """Hidden states [N, H] of one step, routed as ``choices`` says, by layer."""
        self.injection.choices = choices
        hidden, *self.state = self.interpreter.run("step", *batch.tensors(), *self.state)
        return torch.as_tensor(hidden)

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        (logits,) = self.interpreter.run("head", rows)
        return torch.as_tensor(logits)


def _same_choices(a: dict[int, Any], b: dict[int, Any]) -> bool:
    """Whether two runs have chosen the same experts."""
    ids = ([torch.as_tensor(c[1]) for _, c in sorted(each.items())] for each in (a, b))
    return all(torch.equal(x, y) for x, y in zip(*ids, strict=True))


class _Pair:
    """The model and what it's compared with, stepping side by side, each with its own cache.

    In fp32 that is its naive IR. In fewer bits naive IR and package round at different places: element by
    element the package must be what its last dump is, and the naive IR gives the signal to noise. Then the
    references also route as the package does.
    """

    def __init__(
        self,
        model: runtime.LanguageModel,
        naive: Module,
        last: Module | None,
        tensors: Tensors,
        sequences: int,
        room: int,
    ) -> None:
        self.model = model
        self.cache = model.new_cache(room)
        self.sequences = [CachedSequence(self.cache) for _ in range(sequences)]
        self.got: dict[str, torch.Tensor] = {}
        layers = [max(s.layers) + 1 for s in model.cache_specs]
        self.naive = _Reference(naive, tensors, self.got, layers, self.cache.pages)
        self.judge = self.naive
        self.exact = last is None
        if last is not None:
            self.judge = _Reference(last, tensors, self.got, layers, self.cache.pages)
        self._record_layers()

    def _record_layers(self) -> None:
        """Wraps the generated layer functions, so that each one's result is kept under its scope."""
        code = self.model.package.module("model")
        self.model._code = code
        for op in self.naive.module["step"].ops:
            if not isinstance(op, Call):
                continue
            for name in map(identifier, forms(op.callee)):
                if hasattr(code, name) and not hasattr(getattr(code, name), "recorded"):
                    setattr(code, name, self._recorder(getattr(code, name), op.scope))

    def _recorder(self, function: Callable[..., Any], scope: str) -> Callable[..., Any]:
        def recorded(layer: int, *args: Any) -> Any:
            out = function(layer, *args)
            self.got[scope.replace("*", str(layer))] = out[0] if isinstance(out, tuple) else out
            return out

        recorded.recorded = True  # type: ignore[attr-defined]
        return recorded

    def _hidden(self, batch: Batch, entry: str) -> tuple[torch.Tensor, dict[int, Any]]:
        """The package's hidden states and, where they matter, its choices of experts."""
        if self.exact or not self.model.manifest["routed_layers"]:
            return self.model.hidden(batch, self.cache, entry), {}
        with self.model.record_routing() as trace:
            hidden = self.model.hidden(batch, self.cache, entry)
        return hidden, trace.choices(0)

    def step(self, label: str, new: list[list[int]], compare: _Comparison) -> list[list[int]]:
        """One step of all; the next tokens, greedily by the judge's logits.

        What ``@decode`` runs, ``@step`` runs too: it writes the same entries into the same slots.
        """
        batch = next_batch(self.sequences, new)
        entry = self.model.entry(batch)
        got, choices = self._hidden(batch, entry)
        hidden = {ref: ref.step(batch, choices) for ref in (self.naive, self.judge)}
        rows = batch.cu_seqlens[1:].long() - 1
        tokens = self._compare(label, hidden, rows, got, compare)
        if entry != "step":
            got, again = self._hidden(batch, "step")
            if _same_choices(choices, again):  # else the references went another way
                self._compare(f"{label} by @step", hidden, rows, got, compare)
        for ref in dict.fromkeys((self.naive, self.judge)):
            compare.count_choices(ref.injection)
        return [[int(t)] for t in tokens]

    def _compare(
        self,
        label: str,
        hidden: dict[Any, torch.Tensor],
        rows: torch.Tensor,
        got: torch.Tensor,
        to: _Comparison,
    ) -> torch.Tensor:
        """Layers, logits and next tokens of the package's run with the references'; the judge's tokens."""
        for scope, value in self.judge.layers.items():
            signal = sqnr(self.naive.layers[scope], self.got[scope]) if scope in self.naive.layers else None
            to.add(f"{label}: {scope}", value, self.got[scope], signal)
        expected_logits = self.judge.head(hidden[self.judge][rows])
        got_logits = self.model.head(got[rows])
        signal = sqnr(self.naive.head(hidden[self.naive][rows]), got_logits)
        to.add(f"{label}: logits", expected_logits, got_logits, signal)
        tokens = expected_logits.argmax(-1)
        to.count_tokens(tokens, got_logits.argmax(-1))
        return tokens
