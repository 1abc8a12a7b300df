"""A worker process that measures, from outside: asked with a limit of time, started anew where it must be."""

from __future__ import annotations

import io
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import moec

START = 120.0  # s that a worker may take to start: it imports PyTorch and makes a CUDA context


class Failed(Exception):
    """Why there are no seconds. ``died``: the worker went with it, so what it had drawn is gone."""

    def __init__(self, reason: str, died: bool = False, kind: str = "failed") -> None:
        super().__init__(reason)
        self.reason, self.died, self.kind = reason, died, kind


def real_worker(device: str) -> list[str]:
    """The command of ``runtime/tune_worker.py``."""
    return [sys.executable, "-P", "-m", "moec.runtime.tune_worker", device]


@dataclass(frozen=True)
class Limits:
    """Seconds that a reply may take: of drawing operands, of a measurement beside its own budget."""

    draw: float = 60.0
    measure: float = 20.0


class Measurer:
    """One worker at a time. Each method raises Failed; behind one that ``died`` the next call starts anew."""

    def __init__(self, command: Sequence[str], limits: Limits | None = None) -> None:
        self.command, self.limits = list(command), limits or Limits()
        self._process: _Process | None = None
        self.restarts = -1

    def about(self) -> dict[str, Any]:
        """``device`` and ``capability``."""
        return self._ask({"do": "about"}, START)

    def operands(self, arguments: list[dict[str, Any]], choices: dict[str, int]) -> None:
        self._ask({"do": "operands", "arguments": arguments, "choices": choices}, self.limits.draw)

    def measure(self, package: Path, budget: float, tolerance: float, reference: bool) -> dict[str, Any]:
        given = {"package": str(package), "budget": budget, "tolerance": tolerance, "reference": reference}
        reply = self._ask({"do": "measure", **given}, budget + self.limits.measure)
        if not isinstance(reply.get("seconds"), float) or not reply["seconds"] > 0:
            raise Failed(f"the worker measured {reply.get('seconds')!r} s")
        return reply

    def close(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def _ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        if self._process is None:
            self._process = _Process(self.command)
            self.restarts += 1
            limit += START
        started = time.monotonic()
        try:
            line = self._process.ask(json.dumps(request), limit)
            reply: Any = json.loads(line) if line else None
        except TimeoutError:
            self.close()
            waited = time.monotonic() - started
            raise Failed(f"it hung: no result within {waited:.0f} s", died=True) from None
        except json.JSONDecodeError:
            reply = None
        if not isinstance(reply, dict):
            status, printed = self._process.end()
            self._process = None
            how = f"signal {-status}" if status < 0 else f"status {status}"
            last = f": {printed.splitlines()[-1][:200]}" if printed else ""
            raise Failed(f"the worker ended with {how}{last}", died=True)
        if "error" in reply:
            fatal = bool(reply.get("fatal"))
            if fatal:
                self.close()
            raise Failed(str(reply["error"]), died=fatal, kind=str(reply.get("kind", "failed")))
        return reply


class _Process:
    def __init__(self, command: list[str]) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        home = str(Path(moec.__file__).parents[1])
        path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for whoever asks: what it has is kept
        )
        self._requests = io.TextIOWrapper(cast(IO[bytes], self._popen.stdin), encoding="utf-8")
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with io.TextIOWrapper(cast(IO[bytes], self._popen.stdout), encoding="utf-8") as lines:
            for line in lines:
                self._replies.put(line)
        self._replies.put("")

    def ask(self, line: str, limit: float) -> str:
        """The reply; empty where the process has ended. Raises TimeoutError."""
        try:
            print(line, file=self._requests, flush=True)
        except (BrokenPipeError, ValueError):
            return ""
        try:
            return self._replies.get(timeout=limit)
        except queue.Empty:
            raise TimeoutError from None

    def end(self) -> tuple[int, str]:
        """The exit status, and what it printed. What doesn't end by itself is killed."""
        with suppress(BrokenPipeError, ValueError):
            self._requests.close()
        try:
            status = self._popen.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            status = self._popen.wait()
        self._log.seek(0)
        printed = self._log.read().strip()
        self._log.close()
        return status, printed
