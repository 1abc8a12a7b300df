"""The line on which a value of a JSON text begins, against texts whose lines are known."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.json_lines import line_of

KEYS = st.text(st.characters(codec="utf-8", exclude_characters=".[]", exclude_categories=["Cs"]), min_size=1)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(KEYS, v), max_leaves=20)


def written(value: Any, path: str, lines: dict[str, int], out: list[str]) -> None:
    """Writes ``value`` into ``out``, a token a line, and notes on which line each value begins."""
    lines[path] = len(out) + 1
    if isinstance(value, dict):
        out.append("{")
        for number, (key, one) in enumerate(value.items()):
            out += [json.dumps(key), ":"]
            written(one, f"{path}.{key}".removeprefix("."), lines, out)
            out += [","] * (number + 1 < len(value))
        out.append("}")
    elif isinstance(value, list):
        out.append("[")
        for number, one in enumerate(value):
            written(one, f"{path}[{number}]", lines, out)
            out += [","] * (number + 1 < len(value))
        out.append("]")
    else:
        out.append(json.dumps(value))


@given(VALUES)
def test_each_value_is_found(value: Any) -> None:
    lines: dict[str, int] = {}
    out: list[str] = []
    written(value, "", lines, out)
    text = "\n".join(out)
    assert json.loads(text) == value
    assert {path: line_of(text, path) for path in lines} == lines


@pytest.mark.parametrize(
    ("path", "line"),
    [("a[1].b", 3), ("a[1].c", 3), ("a[7]", 2), ("z", 1), ("a[0].b", 2), ("twice", 5), ("a.b", 2)],
)
def test_what_is_not_there_is_looked_for_as_far_as_it_goes(path: str, line: int) -> None:
    text = '{"twice": 1,\n "a": [1,\n {"b": 2}],\n\n "twice": 2}'
    assert line_of(text, path) == line
