"""Recording what a model's routers choose, and the file that keeps it.

A trace is a NumPy array [routed layers, tokens] of records, in a ``.npy`` file without pickle:

    layer   int32      the layer's number in the model
    step    int32      the step that the token was new in, from 0
    id      int32 [k]  the experts that it chose, in its order; -1 where a layer chooses fewer than k
    w       fp32 [k]   their weights; 0 there

The tokens are those of all steps, each step's in the order of its batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from moec.errors import BadInput, OutputUnwritable

# Ops whose kernels choose experts; their first two results are w [N, k] and id [N, k]. A kernel stands in the
# file that is called as its op, with _2 behind it where PyTorch and Triton would share one.
ROUTERS = ("route", "route_sort", "route_sort_and_quant", "hash_route")
ENTRIES = ("step", "decode", "forward")


@dataclass
class RoutingTrace:
    """``steps[s][i]`` is (w, id) of the i-th routed layer, number ``layers[i]``, in step s.

    Choices only: experts that every token takes, as folded shared ones, are not among them.
    """

    layers: tuple[int, ...]
    steps: list[list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)

    def choices(self, step: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """By layer number: weights [N, k] and int32 ids [N, k] of one step."""
        return dict(zip(self.layers, self.steps[step], strict=True))

    def array(self) -> Any:
        """The trace as records [layers, tokens]; steps that failed half-way are left out."""
        steps = [(n, s) for n, s in enumerate(self.steps) if len(s) == len(self.layers)]
        width = max((id.shape[1] for _, s in steps for _, id in s), default=1)
        record = np.dtype(
            [("layer", "<i4"), ("step", "<i4"), ("id", "<i4", (width,)), ("w", "<f4", (width,))]
        )
        parts = []
        for number, step in steps:
            part = np.zeros((len(self.layers), len(step[0][1]) if step else 0), record)
            part["step"], part["id"] = number, -1
            for i, (w, id) in enumerate(step):
                part["layer"][i] = self.layers[i]
                part["id"][i, :, : id.shape[1]] = id.cpu().numpy()
                part["w"][i, :, : w.shape[1]] = w.float().cpu().numpy()
            parts.append(part)
        return np.concatenate(parts, axis=1) if parts else np.zeros((len(self.layers), 0), record)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file aside, then in place. Raises OutputUnwritable."""
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:
                np.save(file, self.array(), allow_pickle=False)
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise OutputUnwritable(f"can't write {path}: {error.strerror or error}") from None


@contextmanager
def recording(code: ModuleType, layers: list[list[int]]) -> Iterator[RoutingTrace]:
    """What the routers of a package's ``model.py`` choose while this is open. ``layers`` holds each routed
    layer's number and how many experts it chooses.

    The generated functions look their kernels up in ``code`` at each call: they are replaced there, and put
    back afterwards, so that nothing is slower without a recording. Raises BadInput where no layer routes.
    """
    routers = [name for name, value in vars(code).items() if _is_router(value)]
    if not routers or not layers:
        raise BadInput(
            "the model has no routed layers, or they choose inside of kernels: there is nothing to record",
            notes=["what one-launch makes of a layer tells no choices; one-launch{route=false} does"],
        )
    trace, chosen = RoutingTrace(tuple(n for n, _ in layers)), [k for _, k in layers]
    before = {name: vars(code)[name] for name in (*routers, *ENTRIES) if name in vars(code)}
    for name, function in before.items():
        setattr(code, name, _step(function, trace) if name in ENTRIES else _router(function, trace, chosen))
    try:
        yield trace
    finally:
        for name, function in before.items():
            setattr(code, name, function)


def _is_router(value: Any) -> bool:
    file = getattr(value, "__module__", None) or ""
    package, _, stem = file.rpartition(".")
    return callable(value) and package.endswith(".kernels") and stem.removesuffix("_2") in ROUTERS


def _step(entry: Callable[..., Any], trace: RoutingTrace) -> Callable[..., Any]:
    @wraps(entry)
    def begins(*args: Any) -> Any:
        trace.steps.append([])
        return entry(*args)

    return begins


def _router(kernel: Callable[..., Any], trace: RoutingTrace, chosen: list[int]) -> Callable[..., Any]:
    @wraps(kernel)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        results = kernel(*args, **kwargs)
        k = chosen[len(trace.steps[-1])]
        # Copies: a buffer may serve again in the same step. They stay where they are; nothing waits for them.
        trace.steps[-1].append((results[0][:, :k].clone(), results[1][:, :k].clone()))
        return results

    return recorded
