"""The Jinja environment of every template, and the names that generated code may hold."""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from moec.errors import InternalError

TEMPLATES = Path(__file__).parent / "templates"


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """Undefined names are errors; blocks leave no blank lines behind."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_number,
    )


def _number(value: Any) -> Any:
    """What a template writes; infinity has no literal in Python."""
    return number(value) if isinstance(value, float) else value


def number(value: float) -> str:
    """A float as Python source."""
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def quote(text: str) -> str:
    """``text`` as a Python string literal in double quotes, whatever it holds."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'


def quote_format(text: str, star: str) -> str:
    """``text`` as a literal whose ``*``, if it has one, is the value of the variable ``star``."""
    if "*" not in text:
        return quote(text)
    before, after = (quote(part.replace("{", "{{").replace("}", "}}"))[1:-1] for part in text.split("*", 1))
    return f'f"{before}{{{star}}}{after}"'


def prose(text: str) -> str:
    """``text`` on one line that can stand in a comment or between triple quotes."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return printable.replace("\\", "/").replace('"' * 3, "'" * 3)


def render_python(template: str, **values: Any) -> str:
    """The rendered template, which must be Python. Raises InternalError with the line otherwise."""
    try:
        source = environment().get_template(template).render(**values)
        ast.parse(source)
    except jinja2.TemplateError as error:
        raise InternalError(f"{template}: {error}") from error
    except SyntaxError as error:
        line = source.splitlines()[(error.lineno or 1) - 1]
        raise InternalError(f"{template} renders no Python: {error.msg} in {line!r}") from error
    return source


@dataclass(frozen=True)
class Part:
    """What the template of another kernel renders in a file whose function ``whole`` calls it.

    It's called ``whole_name``. ``calls``: the name of another part that it calls, by what the template finds
    under that name.
    """

    name: str
    template: str
    constants: dict[str, Any]
    calls: str = ""

    def text(self, whole: str) -> str:
        called = {self.calls: f"{whole}_{self.calls}"} if self.calls else {}
        constants = {**self.constants, **called}
        return render_python(self.template, name=f"{whole}_{self.name}", **constants).strip()


def render_text(template: str, **values: Any) -> str:
    """The rendered template, which is no Python: CUDA C++."""
    try:
        return environment().get_template(template).render(**values)
    except jinja2.TemplateError as error:
        raise InternalError(f"{template}: {error}") from error


class Names:
    """Python identifiers for the names of one scope: readable, valid, and each used once."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken) | set(keyword.kwlist)
        self._of: dict[Any, str] = {}
        self._last: dict[str, int] = {}  # by wish: the last number that was given to it

    def __getitem__(self, key: Any) -> str:
        return self._of[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._of

    def alias(self, key: Any, other: Any) -> None:
        """``key`` is another name of the same Python object."""
        self._of[key] = self._of[other]

    def add(self, key: Any, wish: str) -> str:
        base = identifier(wish)
        name, number = base, self._last.get(base, 1)
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        self._last[base] = number
        self._of[key] = name
        return name


def identifier(text: str) -> str:
    """``q.nope`` as ``q_nope``: what is no letter or digit becomes an underscore."""
    name = re.sub(r"\W", "_", text, flags=re.ASCII)
    return name if name and not name[0].isdigit() else f"_{name}"
