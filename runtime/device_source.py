"""The part of a kernel file that a compiler sees: one ``@triton.jit`` function and what it needs.

A kernel file also holds Python that runs on the host. Compiling, and keying the cache with, only the slice
that a function needs means that host code can change without a new compilation, and that no worker imports
torch.
"""

from __future__ import annotations

import ast
from functools import lru_cache

from moec.errors import CompileFailed

_HEADER = "import triton\nimport triton.language as tl\n"
_GLUON = """from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
"""
_OURS = ("triton", "tl", "gluon", "gl", "hopper")


def device_source(text: str, function: str) -> str:
    """The slice of a kernel file's text: ``function``, the functions and constants that it reads, their
    imports.

    Definitions keep their order and their text, so that equal slices are equal bytes. The names ``triton``
    and ``tl`` are always Triton's own, as are ``gluon``, ``gl`` and ``hopper`` where one is read.
    Raises CompileFailed where the text is no Python or has no such function.
    """
    try:
        statements, lines = _parsed(text)
    except SyntaxError as error:
        raise CompileFailed(f"{function}: line {error.lineno} is no Python: {error.msg}") from None
    defined: dict[str, ast.stmt] = {name: node for node in statements for name in _names(node)}
    if not isinstance(defined.get(function), ast.FunctionDef):
        raise CompileFailed(f"the kernel file defines no function {function!r}")
    needed: set[ast.stmt] = set()
    waiting = [function]
    while waiting:
        node = defined.get(waiting.pop())
        if node is not None and node not in needed:
            needed.add(node)
            waiting += _reads(node)
    parts = [_text(lines, node) for node in statements if node in needed]
    gluon = any(_reads(node) & {"gluon", "gl", "hopper"} for node in needed)
    return _HEADER + _GLUON * gluon + "".join(f"\n\n{part}\n" for part in parts)


@lru_cache(maxsize=8)  # a file's variants come one after the other
def _parsed(text: str) -> tuple[list[ast.stmt], list[str]]:
    return ast.parse(text).body, text.splitlines()


def _names(node: ast.stmt) -> list[str]:
    """The names that a statement of a module binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        bound = [(a.asname or a.name).partition(".")[0] for a in node.names]
        return [name for name in bound if name not in _OURS]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return []


def _reads(node: ast.stmt) -> set[str]:
    """The names of the module that a statement reads: a function's parameters and variables are its own."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    read = {n.id for n in names if isinstance(n.ctx, ast.Load)}
    if not isinstance(node, ast.FunctionDef):
        return read
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return read - own - {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}


def _text(lines: list[str], node: ast.stmt) -> str:
    """A statement as it was written, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])
    return "\n".join(lines[first - 1 : node.end_lineno])
