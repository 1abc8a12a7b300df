"""``moec opt FILE -p PASSES``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands import ui
from moec.errors import BadOption, OutputExists, OutputUnwritable, nearest

if TYPE_CHECKING:
    from moec.ir import Module
    from moec.passes import Instrument, Oracle, Pass, PassRun


@click.command("opt")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-p", "--passes", "text", default="", help="The pipeline, as 'canonicalise,expert-grouping{x=1}'."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write to this file instead of stdout.")
@click.option("--plain", is_flag=True, help="Without costs, source lines and the rules that made an op.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option(
    "--print-after",
    "after",
    multiple=True,
    metavar="changed|all|PASS",
    help="Print the IR, on stderr, after passes that changed it, after all, or after this one.",
)
@click.option("--dump", type=click.Path(path_type=Path), help="Folder for the IR before and after.")
@click.option("--events", type=click.Path(path_type=Path), help="File for a JSON row of each rule's firing.")
@click.option("--time", "timed", is_flag=True, help="What each pass took and did, on stderr.")
@click.option("--oracle", is_flag=True, help="Interpret before and after each pass on random inputs.")
@click.option("--weights", default="random:0", help="The oracle's: a folder of safetensors, or random:SEED.")
@click.option("--tolerance", type=float, help="Stop at a pass that changes an output by more (relative).")
def command(
    file: Path,
    text: str,
    out: Path | None,
    plain: bool,
    force: bool,
    after: tuple[str, ...],
    dump: Path | None,
    events: Path | None,
    timed: bool,
    oracle: bool,
    weights: str,
    tolerance: float | None,
) -> None:
    """Read the IR in FILE (- for stdin), run passes over it and print the result.

    The IR is verified before the first pass and after each.
    """
    import moec.codegen  # noqa: F401
    from moec.ir import parse_module, print_module, read_module
    from moec.passes import Dump, Events, PassManager, parse_pipeline

    if out is not None and out.exists() and not force:
        raise OutputExists(f"{out} exists; --force replaces it")
    if tolerance is not None and not oracle:
        raise click.UsageError("--tolerance is the oracle's: give --oracle too")
    passes = parse_pipeline(text)
    instruments: list[Instrument] = [] if dump is None else [Dump(dump)]
    if events is not None:
        instruments.append(Events(events))
    if after:
        instruments.append(_printer(after, passes, plain))
    module = parse_module(_stdin(), "<stdin>") if str(file) == "-" else read_module(file)
    judge = None
    if oracle:
        judge = _oracle(module, weights, tolerance)
        instruments.append(judge)
    runs = PassManager(passes, instruments).run(module)
    if timed:
        _times(runs)
    if judge is not None:
        _errors(judge)
    printed = print_module(module, derived=not plain)
    if out is None:
        click.echo(printed, nl=False)
        return
    try:
        out.write_text(printed, encoding="utf-8")
    except OSError as error:
        raise OutputUnwritable(f"can't write {out}: {error.strerror}") from None


def _stdin() -> str:
    from moec.errors import ParseError, SourceLoc

    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise ParseError("can't read the IR: it is no text", loc=SourceLoc("<stdin>", 0)) from None


def _printer(after: tuple[str, ...], passes: list[Pass], plain: bool) -> Instrument:
    from moec.ir import print_module
    from moec.passes import Instrument

    names = {p.name for p in passes}
    for which in after:
        if which not in ("all", "changed") and which not in names:
            hint = nearest(which, [*names, "all", "changed"])
            raise BadOption(f"--print-after={which}: the pipeline has no such pass{hint}")

    class Printer(Instrument):
        def after(self, run: PassRun, module: Module) -> None:
            if "all" in after or run.ran.name in after or ("changed" in after and run.changed):
                what = "" if run.changed else ", which changed nothing"
                click.echo(f"; after pass {run.number}, {run.ran}{what}", err=True)
                click.echo(print_module(module, derived=not plain), err=True)

    return Printer()


def _oracle(module: Module, weights: str, tolerance: float | None) -> Oracle:
    from moec import trial
    from moec.passes import Oracle

    return Oracle(trial.inputs_for(module), trial.weights_for(module, weights), tolerance)


def _times(runs: list[PassRun]) -> None:
    rows: list[list[Any]] = [
        [
            run.number,
            run.ran,
            f"{run.seconds * 1e3:.1f} ms",
            f"{run.ops_before} -> {run.ops_after}",
            ", ".join(f"{name} {count}" for name, count in run.fired.items()) or "-",
        ]
        for run in runs
    ]
    ui.table("", ["", "pass", "time", "ops", "rules that fired"], rows, right=[2], err=True)


def _errors(oracle: Oracle) -> None:
    rows: list[list[Any]] = []
    for row in oracle.rows:
        worst = max(row["outputs"].items(), key=lambda pair: pair[1], default=("", 0.0))
        rows.append([row["pass"], worst[0], f"{worst[1]:.1e}", f"{row['sqnr']:.0f} dB"])
    columns = ["pass", "output that changed most", "relative error", "SQNR"]
    ui.table("", columns, rows, right=[2, 3], err=True)
