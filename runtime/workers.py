"""Compiler processes: started when first asked, started anew after a crash."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

_SCRIPT = Path(__file__).with_name("compile_worker.py")
# Variables that change what Triton, LLVM, ptxas or NVRTC produce: a cubin must not depend on who builds it.
_COMPILERS = (
    "TRITON_",
    "MLIR_",
    "LLVM_",
    "PTXAS_",
    "NVPTX_",
    "NVRTC_",
    "NVCC_",
    "DISABLE_",
    "USE_IR_LOC",
    "ALLOW_LHS_",
)
_TOOLS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")  # part of the cache's key, by their version


def environment(triton_cache: str) -> dict[str, str]:
    """A worker's: this process's, without what configures compilers, and with paths kept out of cubins."""
    kept = {k: v for k, v in os.environ.items() if k in _TOOLS or not k.startswith(_COMPILERS)}
    return kept | {"TRITON_CACHE_DIR": triton_cache, "TRITON_DISABLE_LINE_INFO": "1"}


class Worker:
    """One compiler process, for one thread at a time."""

    def __init__(self) -> None:
        self._process: _Process | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="moec-triton-")
        self._log = Path(self._folder.name, "log")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply of ``compile_worker``; a crash is ``{"error": ...}``, with the last that was printed."""
        if self._process is None:
            self._process = _Process(self._folder.name, self._log)
        os.truncate(self._log, 0)
        if line := self._process.ask(json.dumps(request)):
            reply: dict[str, Any] = json.loads(line)
            return reply
        status = self._process.close()
        self._process = None
        printed = self._log.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
        return {"error": f"the compiler ended with status {status}: {printed or 'it printed nothing'}"}

    def close(self) -> None:
        """Ends the process and removes what it left on the disk."""
        if self._process is not None:
            self._process.close()
        self._folder.cleanup()


class _Process:
    """``compile_worker`` and its pipes."""

    def __init__(self, triton_cache: str, log: Path) -> None:
        with log.open("a") as errors:
            # -P: the folder of the script holds modules whose names the standard library has too.
            self._popen = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(triton_cache),
            )
        self._requests = io.TextIOWrapper(cast(IO[bytes], self._popen.stdin), encoding="utf-8")
        self._replies = io.TextIOWrapper(cast(IO[bytes], self._popen.stdout), encoding="utf-8")

    def ask(self, line: str) -> str:
        """The reply's line; empty once the process has ended."""
        try:
            print(line, file=self._requests, flush=True)
            return self._replies.readline()
        except BrokenPipeError:
            return ""

    def close(self) -> int:
        """The exit status."""
        with suppress(BrokenPipeError):
            self._requests.close()
        self._replies.close()
        return self._popen.wait()
