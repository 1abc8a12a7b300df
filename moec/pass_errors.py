"""What each pass of a package does to each value: the dumps interpreted one after the other.

All get the same weights and inputs, and the routing of the naive IR, so that one flipped choice of experts
doesn't drown what is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec import trial
from moec.dumps import dumps, name_of, number_of
from moec.ir import read_module
from moec.passes.instruments import interpret, relative_error, sqnr
from moec.routing import Injection, Recorder


@dataclass(frozen=True)
class PassError:
    """One value after one pass, beside what it was before: the largest difference over the largest magnitude
    before, and signal to noise in dB; ``total`` is the latter against the naive IR.

    ``value`` is ``layer.moe@model.layers.3.:%h``, or of an output ``step.0``.
    """

    number: int
    passed: str
    value: str
    error: float
    sqnr: float
    total: float
    output: bool = False

    def as_dict(self) -> dict[str, Any]:
        def finite(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {
            "number": self.number,
            "pass": self.passed,
            "value": self.value,
            "error": finite(self.error),
            "sqnr_db": finite(self.sqnr),
            "total_sqnr_db": finite(self.total),
            "output": self.output,
        }


def pass_errors(package: Path, weights: Any = "random:0", seed: int = 0) -> list[PassError]:
    """A row for each output and for each value that a pass's dump and the one before both have by that name
    and type, in the order of the passes; values with no error included.

    A pass may give an old name to another value: such a row is a hint, an output's is a fact.
    """
    files = dumps(package)
    naive = read_module(files[0])
    tensors, inputs = trial.weights_for(naive, weights), trial.inputs_for(naive, seed)
    recorder = Recorder()
    before = first = interpret(naive, inputs, tensors, recorder.alter)
    rows: list[PassError] = []
    for file in files[1:]:
        module = read_module(file)
        given = {name: inputs[name] for name in inputs if name in module}
        injection = Injection(math.inf, recorder.choices)
        now = interpret(module, given | trial.caches_for(module, given), tensors, injection.alter)
        rows += _rows(number_of(file), name_of(file), first, before, now)
        before = now
    return rows


def _rows(number: int, name: str, first: Any, before: Any, now: Any) -> list[PassError]:
    rows = [
        PassError(number, name, key, relative_error(old, got), sqnr(old, got), sqnr(first[0][key], got), True)
        for key, got in now[0].items()
        if (old := before[0].get(key)) is not None and key in first[0] and _same_kind(old, got)
    ]
    for key, (type, got) in now[1].items():
        if key not in before[1] or before[1][key][0] != type:
            continue
        old = before[1][key][1]
        total = sqnr(first[1][key][1], got) if key in first[1] and first[1][key][0] == type else math.nan
        rows.append(PassError(number, name, key, relative_error(old, got), sqnr(old, got), total))
    return rows


def _same_kind(old: Any, got: Any) -> bool:
    """Caches whose entries a pass changed have nothing to compare."""
    layers = getattr(old, "layers", None), getattr(got, "layers", None)
    if layers[0] is None or layers[1] is None:
        return layers[0] is layers[1]
    return all(t.shape == layers[1][n].shape and t.dtype == layers[1][n].dtype for n, t in layers[0].items())
