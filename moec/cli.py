"""The command line. Commands live in ``moec/commands``, one file each, and are imported when they are run."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from moec import __version__
from moec.errors import MoecError

# Name of the command, the module that holds it, and what `moec --help` says without importing it.
COMMANDS = {
    "build": ("build", "Compile a model spec into a package."),
    "list": ("list", "List models, targets, passes, rules, ops or kernels."),
    "show": ("show", "Print the IR of a spec or package, or a generated kernel."),
    "compare": ("compare", "Put models side by side: weights, FLOPs, cache, decode floor."),
    "opt": ("opt", "Read IR, run passes over it, print IR."),
    "diff": ("diff", "Compare two pieces of IR, value by value."),
    "why-not": ("why_not", "Say why a rule did not fire at a value."),
    "verify": ("verify", "Compare a package with the reference interpreter."),
    "run": ("run", "Continue a prompt."),
    "bench": ("bench", "Time prefill and decode of a package."),
    "tune": ("tune", "Measure schedules of a package on this GPU."),
}


class Commands(click.Group):
    """Imports a command only when it is asked for: --help needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command: click.Command = import_module(f"moec.commands.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # before click makes an error of it
            raise _ReaderGone from None


class _ReaderGone(Exception):
    """Whoever read the output has seen enough, as in `moec show x | head`."""


class _Signalled(BaseException):
    """Told to stop: raised where the program is, so that what was half-written is removed on the way out."""


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise _Signalled, once; what nohup ignores stays ignored."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return

    def handle(number: int, frame: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second one would end the cleaning up
        raise _Signalled(number)

    numbers = [n for n in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if n is not None]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moec")
def moec() -> None:
    """Compile Mixture-of-Experts transformers to readable kernels, and run them."""


def main(argv: list[str] | None = None) -> None:
    """Exit codes: 0, 1 a user's error, 2 usage, 70 a bug in moec, 128 + N after signal N."""
    gc.set_threshold(200_000)  # imports and IR make many objects and few cycles
    sys.exit(run(argv))


def run(argv: list[str] | None = None) -> int:
    try:
        with warnings.catch_warnings(), _signals_raise():
            warnings.showwarning = _warn  # type: ignore[assignment]
            result: Any = moec.main(args=argv, prog_name="moec", standalone_mode=False)
    except MoecError as error:
        click.echo(error, err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except _Signalled as error:
        number = signal.Signals(error.args[0])
        click.echo(f"stopped by {number.name}", err=True)
        return 128 + number
    except _ReaderGone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's flush at the end
        return 0
    except Exception as error:
        return _bug(error)
    return result if isinstance(result, int) else 0


def _warn(message: Warning | str, *_: Any) -> None:
    click.echo(f"warning: {message}", err=True)


def _bug(error: Exception) -> int:
    """What moec did not foresee: one line, and the trace in a file that a report can carry."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="moec-bug-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    click.echo(
        f"error[M0001] a bug in moec: {type(error).__name__}: {error}\n  the trace is in {file.name}",
        err=True,
    )
    return 70
