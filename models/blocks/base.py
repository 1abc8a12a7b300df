"""What all parts of a spec share: the line that made them, checks, and how one block lowers another."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from moec import errors
from moec.errors import MoecError, SourceLoc, SpecError, nearest
from moec.ir import Builder, TensorType, Value

_PACKAGE = str(Path(errors.__file__).parent) + os.sep
_SKIPPED = ("dataclasses", "copy")  # `replace` and `copy` make blocks on somebody's behalf
_LARGEST = 2**40  # of any size: products of several stay far from what IR text can hold

_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*")  # of parameters and their scopes

# Where blocks come from while a configuration is read: no line of code is the user's then.
_source: ContextVar[SourceLoc | None] = ContextVar("_source", default=None)


@contextmanager
def made_from(loc: SourceLoc) -> Iterator[None]:
    """Blocks that are made meanwhile come from ``loc``, not from the line of code that makes them."""
    token = _source.set(loc)
    try:
        yield
    finally:
        _source.reset(token)


def is_moecs(file: str) -> bool:
    """Whether a source file is part of moec, so that an error in it is no line of the user's."""
    return file.startswith(_PACKAGE)


def users_line() -> SourceLoc | None:
    """The nearest line outside moec, where the user wrote what is being made, or the configuration read.

    None where the command line makes it: what is behind click is no line of the user's.
    """
    if (source := _source.get()) is not None:
        return source
    frame = sys._getframe(1)
    while frame is not None:
        file, name = frame.f_code.co_filename, str(frame.f_globals.get("__name__"))
        if name.partition(".")[0] == "click":
            return None
        if not is_moecs(file) and name not in _SKIPPED:
            return SourceLoc(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def raised_at(trace: TracebackType | None, file: str = "") -> SourceLoc | None:
    """The deepest line of a traceback that lies in ``file``, or outside moec where no file is given."""
    found = None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name == file or (not file and not is_moecs(name)):
            found = SourceLoc(name, trace.tb_lineno)
        trace = trace.tb_next
    return found


class _DeclaredType(type):
    """Makes a declared object: notes the user's line, then checks the object. Errors name that line."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        loc = users_line()
        try:
            made = super().__call__(*args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                raise  # from inside a constructor, not about its arguments
            raise SpecError(_about_arguments(cls, error), loc=loc) from None
        except SpecError as error:
            raise error.at(loc) from None
        object.__setattr__(made, "loc", loc)
        try:
            made.check()
        except SpecError as error:
            raise error.at(loc) from None
        return made


def _about_arguments(cls: type, error: TypeError) -> str:
    message = str(error).replace("__init__()", "").replace(" .", " ").replace(". ", " ")
    names = [f.name for f in fields(cls) if f.init] if is_dataclass(cls) else []
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    if unknown and names:
        return f"{cls.__name__} has no field {unknown[1]!r}{nearest(unknown[1], names)}"
    if lacking := re.search(r"missing \d+ required positional arguments?: (.*)", message):
        return f"{cls.__name__} lacks {lacking[1]}"
    return message


class Declared(metaclass=_DeclaredType):
    """A part of a spec. ``loc`` is where the user made it; it takes no part in equality."""

    loc: SourceLoc | None = None

    def check(self) -> None:
        """Raises SpecError where the fields contradict each other."""

    def need(self, holds: bool, message: str) -> None:
        if not holds:
            raise SpecError(f"{type(self).__name__}: {message}", loc=self.loc)

    def need_positive(self, *names: str) -> None:
        """Each of these fields is an integer of 1 or more."""
        for name in names:
            value = getattr(self, name)
            self.need(_is_int(value) and value > 0, f"{name} must be a positive integer, not {value!r}")
            self.need(value <= _LARGEST, f"{name} must be an integer of 1 to {_LARGEST}, not {value}")

    def need_natural(self, *names: str) -> None:
        """Each of these fields is an integer of 0 or more."""
        for name in names:
            value = getattr(self, name)
            fits = _is_int(value) and 0 <= value <= _LARGEST
            self.need(fits, f"{name} must be an integer of 0 or more, not {value!r}")

    def need_number(self, *names: str, above: float | None = None, least: float | None = None) -> None:
        """Each of these fields is a finite number, greater than ``above``, at least ``least``."""
        bound = (
            f" above {above:g}"
            if above is not None
            else f" of {least:g} or more"
            if least is not None
            else ""
        )
        for name in names:
            value = getattr(self, name)
            fits = isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30
            fits = fits and (above is None or value > above) and (least is None or value >= least)
            self.need(fits, f"{name} must be a finite number{bound}, not {value!r}")

    def need_flag(self, *names: str) -> None:
        """Each of these fields is True or False."""
        for name in names:
            value = getattr(self, name)
            self.need(isinstance(value, bool), f"{name} must be True or False, not {value!r}")

    def need_text(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self.need(isinstance(value, str), f"{name} must be a text, not {value!r}")

    def need_name(self, *names: str, empty: bool = False) -> None:
        """Each of these fields is a parameter's name or the beginning of one: ``mlp``, ``a.q_proj``."""
        for name in names:
            value = getattr(self, name)
            fits = isinstance(value, str) and (is_name(value) or (empty and not value))
            self.need(fits, f"{name} must be a name of letters, digits, _, - and single dots, not {value!r}")

    def need_one_of(self, name: str, *words: str) -> None:
        """The field is one of these words."""
        value = getattr(self, name)
        fits = isinstance(value, str) and value in words
        self.need(fits, f"{name} is one of {', '.join(words)}, not {value!r}")

    def need_regex(self, name: str, pattern: object) -> None:
        """``pattern``, a part of the field ``name``, is a regular expression."""
        self.need(isinstance(pattern, str), f"{name} must hold texts, not {pattern!r}")
        try:
            re.compile(str(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            self.need(False, f"{pattern!r} in {name} is no regex: {error}")

    def as_tuple(self, *names: str) -> None:
        """Lists in these fields become tuples: a block must be hashable. For ``__post_init__``."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    def need_a(self, name: str, kind: type) -> None:
        value = getattr(self, name)
        self.need(isinstance(value, kind), f"{name} must be a {kind.__name__}, not {value!r}")


def is_name(text: str) -> bool:
    """Whether a parameter, or what holds parameters, can be called so."""
    return _NAME.fullmatch(text) is not None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Block(Declared):
    """A part of the network. A user's own block defines ``lower`` and nothing else:

    class Residual(Block):
        def lower(self, b, x):                        # x: [N, hidden]
            H = x.type.shape[-1]
            return b.add(x, b.project(x, "mix", H, out="mix"))

    It can be an ``attn`` or ``mlp`` of a Decoder, or the block of a Layer. Blocks that are equal, as frozen
    dataclasses of equal fields are, share their code.
    """

    # What one token keeps in the KV cache of one layer, None where the block keeps nothing.
    cache_entry: tuple[int, ...] | None = None

    def lower(self, b: Builder, x: Value) -> Value:
        """Writes the block's ops for x [N, hidden] and returns its result."""
        raise NotImplementedError(f"{type(self).__name__} has no lower(self, b, x)")


def lower_block(block: Block, b: Builder, x: Value) -> Value:
    """``block.lower(b, x)``; whatever goes wrong in it is reported at the user's line."""
    name = f"{type(block).__name__}.lower"
    try:
        y = block.lower(b, x)
    except MoecError as error:
        if error.loc is None or is_moecs(error.loc.file):
            error.loc = _line_in_lower(block, error) or block.loc
        raise
    except NotImplementedError as error:
        raise SpecError(str(error) or f"{name} isn't implemented", loc=block.loc) from None
    except Exception as error:
        loc = _line_in_lower(block, error)
        if loc is None:
            raise  # in a block of moec's: no mistake of the user's
        raise SpecError(f"{name}: {type(error).__name__}: {error}", loc=loc) from None
    if not isinstance(y, Value):
        raise SpecError(f"{name} returns {y!r}, not a value of the graph", loc=block.loc)
    return y


def _line_in_lower(block: Block, error: Exception) -> SourceLoc | None:
    """The line of the user's own ``lower`` that the error came through, None where moec wrote the block."""
    code = getattr(type(block).lower, "__code__", None)
    if code is None or is_moecs(code.co_filename):
        return None
    return raised_at(error.__traceback__, code.co_filename)


def lower_stream(block: Block, b: Builder, x: Value) -> Value:
    """``lower_block`` of a part of the residual stream: the result must have x's type."""
    y = lower_block(block, b, x)
    if y.type != x.type:
        raise SpecError(
            f"{type(block).__name__} takes {x.type} but returns {y.type}, unfit for the residual stream",
            loc=block.loc,
        )
    return y


def tensor(x: Value) -> TensorType:
    """x's type, known to be a tensor's."""
    if not isinstance(x.type, TensorType):
        raise SpecError(f"{x.text} is {x.type}, not a tensor")
    return x.type


def width(x: Value) -> int:
    """The last axis of x."""
    size = tensor(x).shape[-1]
    if not isinstance(size, int):
        raise SpecError(f"{x.text} is {x.type}: its last axis must be a number")
    return size
