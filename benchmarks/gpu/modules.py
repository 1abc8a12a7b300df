"""Where a peer keeps what is wanted of it, which has changed between its versions."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def first(*modules: str) -> Any:
    """The first of these that is installed. Raises ModuleNotFoundError."""
    for name in modules[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return import_module(modules[-1])


def attribute(name: str, *modules: str) -> Any:
    """Of the first of these that has it. Raises ModuleNotFoundError or AttributeError, as the last does."""
    for module in modules[:-1]:
        try:
            return getattr(import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    return getattr(import_module(modules[-1]), name)
