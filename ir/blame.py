"""Where in a line of IR text a mistake stands, told from what the message names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from moec.errors import MoecError, SourceLoc

_NAMED = re.compile(r"[%$@][A-Za-z_*][\w.*-]*[\w*]|[%$@][A-Za-z_*]")
_QUOTED = re.compile(r"'([^']+)'")
_WORD = re.compile(r"[A-Za-z_]\w*")


def pointing(loc: SourceLoc, message: str, token: str = "") -> SourceLoc:
    """``loc``, whose ``text`` is its line, with the column of ``token``, or of what ``message`` speaks of.

    That is the first value, parameter or function that it names and the line has (as an operand, if it can
    be), else what it quotes, the attribute that it names, or the name of the op.
    """
    meaning = loc.text.split(" ; ")[0]
    right = meaning.find(" = ") + 1  # what is computed stands behind it
    head, _, rest = message.partition(": ")  # `call @body: layers 3..2 is empty` is about the layers
    for places in (
        _places(meaning, [token] if token else [], right),
        _places(meaning, [*_NAMED.findall(rest), *_QUOTED.findall(rest)], right),
        [m.start() for w in _WORD.findall(rest) if (m := re.search(rf"\b{w}=", meaning))],
        _places(meaning, [*_NAMED.findall(head), *_QUOTED.findall(head)], right),
        [_op(meaning, head, right)],
    ):
        if places:
            break
    return replace(loc, column=places[0] + 1)


def _places(text: str, tokens: list[str], right: int) -> list[int]:
    return [at for t in tokens if (at := _find(text, t, right)) is not None]


def _find(text: str, token: str, right: int) -> int | None:
    """The token as a whole: right of the ``=`` rather than left."""
    pattern = re.compile(rf"(?<![\w.%$@]){re.escape(token)}(?![\w*-]|\.\w)")
    found = pattern.search(text, right) or pattern.search(text)
    if found is not None:
        return found.start()
    return at if (at := text.find(token)) >= 0 else None


def _op(text: str, message: str, right: int) -> int:
    name = _WORD.match(message)
    at = _find(text, name[0], right) if name is not None else None
    return at if at is not None else len(text) - len(text.lstrip())


def point_at(error: MoecError, thing: Any) -> MoecError:
    """Points ``error`` at the line of IR text that an op or a function was read from, and notes the model's.

    Without such a line it points at the model's, as an error does by itself.
    """
    written, source = thing.written, getattr(thing, "loc", None)
    if written is None or (error.loc is not None and error.loc.column):
        return error.at(source)
    error.loc = pointing(written, error.message)
    if source is not None and source.line:
        error.note(f"of the model's line {source}")
    return error
