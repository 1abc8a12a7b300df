"""``moec tune PACKAGE``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands import ui
from moec.errors import BadOption

if TYPE_CHECKING:
    from moec.tune.session import Outcome


@click.command("tune")
@click.argument("package", type=click.Path(path_type=Path), required=False)
@click.option("--budget", default=120.0, show_default=True, help="Seconds in all.")
@click.option(
    "--tokens", help="Numbers of tokens, as 1,64,4096. Default: 1 to 4096, each four times the last."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="The file to write or add to. Default: where builds look."
)
@click.option("--cache", help="Folder of compiled kernels, kept between builds. Default: ~/.cache/moec.")
@click.option("--refit", type=click.Path(path_type=Path), help="Only fit the model to this file's figures.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(
    package: Path | None,
    budget: float,
    tokens: str | None,
    out: Path | None,
    cache: str | None,
    refit: Path | None,
    as_json: bool,
) -> None:
    """Measure schedules of PACKAGE's products on this GPU; later builds for it go by the fastest.

    PACKAGE is one that `moec build --target` made for the GPU that is here. What was measured is written
    after each step, so Ctrl-C loses nothing.
    """
    if (package is None) == (refit is None):
        raise click.UsageError("either a PACKAGE to measure, or --refit FILE")
    if refit is not None:
        _refit(refit, as_json)
        return
    if not 0 < budget < float("inf"):
        raise BadOption(f"--budget is {budget:g}: it must be a positive number of seconds")
    from moec.tune.session import TOKENS, Session

    counts = TOKENS if tokens is None else _tokens(tokens)
    session = Session(package or Path(), budget, counts, out, cache)
    written: list[Path] = []
    try:
        with ui.status("starting") as say:
            outcome = session.run(say, written.append)
    except BaseException:  # Ctrl-C among them
        if written:
            click.echo(f"what was measured is in {written[-1]}", err=True)
        raise
    _report(outcome, as_json)


def _refit(file: Path, as_json: bool) -> None:
    from moec.tune.refit import ENOUGH
    from moec.tune.session import refit

    found = refit(file)
    if found is None:
        raise BadOption(f"{file} has fewer than {ENOUGH} measurements: too few to fit the model to")
    if as_json:
        from dataclasses import asdict

        ui.emit_json(asdict(found))
    else:
        click.echo(f"{file}: {found}")


def _tokens(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise BadOption(f"--tokens {text!r}: positive numbers and commas, as in 1,64,4096")
    return counts


def _report(outcome: Outcome, as_json: bool) -> None:
    rows = [_row(one, point) for one in outcome.found for point in one.points]
    excluded = [
        (f"{one.product.op.name}, {point.tokens} tokens: {schedule.text}", why)
        for one in outcome.found
        for point in one.points
        for schedule, why in point.excluded.items()
    ]
    if as_json:
        fit = outcome.fit and outcome.fit.about()
        about = {"device": outcome.device, "file": outcome.file and str(outcome.file), "fit": fit}
        keys = ("product", "tokens", "rows", "measured", "analytic_us", "us", "speedup", "schedule")
        named = [dict(zip(keys, row, strict=True)) for row in rows]
        ui.emit_json(about | {"products": named, "excluded": dict(excluded), "notes": outcome.notes})
        return
    columns = [
        "product",
        "tokens",
        "rows an expert",
        "measured",
        "model's choice µs",
        "best µs",
        "times",
        "best",
    ]
    ui.table(f"on {outcome.device}", columns, [list(map(_cell, row)) for row in rows], right=range(1, 7))
    for what, why in excluded:
        click.echo(f"left out {what}: {why}")
    for note in outcome.notes:
        click.echo(f"left out {note}")
    if outcome.fit is not None:
        click.echo(str(outcome.fit))
    if outcome.file is None:
        click.echo("nothing was measured, nothing is written: a larger --budget, or see above", err=True)
    else:
        click.echo(f"written to {outcome.file}")


def _row(one: Any, point: Any) -> list[Any]:
    known, best = point.measured, point.best
    analytic = known.get(point.analytic)
    return [
        f"{one.product.op.name} {one.product.problem.text}",
        point.tokens,
        round(point.rows, 5),
        len(known),
        None if analytic is None else round(analytic * 1e6, 2),
        None if best is None else round(known[best] * 1e6, 2),
        point.speedup and round(point.speedup, 3),
        best.text if best else point.skipped or "no time was left",
    ]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
