"""A user's own model file: ``my_model.py:model``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from moec.errors import ModelFileError, MoecError, SourceLoc, nearest
from moec.models.blocks.base import is_moecs, raised_at
from moec.models.spec import Layer, Model, Spec


def load_spec(file: str, name: str) -> Spec:
    """The Model or Layer called ``name`` in a Python file, or what the function of that name returns.

    The file is code: it is run. Raises ModelFileError, or the block's own SpecError, at the user's line.
    """
    namespace = _run(file)
    if not name:
        hint = " or ".join(f"{file}:{key}" for key, value in namespace.items() if _may_be_spec(file, value))
        message = (
            f"say which model of the file is meant: {hint}" if hint else "no Model or Layer is in the file"
        )
        raise ModelFileError(message, loc=SourceLoc(file, 0))
    if name not in namespace:
        public = [key for key in namespace if not key.startswith("_")]
        raise ModelFileError(f"nothing is called {name!r}{nearest(name, public)}", loc=SourceLoc(file, 0))
    spec = namespace[name]
    if callable(spec) and not isinstance(spec, type):
        spec = _call(file, name, spec)
    if not isinstance(spec, Model | Layer):
        kind = f"the class {spec.__name__}" if isinstance(spec, type) else f"a {type(spec).__name__}"
        raise ModelFileError(f"{name} is {kind}, not a Model or Layer", loc=SourceLoc(file, 0))
    return spec


def _may_be_spec(file: str, value: Any) -> bool:
    """A Model or Layer, or a function of the file's own that can be called for one."""
    if isinstance(value, Model | Layer):
        return True
    code = getattr(value, "__code__", None)
    return code is not None and code.co_filename == file and not code.co_argcount


def _run(file: str) -> dict[str, Any]:
    try:
        source = Path(file).read_bytes()
    except OSError as error:
        raise ModelFileError(f"can't read it: {error.strerror or error}", loc=SourceLoc(file, 0)) from None
    try:
        code = compile(source, file, "exec")
    except SyntaxError as error:
        raise ModelFileError(f"no Python: {error.msg}", loc=SourceLoc(file, error.lineno or 0)) from None
    except ValueError as error:  # null bytes
        raise ModelFileError(f"no Python: {error}", loc=SourceLoc(file, 0)) from None
    module = ModuleType(f"moec_user_{Path(file).stem}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look their module up
    with _beside(file), _users_errors(file):
        exec(code, module.__dict__)
    return module.__dict__


def _call(file: str, name: str, make: Callable[[], Any]) -> Any:
    with _beside(file), _users_errors(file):
        return make()


@contextmanager
def _beside(file: str) -> Iterator[None]:
    """The file's neighbours can be imported, as when Python runs it."""
    folder = str(Path(file).resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextmanager
def _users_errors(file: str) -> Iterator[None]:
    """Whatever goes wrong in the file is reported at its line."""
    try:
        yield
    except MoecError as error:
        if error.loc is None or is_moecs(error.loc.file):
            error.loc = raised_at(error.__traceback__, file)
        raise
    except (Exception, SystemExit) as error:
        loc = raised_at(error.__traceback__, file) or SourceLoc(file, 0)
        raise ModelFileError(f"{type(error).__name__}: {error}", loc=loc) from None
