"""``moec why-not RULE VALUE``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.commands import ui
from moec.errors import BadOption

if TYPE_CHECKING:
    from moec.passes.pattern import Miss
    from moec.why_not import Answer


@click.command("why-not")
@click.argument("rule")
@click.argument("value")
@click.option(
    "--in",
    "where",
    type=click.Path(path_type=Path),
    help="A package, or a .moec file. Default: the only package in build/.",
)
@click.option("--function", help="Only this function, where several have such a value.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(rule: str, value: str, where: Path | None, function: str | None, as_json: bool) -> None:
    """Say why RULE did not fire at the op that makes VALUE, or where it did.

    RULE is `pass.rule` or `rule` (`moec list rules` has them all), VALUE a name as in a dump, % or not. The
    match is tried again on the IR that the rule's pass was given, and the first condition that failed is
    printed: with the line of the model that made the op, and the line of the pass that asks for it.
    """
    from moec.why_not import why_not

    answers = why_not(rule, value, where if where is not None else _only_package(), function)
    if as_json:
        ui.emit_json([answer.as_dict() for answer in answers])
        return
    click.echo("\n\n".join("\n".join(_lines(answer)) for answer in answers))


def _only_package() -> Path:
    from moec.dumps import is_package

    build = Path("build")
    found = sorted(p for p in build.iterdir() if is_package(p)) if build.is_dir() else []
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise BadOption(f"--in says which package or file is asked; in build/ there is {names}")
    return found[0]


def _lines(answer: Answer) -> list[str]:
    asked = f"{answer.rule} at {answer.value} in @{answer.function} of {answer.source}"
    if answer.fired is not None:
        f = answer.fired
        d = f.delta.as_dict()
        saved = f"launches {d['launches']:+d}, bytes {d['bytes']:+,}, FLOPs {d['flops']:+,}, {d['us']:+,} µs"
        return [
            click.style(f"{asked}: {'fired' if answer.ran else 'would fire'}", fg="green"),
            f"  {', '.join(f.matched)} became {', '.join(f.out)}" + _at(answer.line),
            f"  gone: {', '.join(f.gone) or 'nothing'}",
            f"  made: {', '.join(f.made) or 'nothing'}",
            f"  a run: {saved}",
        ]
    lines = [
        click.style(f"{asked}: {'did not fire' if answer.ran else 'would not fire'}", fg="red"),
        f"  {answer.op}{_at(answer.line)}",
    ]
    if answer.instead is not None:
        lines.append(
            f"  {answer.instead.rule} took it: it became {', '.join(answer.instead.out) or 'nothing'}"
        )
    if answer.miss is not None:
        lines += _because(answer.miss, answer.op, "  because ")
    elif answer.near:
        lines.append(f"  the rule looks at {answer.root} ops ({answer.rule_line}); the nearest:")
        for miss in answer.near:
            lines += _because(miss, "", "  - ")
    elif answer.instead is None:
        there = (
            f"none of the {answer.elsewhere} here is refused" if answer.elsewhere else "there is none here"
        )
        lines.append(f"  the rule looks at {answer.root} ops ({answer.rule_line}), and {there}")
    return lines


def _because(miss: Miss, op: str, start: str) -> list[str]:
    about = "" if repr(miss.op) == op else f"at {miss.op!r}{_at(_short(miss))}: "
    asked = f"    asked by {miss.asked.short}" if miss.asked is not None else ""
    name = f", {miss.asked.where}" if miss.asked is not None and miss.asked.where.isidentifier() else ""
    return [f"{start}{about}{miss.reason}", *([asked + name] if asked else [])]


def _short(miss: Miss) -> str | None:
    return miss.loc.short if miss.loc is not None else None


def _at(line: str | None) -> str:
    return f"  [{line}]" if line else ""
