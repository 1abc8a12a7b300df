"""What a manifest must look like: each field's type, and a digest of them all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from moec.runtime.dtypes import DTYPES

Rule = Callable[[Any], bool]


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The same manifest with its own digest: SHA-256 of the other fields as canonical JSON."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return rest | {"digest": hashlib.sha256(canonical.encode()).hexdigest()}


def flaw(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the first field that isn't what it must be."""
    for key, rule in _FIELDS.items():
        if key not in manifest:
            if key in _NEEDED:
                return f"has no {key!r}"
        elif not rule(manifest[key]):
            return f"has a wrong {key!r}"
    if "decode" in manifest["entries"] and not _size(manifest["entries"]["decode"].get("max_new")):
        return "has an entry 'decode', but not how many new tokens it takes"
    if "step" in manifest["entries"] and not all(_size(manifest.get(key)) for key in _LANGUAGE):
        return f"is a language model's, but has no {' or '.join(map(repr, _LANGUAGE))}"
    return None


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _size(value: Any) -> bool:
    return _count(value) and value > 0


def _dtype(value: Any) -> bool:
    return isinstance(value, str) and value in DTYPES


def _maybe(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def _list(rule: Rule) -> Rule:
    return lambda value: isinstance(value, list) and all(map(rule, value))


def _pair(first: Rule, second: Rule) -> Rule:
    return lambda value: isinstance(value, list) and len(value) == 2 and first(value[0]) and second(value[1])


def _record(**rules: Rule) -> Rule:
    return lambda value: (
        isinstance(value, dict)
        and rules.keys() <= value.keys()
        and all(rule(value[key]) for key, rule in rules.items())
    )


def _map(rule: Rule) -> Rule:
    return lambda value: isinstance(value, dict) and all(map(rule, value.values()))


def _pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _ranges(value: Any) -> bool:
    """Of a name with as many ``*``."""
    return value["name"].count("*") == len(value["ranges"])


def _tensors(**more: Rule) -> Rule:
    each = _record(name=_text, ranges=_list(_pair(_count, _count)), dtype=_dtype, shape=_list(_count), **more)
    scale = _list(_count)
    return _list(lambda value: each(value) and _ranges(value) and scale(value.get("scale", [])))


def _caches(value: Any) -> bool:
    """Exactly these fields: they make a CacheSpec."""
    each = _record(name=_text, dtype=_dtype, entry=_list(_size), page=_size, layers=_list(_count))
    return _list(each)(value) and all(len(cache) == 5 for cache in value)


_FIELDS: dict[str, Rule] = {
    "files": _map(_text),
    "digest": _text,
    "name": _text,
    "target": _text,
    "device": _text,
    "dtype": lambda value: value in ("f32", "bf16", "f16"),
    "hidden": _count,
    "vocab": _maybe(_size),
    "max_positions": _maybe(_size),
    "eos": _list(_count),
    "options": lambda value: isinstance(value, dict),
    "entries": _map(_record(args=_list(_pair(_text, _text)), returns=_list(_text))),
    "caches": _caches,
    "routed_layers": _list(_pair(_count, _size)),
    "parameters": _tensors(bound=lambda value: isinstance(value, bool)),
    "checkpoint": _tensors(kind=_text),
    "ignored": _list(_pair(_pattern, _text)),
}
_NEEDED = _FIELDS.keys() - {"vocab", "max_positions", "eos", "options"}
_LANGUAGE = ("vocab", "max_positions")
