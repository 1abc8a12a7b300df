"""What the commands print with. rich is imported only when something is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def stdout(err: bool = False) -> Console:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, stderr=err)
    if not console.is_terminal:
        console.width = 1000  # a pipe has no width: don't fold tables
    return console


@contextmanager
def status(first: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while something runs; call what it gives with the next stage's name."""
    console = stderr()
    if not console.is_terminal:
        yield lambda line: None
        return
    with console.status(first) as spinner:
        yield lambda line: spinner.update(line)


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; call what it gives with (done, in all)."""
    console = stderr()
    if not console.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    right: Sequence[int] = (),
    err: bool = False,
) -> None:
    """A plain table on stdout, or stderr; ``right`` lists the columns of numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, show_edge=False
    )
    console = stdout(err)
    for number, name in enumerate(columns):
        whole = number == 0 or not console.is_terminal
        drawn.add_column(name, justify="right" if number in right else "left", no_wrap=whole)
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    console.print(drawn)


def emit_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))
