"""Building a package's kernels ahead of time: what its kernel files declare, compiled into ``cubin/``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moec.runtime.compile import compile_many
from moec.runtime.kernel_cache import default_folder
from moec.runtime.launch import Launchable
from moec.runtime.package import import_file

Progress = Callable[[int, int], None]


def compile_kernels(
    folder: Path, arch: str, cache: Path | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Compiles every variant of every kernel in the package at ``folder`` for one target (``sm_90a``).

    Returns what the manifest says of each: registers, spills, shared memory, matrix instructions, loads. What
    ``cache`` (by default the user's) holds isn't compiled again. Raises the first CompileFailed or
    TooMuchSharedMemory, naming the others.
    """
    requests = [request for kernel in declared(folder) for request in kernel.requests(arch)]
    cubins = compile_many(requests, cache or default_folder(), progress=progress).check()
    for cubin in cubins:
        cubin.write(folder / "cubin")
    return [cubin.as_manifest() for cubin in cubins]


def declared(folder: Path) -> list[Launchable]:
    """What can be launched of the package's kernel files, in order. Importing them needs no Triton."""
    name = f"moec_building_{abs(hash(folder)):x}"
    try:
        import_file(name, folder / "__init__.py", package=True)
        modules = [
            import_file(f"{name}.kernels", folder / "kernels" / "__init__.py", package=True),
            *(m for n, m in sorted(sys.modules.items()) if n.startswith(f"{name}.kernels.")),
        ]
        found = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, Launchable)}
        return list(found.values())
    finally:
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
