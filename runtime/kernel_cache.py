"""Compiled kernels on disk, found by the content of what they were made from, never by path or time.

An entry is one file: the SHA-256 of all that follows, a line of JSON, the cubin. It is written aside,
flushed to the disk and renamed into place, so a reader in any process sees a whole entry or none; what the
digest doesn't vouch for counts as none and is compiled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.errors import OutputUnwritable
from moec.runtime.sass import KernelFacts


@dataclass(frozen=True)
class Cubin:
    """A compiled variant of a kernel.

    ``metadata`` is what a launch needs, as JSON (``runtime/launch.py`` reads it back from a package):

    kernel, variant, arch        what it is: scale_rows, w4s2, sm_90a
    symbol                       the entry's name in the cubin
    warps                        per block
    shared                       bytes of dynamic shared memory per block
    arguments                    [name, type] of each, constexprs left out
    divisible                    names of those that must be multiples of 16
    descriptors                  swizzle, box and element of each tensor descriptor; empty without TMA
    flags                        how many each has without TMA
    hidden                       {name: {size, align}} of the pointers that follow: scratch bytes a block
    compiler                     versions
    """

    data: bytes
    metadata: dict[str, Any]
    facts: KernelFacts

    @property
    def stem(self) -> str:
        """The name of its files in a package: KERNEL.VARIANT.SM."""
        return ".".join(self.metadata[key] for key in ("kernel", "variant", "arch"))

    def as_manifest(self) -> dict[str, Any]:
        """What a package's manifest says of it."""
        names = ("kernel", "variant", "arch", "warps", "shared", "compiler")
        return {n: self.metadata[n] for n in names} | {"facts": self.facts.as_manifest()}

    def write(self, folder: Path) -> None:
        """``STEM.cubin`` and ``STEM.json``, which holds the metadata, in a package's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.stem}.cubin").write_bytes(self.data)
        text = json.dumps(self.metadata, indent=1, sort_keys=True) + "\n"
        (folder / f"{self.stem}.json").write_text(text, encoding="utf-8")


class KernelCache:
    """The entries in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the entry of a key is, in 256 folders."""
        return self.folder / "kernels" / key[:2] / key[2:]

    def get(self, key: str) -> Cubin | None:
        """The entry, or None where there is no whole one."""
        try:
            return _decode(self.path(key).read_bytes())
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, cubin: Cubin) -> None:
        """Raises OutputUnwritable."""
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(prefix=".", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_encode(cubin))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, path)
            except BaseException:
                os.unlink(aside)
                raise
        except OSError as error:
            raise OutputUnwritable(
                f"can't write compiled kernels to {self.folder}: {error.strerror or error}",
                notes=["--cache, or the variable MOEC_CACHE, names another folder"],
            ) from None


def default_folder() -> Path:
    """``~/.cache/moec``, or where the XDG convention puts it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moec"


def _encode(cubin: Cubin) -> bytes:
    about = {"metadata": cubin.metadata, "facts": cubin.facts.as_manifest()}
    body = json.dumps(about, sort_keys=True).encode() + b"\n" + cubin.data
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _decode(entry: bytes) -> Cubin:
    """Raises ValueError or KeyError for anything but a whole entry."""
    digest, _, body = entry.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("the entry isn't the one that was written")
    about, _, data = body.partition(b"\n")
    found = json.loads(about)
    return Cubin(data, found["metadata"], KernelFacts.from_manifest(found["facts"]))
