"""Pass options as text, both ways: ``fp8-cast{block=128,skip=[lm_head]}``.

A pass's options are the fields of a frozen dataclass: bool, int, float, str, tuples of these, or None
beside one of them."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any

from moec.errors import BadOption, nearest
from moec.ir.text import split_top

_PASS = re.compile(r"([a-z][\w-]*)\s*(?:\{(.*)\})?$", re.DOTALL)
_PLAIN = re.compile(r"[\w.@*/:+-]+$")


def split_pipeline(text: str) -> list[tuple[str, dict[str, str]]]:
    """``a,b{x=1}`` as names with their options' texts. Raises BadOption."""
    found = []
    for part in split_top(text):
        match = _PASS.match(part)
        if match is None:
            raise BadOption(f"{part!r} is no pass: 'name' or 'name{{option=value,...}}' is")
        name, inside = match.groups()
        options: dict[str, str] = {}
        for item in split_top(inside or ""):
            key, equals, value = (piece.strip() for piece in item.partition("="))
            if not equals:
                raise BadOption(f"{name}: {item!r} is no option: 'name=value' is")
            if key in options:
                raise BadOption(f"{name}: {key} is given twice")
            options[key] = value
        found.append((name, options))
    return found


def read_options(pass_name: str, cls: type[Any], given: dict[str, str]) -> Any:
    """An instance of ``cls`` from texts. Raises BadOption, with the nearest names."""
    kinds = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, text in given.items():
        if key not in known:
            have = f"; there are {', '.join(known)}" if known else "; it has none"
            raise BadOption(f"{pass_name}: no option is called {key!r}{nearest(key, known) or have}")
        try:
            values[key] = _read(text, kinds[key])
        except ValueError:
            raise BadOption(f"{pass_name}: {key}={text} is no {_kind_name(kinds[key])}") from None
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # a required option is missing, or the class refuses a value
        raise BadOption(f"{pass_name}: {error}") from None


def show_options(options: Any) -> str:
    """``{block=64}``: the options that differ from their defaults; nothing where none does."""
    shown = []
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if value != default:
            shown.append(f"{f.name}={_show(value)}")
    return "{" + ",".join(shown) + "}" if shown else ""


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(map(_show, value)) + "]"
    if isinstance(value, str) and (not _PLAIN.match(value) or value == "none"):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value) if isinstance(value, float) else str(value)


def _read(text: str, kind: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if text == "none" and type(None) in args:
            return None
        return _read(text, next(a for a in args if a is not type(None)))
    if origin is tuple:
        inside = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text
        return tuple(_read(item, args[0]) for item in split_top(inside))
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if kind is str and text[:1] == '"':
        if len(text) < 2 or text[-1] != '"':
            raise ValueError(text)
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    return kind(text)


def _kind_name(kind: Any) -> str:
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"list of {args[0].__name__}s, like [a,b]"
    if args:
        return " or ".join("none" if a is type(None) else _kind_name(a) for a in args)
    return {"bool": "bool (true or false)"}.get(kind.__name__, kind.__name__)
