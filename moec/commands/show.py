"""``moec show WHAT``."""

from __future__ import annotations

from pathlib import Path

import click

from moec.errors import BadOption, NotAPackage, nearest


@click.command("show")
@click.argument("what")
@click.option(
    "--pass", "which", help="The IR after this pass: its name or its dump's number. Default: the last."
)
@click.option("--function", "functions", multiple=True, help="Only this function; may be repeated.")
@click.option("--kernel", help="A generated kernel's source instead: its name, as in kernels/NAME.py.")
@click.option("--plain", is_flag=True, help="Without costs, source lines and the rules that made an op.")
def command(
    what: str, which: str | None, functions: tuple[str, ...], kernel: str | None, plain: bool
) -> None:
    """Print IR.

    WHAT is a package, a .moec file, or a spec as `moec build` takes it (then the naive IR is shown).
    """
    path = Path(what)
    if kernel is not None:
        if which is not None or functions:
            raise click.UsageError("--kernel shows a source file: --pass and --function don't go with it")
        click.echo(_kernel(path, kernel), nl=False)
        return
    if which is not None and not (path / "manifest.json").is_file():
        raise BadOption(f"--pass picks one of a package's dumps, and {what} is no package")
    from moec.ir import print_module, read_module
    from moec.ir.text import print_function

    if (path / "manifest.json").is_file():
        module = read_module(_dump(path, which))
    elif path.suffix == ".moec":
        module = read_module(path)
    else:
        from moec import models

        if path.is_dir() and what not in models.PRESETS and not (path / "config.json").is_file():
            raise NotAPackage(f"{what} is a folder with no package and no config.json in it")
        module = models.lower(models.resolve(what))
    if not functions:
        click.echo(print_module(module, derived=not plain), nl=False)
    for name in functions:
        click.echo(print_function(module[name.removeprefix("@")], module, derived=not plain))


def _dump(package: Path, which: str | None) -> Path:
    """The dump after pass ``which``: by number (``2``, ``002``) or by name, the last of that name."""
    dumps = sorted((package / "ir").glob("*.moec"))
    if which is None:
        return dumps[-1]
    names = [d.stem.partition("_") for d in dumps]
    found = [
        d
        for d, (number, _, name) in zip(dumps, names, strict=True)
        if which == name or (which.isdigit() and int(which) == int(number))
    ]
    if not found:
        known = ", ".join(d.stem for d in dumps)
        raise BadOption(
            f"{package} has no dump {which!r}{nearest(which, [n for *_, n in names])}; there are {known}"
        )
    return found[-1]


def _kernel(package: Path, name: str) -> str:
    from moec.runtime.package import read_manifest

    read_manifest(package)
    files = {f.stem: f for f in sorted((package / "kernels").glob("*.py")) if f.stem != "__init__"}
    stem = name.removesuffix(".py")
    if stem not in files:
        raise BadOption(
            f"{package} has no kernel {name!r}{nearest(stem, files)}; there are {', '.join(files)}"
        )
    return files[stem].read_text(encoding="utf-8")
