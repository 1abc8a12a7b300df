"""Writes docs/ir.md, the IR reference, from the declarations: ``python -m moec.ir.docs [FILE]``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moec.ir import text, types
from moec.ir.op import OPS, Op, attr, operand, result
from moec.ir.ops.control import Loop

PAGE = Path("docs/ir.md")


def page() -> str:
    """The whole page, in Markdown."""
    parts = ["# IR reference", _INTRODUCTION, "## Text", _prose(text), "## Types", _prose(types)]
    parts += ["### Dtypes", _table(("dtype", "bits", "in PyTorch"), _dtypes())]
    parts += ["## Ops", _CONVENTIONS, _table(("op", "what it does"), _summary())]
    for family, ops in families().items():
        parts += [f"## {family}", *(part for cls in ops for part in _section(cls))]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
This page is generated from the op declarations in `ir/ops` by `python -m moec.ir.docs`; edit those, not this."""

_CONVENTIONS = """\
Operands and results are values, attributes are constants of the graph. An operand in *italics* may be left out, and is
written `_` where another follows it. An attribute without a default must be given; one that equals its default isn't
printed. Dimensions that bear one name within an op are equal."""


def families() -> dict[str, list[type[Op]]]:
    """Ops by the first sentence of their file, in the files' order."""
    found: dict[str, list[type[Op]]] = {}
    for cls in OPS.values():
        module = sys.modules[cls.__module__]
        found.setdefault(_first_line(module).rstrip("."), []).append(cls)
    return found


def _section(cls: type[Op]) -> Iterator[str]:
    yield f"### {cls.name}"
    yield f"```\n{signature(cls)}\n```"
    for base in cls.__mro__:
        if base not in (cls, Op, object) and base.__doc__:
            yield _markdown(inspect.cleandoc(base.__doc__))
    yield _markdown(inspect.cleandoc(cls.__doc__ or ""))
    values = [(f"*`{o.name}`*" if o.optional else f"`{o.name}`", _cell(o.doc)) for o in cls.operand_specs]
    if values:
        yield _table(("operand", ""), values)
    shown = [
        a
        for a in cls.attr_specs.values()
        if not a.hidden and not (issubclass(cls, Loop) and a.name == "callee")
    ]
    if shown:
        yield _table(("attribute", "kind", "default", ""), map(_attribute, shown))
    if cls.result_specs:
        yield _table(("result", ""), [(f"`{r.name}`", _cell(r.doc)) for r in cls.result_specs])
    if cls.effects:
        yield f"Effects: {', '.join(sorted(cls.effects))}. Never removed or merged."


def signature(cls: type[Op]) -> str:
    """``%y = linear(%x, %w, %bias) {acc=...}``: how the op is written."""
    left = ", ".join(f"%{r.name}" for r in cls.result_specs)
    operands = ", ".join(_operand(o) for o in cls.operand_specs)
    if issubclass(cls, Loop):
        return f"%carried, ... = {cls.name} @body({operands})"
    if cls.name == "return":
        return f"return {operands}"
    return (f"{left} = " if left else "") + f"{cls.name}({operands})"


def _operand(spec: operand) -> str:
    return f"%{spec.name}, ..." if spec.variadic else f"%{spec.name}"


def _attribute(spec: attr) -> tuple[str, ...]:
    if spec.required:
        default = "required"
    elif spec.default is None:
        default = "none"
    else:
        default = f"`{spec.kind.print(spec.default)}`"
    return f"`{spec.name}`", spec.kind.name.replace("|", ", "), default, _cell(spec.doc)


def _summary() -> Iterator[tuple[str, str]]:
    for cls in OPS.values():
        yield f"[{cls.name}](#{cls.name})", _cell(_first_line(cls))


def _dtypes() -> Iterator[tuple[str, str, str]]:
    for dtype in types.DTYPES.values():
        yield f"`{dtype.name}`", str(dtype.bits), f"`{dtype.torch_name}`"


def _first_line(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "").split("\n")[0]


def _prose(module: Any) -> str:
    return _markdown(inspect.cleandoc(module.__doc__ or ""))


def _markdown(doc: str) -> str:
    """A docstring's ``code`` and ``::`` blocks, as Markdown."""
    lines: list[str] = []
    block = False
    for line in doc.split("\n"):
        if block and line and not line.startswith(" "):
            while lines[-1] == "":
                lines.pop()
            lines += ["```", ""]
            block = False
        if line.endswith("::"):
            lines += [line[:-1].replace("``", "`"), "", "```"]
            block = True
        elif block:
            if line or lines[-1] != "```":
                lines.append(line.removeprefix("    "))
        else:
            lines.append(line.replace("``", "`"))
    return "\n".join([*lines, "```"] if block else lines)


def _cell(doc: str) -> str:
    return re.sub(
        r"(?<![`\w])\$(\S+)", r"`$\1`", doc.replace("``", "`").replace("|", "\\|").replace("*", "\\*")
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(), encoding="utf-8")
