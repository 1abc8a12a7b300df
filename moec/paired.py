"""A package and its references in the interpreter, stepping side by side on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from moec import runtime
from moec.codegen.render import identifier
from moec.ir import Interpreter, Module
from moec.ir.op import Op, OpResult
from moec.ir.ops.control import Call
from moec.ir.types import CacheType
from moec.ir.weights import forms
from moec.passes.instruments import sqnr
from moec.routing import Injection, layer_of
from moec.runtime.batch import Batch, next_batch
from moec.runtime.cache import CachedSequence
from moec.trial import Tensors

if TYPE_CHECKING:
    from moec.check import Comparison


class Reference:
    """One module in the interpreter, with its own cache, keeping what each layer gives."""

    def __init__(
        self,
        module: Module,
        tensors: Tensors,
        wanted: dict[str, Any],
        layers: list[int],
        pages: int,
        router: float = 0.0,
        forced: bool = False,
    ) -> None:
        self.module, self.wanted = module, wanted
        self.forced = forced
        self.injection = Injection(router)
        self.layers: dict[str, torch.Tensor] = {}
        # Each function's first output: the op that makes it, and which of its results it is.
        self._ends = {out.op: out.index for f in module for out in f.outputs[:1] if isinstance(out, OpResult)}
        self.interpreter = Interpreter(module, tensors, alter=self._alter)
        types = [a.type for a in module["step"].args if isinstance(a.type, CacheType)]
        self.state = [
            self.interpreter.new_cache(t, count, pages) for t, count in zip(types, layers, strict=True)
        ]

    def _alter(self, op: Op, scope: str, operands: list[Any], results: tuple[Any, ...]) -> tuple[Any, ...]:
        """Other experts, where the package chose others. Keeps a layer's first output under its scope, and
        where it is ``forced`` goes on with the package's."""
        results = self.injection.alter(op, scope, operands, results)
        name, end = scope.removesuffix("."), self._ends.get(op)
        if end is None or name not in self.wanted:
            return results
        self.layers[name] = results[end]
        if not self.forced or self.wanted[name].shape != results[end].shape:
            return results
        return (*results[:end], self.wanted[name].to(results[end]), *results[end + 1 :])

    def step(self, batch: Batch, choices: Mapping[int, Any]) -> torch.Tensor:
        """Hidden states [N, H] of one step, routed as ``choices`` says, by layer."""
        self.injection.choices = choices
        hidden, *self.state = self.interpreter.run("step", *batch.tensors(), *self.state)
        return torch.as_tensor(hidden)

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        (logits,) = self.interpreter.run("head", rows)
        return torch.as_tensor(logits)


class Pair:
    """The model and what it's compared with, stepping side by side, each with its own cache.

    In fp32 that is its naive IR. In fewer bits naive IR and package round at different places: element by
    element the package must be what its last dump is, and the naive IR gives the signal to noise. Then the
    references also route as the package does, and each layer of the last dump starts from what the package's
    layers before it gave: a sum in another order that turns one rounding to e4m3 would else turn ever more of
    them from layer to layer. ``router``: how far logits may be from those that the package's router saw,
    relative to the token's largest.
    """

    def __init__(
        self,
        model: runtime.LanguageModel,
        naive: Module,
        last: Module | None,
        tensors: Tensors,
        sequences: int,
        room: int,
        router: float,
    ) -> None:
        self.model = model
        self.cache = model.new_cache(room)
        self.sequences = [CachedSequence(self.cache) for _ in range(sequences)]
        self.got: dict[str, torch.Tensor] = {}
        layers = [max(s.layers) + 1 for s in model.cache_specs]
        self.naive = Reference(naive, tensors, self.got, layers, self.cache.pages, router)
        self.judge = self.naive
        self.exact = last is None
        if last is not None:
            self.judge = Reference(last, tensors, self.got, layers, self.cache.pages, router, forced=True)
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
        self.got.clear()  # each entry has to give each layer
        if self.exact or not self.model.manifest["routed_layers"]:
            return self.model.hidden(batch, self.cache, entry), {}
        with self.model.record_routing() as trace:
            hidden = self.model.hidden(batch, self.cache, entry)
        return hidden, trace.choices(0)

    def step(self, label: str, new: list[list[int]], compare: Comparison) -> list[list[int]]:
        """One step of all; the next tokens, greedily by the judge's logits.

        What ``@decode`` runs, ``@step`` runs too: it writes the same entries into the same slots.
        """
        batch = next_batch(self.sequences, new)
        entry = self.model.entry(batch)
        got, choices = self._hidden(batch, entry)
        hidden = self._references(batch, choices)
        rows = batch.cu_seqlens[1:].long() - 1
        tokens = self._compare(label, hidden, rows, got, compare)
        if entry != "step":
            got, again = self._hidden(batch, "step")
            if not self.exact:
                hidden = self._references(batch, again)
            self._compare(f"{label} by @step", hidden, rows, got, compare)
        for ref in dict.fromkeys((self.naive, self.judge)):
            compare.count_choices(ref.injection)
        return [[int(t)] for t in tokens]

    def _references(self, batch: Batch, choices: Mapping[int, Any]) -> dict[Reference, torch.Tensor]:
        """Hidden states of the same step; the naive router is asked about the judge's logits."""
        hidden = {self.judge: self.judge.step(batch, choices)}
        if self.judge is not self.naive:
            self.naive.injection.known = self.judge.injection.logits
            hidden[self.naive] = self.naive.step(batch, choices)
        return hidden

    def _compare(
        self,
        label: str,
        hidden: dict[Any, torch.Tensor],
        rows: torch.Tensor,
        got: torch.Tensor,
        to: Comparison,
    ) -> torch.Tensor:
        """Layers, logits and next tokens of the package's run with the references'; the judge's tokens."""
        for scope, value in self.judge.layers.items():
            signal = self._signal(scope) if scope in self.naive.layers else None
            to.add(f"{label}: {scope}", value, self.got[scope], signal)
        expected_logits = self.judge.head(hidden[self.judge][rows])
        got_logits = self.model.head(got[rows])
        signal = sqnr(self.naive.head(hidden[self.naive][rows]), got_logits)
        to.add(f"{label}: logits", expected_logits, got_logits, signal)
        tokens = expected_logits.argmax(-1)
        to.count_tokens(tokens, got_logits.argmax(-1))
        return tokens

    def _signal(self, scope: str) -> float:
        """SQNR of a layer in dB against the naive IR, or that of its router's logits where it is lower."""
        signal = sqnr(self.naive.layers[scope], self.got[scope])
        layer = layer_of(f"{scope}.")
        naive, known = self.naive.injection.logits, self.naive.injection.known
        return min(signal, sqnr(naive[layer], known[layer])) if layer in known else signal
