"""What can watch a pipeline: IR dumps, an event log, and the interpreter as an oracle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moec.errors import BadOption, OutputUnwritable, ToleranceExceeded
from moec.ir import CacheType, Interpreter, Module, Op, TensorType, print_module
from moec.ir.cached import PagedCache
from moec.ir.interp import Alter
from moec.ir.scaled import Scaled
from moec.ir.text import split_top
from moec.ir.types import Type
from moec.passes.firings import Delta, Prices, Recorder
from moec.passes.manager import Instrument, PassRun


class Dump(Instrument):
    """Writes the IR before the first pass and after each that changed something into a folder.

    ``NNN_pass.moec`` has the pass's number in the whole pipeline, counted from 1; what no pass has touched
    is ``000_naive.moec``. ``first`` is another name for the module as it comes.
    """

    history = True

    def __init__(self, folder: Path | str, first: str = "") -> None:
        self.folder, self.first = Path(folder), first
        self.files: list[Path] = []
        self._numbers: list[int] = []
        self._before = 0  # passes that had run before the first of these

    def start(self, module: Module) -> None:
        self.files, self._numbers = [], []
        ran = split_top(module.ran)
        self._before = len(ran)
        name = self.first or (ran[-1].partition("{")[0] if ran else "naive")
        self._write(0, name, module)

    def after(self, run: PassRun, module: Module) -> None:
        if run.changed:
            self._write(run.number, run.ran.name, module)

    def replay(self, run: PassRun) -> str:
        earlier = [f for f, n in zip(self.files, self._numbers, strict=True) if n < run.number]
        if not earlier:
            return ""
        option = str(run.ran)
        quoted = f"'{option}'" if "{" in option else option
        return f"moec opt {earlier[-1]} -p {quoted}"

    def _write(self, number: int, name: str, module: Module) -> None:
        path = self.folder / f"{self._before + number:03d}_{name}.moec"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(print_module(module), encoding="utf-8")
        except OSError as error:
            raise OutputUnwritable(f"can't write the IR: {error}") from None
        self.files.append(path)
        self._numbers.append(number)


class Events(Instrument):
    """Rows of what happened, in order: one for each rule that fired, then one for its pass.

    A firing (``"event": "fired"``): rule, pass, function and how often that runs, the model's line, names of
    the values matched, read and made, and the difference in ops, launches, bytes, FLOPs and roofline µs of
    one run, at ``sizes`` of the symbols (by default the module's bounds) on the module's target.

    A pass (``"event": "pass"``): time, ops before and after, rules that fired, rules that didn't and why.
    """

    def __init__(self, path: Path | str | None = None, sizes: Mapping[str, int] | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.sizes = sizes
        self.rows: list[dict[str, Any]] = []
        self._before = 0

    def start(self, module: Module) -> None:
        self.rows = []
        self._before = len(split_top(module.ran))
        self._prices = Prices(module, self.sizes)

    def recorder(self, module: Module) -> Recorder:
        return Recorder(module, self._prices)

    def after(self, run: PassRun, module: Module) -> None:
        number, name = self._before + run.number, str(run.ran)
        for firing in run.firings:
            self.rows.append({"event": "fired", "number": number, "pass": name} | firing.as_dict())
        self.rows.append(
            {
                "event": "pass",
                "number": number,
                "pass": name,
                "changed": run.changed,
                "seconds": round(run.seconds, 6),
                "ops_before": run.ops_before,
                "ops_after": run.ops_after,
                "delta": sum((f.delta.times(f.runs) for f in run.firings), Delta()).as_dict(),
                "sizes": self._prices.sizes,
                "fired": run.fired,
                "misses": run.misses,
            }
        )

    def finish(self, module: Module) -> None:
        """Writes the rows, one JSON object a line, where a path was given."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        except OSError as error:
            raise OutputUnwritable(f"can't write the events: {error}") from None


class Oracle(Instrument):
    """Interprets the module before and after each pass on the same inputs and compares.

    ``inputs`` maps an entry function to its arguments (for one that takes none: ``()``). ``rows`` gets, for
    each pass:

        outputs   {"step.0": error}: each output of each entry; @decode gets @step's inputs and is held to it
        sqnr      the lowest of an output, in dB
        values    {"step:%h": error, "layer.moe@model.layers.3.:%xe": ...}: every value that both have by
                  that name and type. A pass may give an old name to another value: an error here is a hint.

    An error is the largest difference over the largest magnitude before; infinite where only one has a NaN.
    With a ``tolerance``, a pass whose outputs differ by more is an error."""

    def __init__(
        self,
        inputs: Mapping[str, Sequence[Any]],
        weights: Mapping[str, torch.Tensor],
        tolerance: float | None = None,
    ) -> None:
        self.inputs, self.weights, self.tolerance = inputs, weights, tolerance
        self.rows: list[dict[str, Any]] = []
        self._outputs: dict[str, Any] = {}
        self._values: dict[str, Any] = {}

    def start(self, module: Module) -> None:
        if self.tolerance is not None and not self.tolerance >= 0:
            raise BadOption(f"tolerance is {self.tolerance}; it must be 0 or more")
        self.rows = []
        self._outputs, self._values = self._interpret(module)

    def after(self, run: PassRun, module: Module) -> None:
        outputs, values = self._interpret(module)
        known = {k.replace("step.", "decode."): v for k, v in self._outputs.items()} | self._outputs
        errors = {k: relative_error(known[k], v) for k, v in outputs.items()}
        row = {
            "pass": str(run.ran),
            "outputs": errors,
            "sqnr": min((sqnr(known[k], v) for k, v in outputs.items()), default=math.inf),
            "values": {
                k: relative_error(self._values[k][1], v)
                for k, (type, v) in values.items()
                if k in self._values and self._values[k][0] == type
            },
        }
        self.rows.append(row)
        self._outputs, self._values = outputs, values
        error, worst = max(((e, k) for k, e in errors.items()), default=(0.0, ""))
        if self.tolerance is not None and error > self.tolerance:
            raise ToleranceExceeded(
                f"{run.ran.name} changed {worst} by {error:.2e}, more than {self.tolerance:.2e}"
            )

    def _interpret(self, module: Module) -> tuple[dict[str, Any], dict[str, Any]]:
        return interpret(module, self.inputs, self.weights)


def interpret(
    module: Module,
    inputs: Mapping[str, Sequence[Any]],
    weights: Mapping[str, torch.Tensor],
    alter: Alter | None = None,
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """``{"step.0": value}`` of outputs, ``{"layer.moe@model.layers.3.:%h": (type, value)}`` of all ops."""
    values: dict[str, Any] = {}

    def observe(function: str, op: Op, scope: str, results: tuple[Any, ...]) -> None:
        where = f"{function}@{scope}" if scope else function
        for res, got in zip(op.results, results, strict=True):
            if isinstance(res.type, TensorType):
                values[f"{where}:{res.text}"] = (res.type, got)

    interpreter = Interpreter(module, weights, observe, alter)
    outputs = {}
    if "decode" in module and "step" in inputs:
        inputs = {"decode": inputs["step"], **inputs}
    for function, given in inputs.items():
        args = [_stored(a, arg.type) for a, arg in zip(given, module[function].args, strict=True)]
        for number, got in enumerate(interpreter.run(function, *args)):
            outputs[f"{function}.{number}"] = got
    return outputs, values


def _stored(value: Any, type: Type) -> Any:
    """A cache as this module keeps it; anything else as it is."""
    if not isinstance(type, CacheType) or value.type == type:
        return value
    given = value.type is not None and value.type.quantised
    return value.stored_as(type) if given or type.quantised else value


def relative_error(before: Any, after: Any) -> float:
    """max |after - before| / max |before|; infinite where shapes or NaNs differ."""
    if isinstance(before, PagedCache):
        return max((relative_error(before.meant(n), after.meant(n)) for n in before.layers), default=0.0)
    if isinstance(before, Scaled) and isinstance(after, Scaled):
        before, after = before.float(), after.float()
    if before.shape != after.shape:
        return float("inf")
    a, b = before.double().flatten(), after.double().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    a, b = a[~same], b[~same]
    if not bool((a.isfinite() & b.isfinite()).all()):
        return float("inf")
    finite = before.double().flatten()
    scale = float(finite[finite.isfinite()].abs().max())
    return float((b - a).abs().max()) / max(scale, 1e-30)


def sqnr(before: Any, after: Any) -> float:
    """Signal to quantisation noise in dB: 10 · log10(Σ before² / Σ (after - before)²), over all elements.

    Infinite where nothing differs (two NaNs, or two equal infinities, do not), minus infinite where shapes
    do or only one element is no finite number. Of a cache, the lowest of its layers."""
    if isinstance(before, PagedCache):
        return min((sqnr(before.meant(n), after.meant(n)) for n in before.layers), default=math.inf)
    if isinstance(before, Scaled) and isinstance(after, Scaled):
        before, after = before.float(), after.float()
    if before.shape != after.shape:
        return -math.inf
    a, b = before.double().flatten(), after.double().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return math.inf
    if not bool((a[~same].isfinite() & b[~same].isfinite()).all()):
        return -math.inf
    noise = float(((a - b)[~same] ** 2).sum())
    signal = float((a[a.isfinite()] ** 2).sum())
    return 10 * math.log10(signal / noise) if signal else -math.inf
