"""Who may import whom, as functions over source text."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath

FOLDERS = ("ir", "passes", "codegen", "runtime", "models")
LEAVES = ("errors", "config")

# What a folder may import of moec, beside itself and the leaves.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "ir": (),
    "models": ("ir",),
    "passes": ("ir",),
    "codegen": ("ir",),
    "runtime": (),
}
# A built package runs with the runtime alone, so its needs stay few.
RUNTIME_NEEDS = {"torch", "numpy", "safetensors", "cuda", "triton"}
TRANSFORMERS_IN = ("tests/", "benchmarks/", "moec/integrations/", "examples/pydoc/train.py")


def module_of(path: str) -> str:
    """The dotted name of a repository file: ir/graph.py -> moec.ir.graph, moec/cli.py -> moec.cli."""
    parts = list(PurePosixPath(path).with_suffix("").parts)
    if parts[0] in FOLDERS:
        parts.insert(0, "moec")
    return ".".join(parts)


def imported(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, inside functions too; relative names resolved.

    `from moec import x` counts as moec.x; so do importlib.import_module and __import__ with a text that
    starts with a constant.
    """
    module = module_of(path)
    if PurePosixPath(path).name == "__init__.py":
        package = module.removesuffix(".__init__")
    else:
        package = module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            if base == "moec":
                for alias in node.names:
                    yield node.lineno, f"moec.{alias.name}"
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            text = node.args[0]
            if isinstance(text, ast.JoinedStr) and text.values:
                text = text.values[0]
            if (
                name in ("import_module", "__import__")
                and isinstance(text, ast.Constant)
                and isinstance(text.value, str)
                and not text.value.startswith(".")
            ):
                yield node.lineno, text.value


def violations(path: str, source: str) -> list[str]:
    """What a repository file imports against the rules; path is relative to the repository, with slashes."""
    return [
        f"{path}:{line} imports {name}: {reason}"
        for line, name in imported(path, source)
        if (reason := _reason(path, name))
    ]


def _reason(path: str, name: str) -> str:
    top, _, rest = name.partition(".")
    part = rest.partition(".")[0]
    folder = path.partition("/")[0]
    if top in FOLDERS:
        return f"write moec.{top}: a class loaded under two names is two classes"
    if top == "transformers" and not path.startswith(TRANSFORMERS_IN):
        return "transformers is for tests, benchmarks and moec.integrations"
    if path in (f"moec/{leaf}.py" for leaf in LEAVES) and top == "moec":
        # Options refuse bad values with the errors that everything else uses.
        return "" if (path, name) == ("moec/config.py", "moec.errors") else "a leaf imports nothing of moec"
    if folder not in FOLDERS:
        return ""
    if top == "moec":
        allowed = (folder, *LEAVES, *MAY_IMPORT[folder])
        return "" if part in (*allowed, "__version__") else f"{folder} may import only {', '.join(allowed)}"
    if folder == "runtime" and top not in RUNTIME_NEEDS and top not in sys.stdlib_module_names:
        return f"the runtime needs only {', '.join(sorted(RUNTIME_NEEDS))} and the standard library"
    return ""
