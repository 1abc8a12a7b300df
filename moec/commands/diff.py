"""``moec diff A B``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moec.commands import ui

if TYPE_CHECKING:
    from moec.ir import Module
    from moec.ir.diff import Change, FunctionDiff, ModuleDiff
    from moec.passes.firings import Prices

SIGNS = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow")}


@click.command("diff")
@click.argument("what", nargs=-1, required=True)
@click.option("--pass", "which", help="Of packages: the IR after this pass. Default: the last.")
@click.option("--function", "functions", multiple=True, help="Only this function; may be repeated.")
@click.option("--at", "at", help="Sizes for the costs, as T=4096,S=8192. Default: the symbols' bounds.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 where they differ, as git diff does.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    what: tuple[str, ...],
    which: str | None,
    functions: tuple[str, ...],
    at: str | None,
    exit_code: bool,
    as_json: bool,
) -> int:
    """Compare two pieces of IR by value name: A B, or PACKAGE and two of its passes.

    \b
    moec diff build/a build/b                     two packages' last dumps
    moec diff build/a naive expert-grouping       two dumps of one package
    moec diff edited.moec build/a --pass 2        a file and a dump
    """
    from moec.ir.diff import diff_modules
    from moec.passes.firings import Prices

    a, b = _two(what, which)
    for name in functions:
        if name.removeprefix("@") not in b:
            a[name.removeprefix("@")]  # raises, with the names that are there
    found = diff_modules(a, b)
    if functions:
        wanted = {name.removeprefix("@") for name in functions}
        found.header, found.functions = [], [f for f in found.functions if f.name in wanted]
    prices = Prices(a, _sizes(at, a)), Prices(b, _sizes(at, b))
    if as_json:
        ui.emit_json(_json(found, prices))
    elif found:
        for line in _lines(found, prices):
            click.echo(line)
    return 1 if exit_code and found else 0


def _two(what: tuple[str, ...], which: str | None) -> tuple[Module, Module]:
    from moec.commands.show import ir_of

    if len(what) == 3:
        if which is not None:
            raise click.UsageError("PACKAGE and two of its passes leave nothing for --pass to choose")
        return ir_of(what[0], what[1], None, None), ir_of(what[0], what[2], None, None)
    if len(what) != 2:
        raise click.UsageError("two pieces of IR are compared: A B, or PACKAGE PASS PASS")
    from pathlib import Path

    from moec.dumps import is_package

    a, b = (ir_of(w, which if is_package(Path(w)) else None, None, None) for w in what)
    if which is not None and not any(is_package(Path(w)) for w in what):
        raise click.UsageError("--pass picks a package's dump, and neither is a package")
    return a, b


def _sizes(at: str | None, module: Module) -> dict[str, int] | None:
    from moec.ir.sizes import complete, parse_sizes

    return None if at is None else complete(parse_sizes(at, module), module)


def _json(found: ModuleDiff, prices: tuple[Prices, Prices]) -> dict[str, Any]:
    return {
        "header": [c.as_dict() for c in found.header],
        "sizes": prices[1].sizes,
        "functions": [
            {
                "name": f.name,
                "kind": f.kind,
                "delta": _delta(f.name, f.changes, prices),
                "changes": [c.as_dict() | {"delta": _delta(f.name, [c], prices)} for c in f.changes],
            }
            for f in found.functions
        ],
    }


def _delta(function: str, changes: list[Change], prices: tuple[Prices, Prices]) -> dict[str, Any]:
    """What ``changes`` cost more or less in one run of their function."""
    from moec.passes.firings import Delta

    total = Delta()
    inside = [p.costs_in(function) for p in prices]
    for change in changes:
        before, after = change.ops
        if before is not None:
            total -= Delta(1, prices[0].of(before, inside[0]))
        if after is not None:
            total += Delta(1, prices[1].of(after, inside[1]))
    return total.as_dict()


def _lines(found: ModuleDiff, prices: tuple[Prices, Prices]) -> list[str]:
    lines = [click.style(f"module {d}", bold=True) for c in found.header for d in c.details]
    for f in found.functions:
        lines += _function_lines(f, prices)
    return lines


def _function_lines(f: FunctionDiff, prices: tuple[Prices, Prices]) -> list[str]:
    sign, colour = SIGNS[f.kind]
    note = "" if f.kind == "changed" else f"  {f.kind}"
    costs = _costs(_delta(f.name, f.changes, prices))
    lines = ["", click.style(f"{sign} func @{f.name}{note}", fg=colour, bold=True) + costs]
    for change in f.changes:
        sign, colour = SIGNS[change.kind]
        costs = _costs(_delta(f.name, [change], prices) | {"ops": 0}) if any(change.ops) else ""
        if change.kind == "changed":
            lines.append(click.style(f"  {sign} {change.what}", fg=colour) + costs)
            lines += [_detail(d) for d in change.details]
        else:
            lines.append(click.style(f"  {sign} {change.before or change.after}", fg=colour) + costs)
    return lines


def _detail(text: str) -> str:
    """A changed detail; an op that became another is shown by its two lines."""
    return "      " + click.style(text, fg={"-": "red", "+": "green"}.get(text[0]))


def _costs(delta: dict[str, Any]) -> str:
    """``  [-2 launches, -2.95GB, -990 µs]``; nothing where nothing changes."""
    from moec.ir.cost import short

    def signed(value: float, unit: str) -> str:
        return ("-" if value < 0 else "+") + short(abs(value), unit)

    parts = [f"{delta[key]:+d} {key}" for key in ("ops", "launches") if delta[key]]
    parts += [signed(delta[key], unit) for key, unit in (("bytes", "B"), ("flops", "F")) if delta[key]]
    if abs(delta["us"]) >= 0.05:
        parts.append(f"{delta['us']:+,.1f} µs")
    return click.style(f"  [{', '.join(parts)}]", dim=True) if parts else ""
