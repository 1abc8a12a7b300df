"""Reading a package: its manifest, its hashes, then its code."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from moec.errors import NotAPackage, PackageTampered
from moec.runtime.manifest import flaw, seal

FORMAT = 1
# Files that Python would run: none may stand in a package beside those that were built.
_CODE = {".py", ".pyc", ".pyd", ".so"}
_EDITED = (
    "a package is code that runs when loaded: build it again, "
    "or run your edited one: --allow-edited, load(..., verify=False)"
)
_numbers = itertools.count()


class Package:
    """A built package, verified. Loading one runs its Python files: treat it as you would treat a program.

    Raises NotAPackage, or PackageTampered naming the first file that is not the one that was built.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._parent = (
            f"moec_package_{next(_numbers)}"  # never used again: another build may come to the same folder
        )
        if verify:
            self._verify()

    def _verify(self) -> None:
        listed = self.manifest["files"]
        if self.manifest != seal(self.manifest):
            raise PackageTampered(
                f"{self.folder / 'manifest.json'} isn't the manifest that was built", notes=[_EDITED]
            )
        for name, digest in listed.items():
            file = self.folder / name
            if not file.is_file():
                raise PackageTampered(f"{file} is missing from the package")
            if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                raise PackageTampered(
                    f"{file} isn't the file that was built: its hash is not the manifest's",
                    notes=[_EDITED],
                )
        for file in self.folder.rglob("*"):
            if file.suffix in _CODE and file.relative_to(self.folder).as_posix() not in listed:
                raise PackageTampered(f"{file} is in the package but not in its manifest")

    def module(self, name: str) -> ModuleType:
        """The package's Python module of that name (``model``, ``weights``), imported."""
        if self._parent not in sys.modules:
            import_file(self._parent, self.folder / "__init__.py", package=True)
        return import_file(f"{self._parent}.{name}", self.folder / f"{name}.py")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the package in ``folder``. Raises NotAPackage."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        if not isinstance(manifest["files"], dict):
            raise ValueError
    except FileNotFoundError:
        raise NotAPackage(f"{folder} is no package: it has no manifest.json") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise NotAPackage(f"{path} is no manifest of moec's") from None
    if found != FORMAT:
        raise NotAPackage(
            f"{folder} has package format {found}; this moec reads format {FORMAT}: build it again"
        )
    wrong = flaw(manifest)
    if wrong is not None:
        raise NotAPackage(f"{path} {wrong}: build the package again")
    return dict(manifest)


def import_file(name: str, file: Path, package: bool = False) -> ModuleType:
    """A generated file as a module of that name; with ``package``, its neighbours can be imported too."""
    if not file.is_file():
        raise NotAPackage(f"{file} is missing from the package")
    search = [str(file.parent)] if package else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=search)
    if spec is None or spec.loader is None:
        raise NotAPackage(f"{file} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # No bytecode: a stale or planted .pyc would run in place of the source whose hash was checked.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.dont_write_bytecode = before
    return module
