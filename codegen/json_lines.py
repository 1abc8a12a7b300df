"""Where in a JSON text a value begins: json.loads doesn't keep that; it is looked for once one is wrong."""

from __future__ import annotations

import json
import re

_SPACE = re.compile(r"[ \t\n\r]*")
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")
_DECODER = json.JSONDecoder()


def line_of(text: str, path: str) -> int:
    """The line, from 1, on which the value at ``problems[3].points[1].rows`` begins; ``text`` is whole JSON.

    Of a value that isn't there, that of the innermost one around it that is.
    """
    at = _skip(text, 0)
    for number, name in _STEP.findall(path):
        found = _child(text, at, name or int(number))
        if found is None:
            break
        at = found
    return text.count("\n", 0, at) + 1


def _child(text: str, at: int, step: str | int) -> int | None:
    """Where element ``step`` of the object or the array at ``at`` begins; of equal keys the last counts."""
    if text[at] not in "{[":
        return None
    found, key, end = None, -1, _skip(text, at + 1)
    while text[end] not in "}]":
        if text[at] == "{":
            key, end = _DECODER.raw_decode(text, end)
            end = _skip(text, _skip(text, end) + 1)  # behind the colon
        else:
            key += 1
        if key == step:
            found = end
        end = _skip(text, _DECODER.raw_decode(text, end)[1])
        if text[end] == ",":
            end = _skip(text, end + 1)
    return found


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at
