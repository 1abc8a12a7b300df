"""Candidates compiled ahead of their measurement, by as many processes as there are cores."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moec.codegen.schedules import Schedule
from moec.errors import MoecError
from moec.runtime.ahead import declared
from moec.runtime.compile import available_cores, compile_many
from moec.tune.measuring import Failed
from moec.tune.products import Product

Candidate = tuple[Product, Schedule]


@dataclass
class _State:
    folder: Path
    done: threading.Event = field(default_factory=threading.Event)
    reason: str = ""


class Compiling:
    """A thread that compiles candidates in the order in which they were asked for.

    ``folder`` receives a package of each; ``cache`` is that of compiled kernels. ``compile`` is off where
    Triton's interpreter is to run them.
    """

    def __init__(self, folder: Path, target: str, cache: Path | None, compile: bool = True) -> None:
        self.folder, self.target, self.cache, self.compile = folder, target, cache, compile
        self._states: dict[Candidate, _State] = {}
        self._waiting: list[Candidate] = []
        self._lock = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def want(self, candidates: Sequence[Candidate]) -> None:
        with self._lock:
            for candidate in candidates:
                if candidate not in self._states:
                    self._states[candidate] = _State(self.folder / str(len(self._states)))
                    self._waiting.append(candidate)
            self._lock.notify()

    def drop(self, product: Product) -> None:
        """Those of a product that no one waits for any more."""
        with self._lock:
            self._waiting = [c for c in self._waiting if c[0] is not product]

    def package(self, product: Product, schedule: Schedule, limit: float) -> Path:
        """The package, compiled; waits for it, ``limit`` seconds. Raises Failed."""
        self.want([(product, schedule)])
        state = self._states[product, schedule]
        if not state.done.wait(limit):
            raise Failed("it wasn't compiled in time", kind="late")
        if state.reason:
            raise Failed(state.reason, kind="compile")
        return state.folder

    def close(self) -> None:
        """What is being compiled comes to its end first, unless that takes long."""
        with self._lock:
            self._closed, self._waiting = True, []
            self._lock.notify()
        self._thread.join(10)

    def _run(self) -> None:
        size = available_cores()
        while True:
            with self._lock:
                while not self._waiting and not self._closed:
                    self._lock.wait()
                if self._closed:
                    return
                batch, self._waiting = self._waiting[:size], self._waiting[size:]
            size = 2 * available_cores()  # the first ones are waited for
            states = [self._states[c] for c in batch]
            try:
                self._build(batch, states)
            except Exception as error:  # whatever it is, nobody must wait for ever
                for state in states:
                    state.reason = state.reason or f"{type(error).__name__}: {error}"
            for state in states:
                state.done.set()

    def _build(self, batch: Sequence[Candidate], states: Sequence[_State]) -> None:
        requests, owners = [], []
        for (product, schedule), state in zip(batch, states, strict=True):
            try:
                product.write(state.folder, schedule, self.target)
                made = [r for kernel in declared(state.folder) for r in kernel.requests(self.target)]
            except MoecError as error:
                state.reason = error.message.splitlines()[0]
                continue
            requests += made
            owners += [state] * len(made)
        if not self.compile:
            return
        # One that isn't there has its error, though not at its place: alone it is found again.
        results = compile_many(requests, self.cache)
        for state, cubin, request in zip(owners, results.cubins, requests, strict=True):
            if cubin is not None:
                cubin.write(state.folder / "cubin")
            elif not state.reason:
                said = [e.message for e in results.errors if e.message.startswith(f"{request}:")]
                state.reason = (said or ["it doesn't compile"])[0].splitlines()[0][:300]
