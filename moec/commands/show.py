"""``moec show WHAT``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moec.dumps import find_dump, is_package
from moec.errors import BadOption, NotAPackage, nearest


@click.command("show")
@click.argument("what")
@click.option(
    "--pass", "which", help="The IR after this pass: its name or its dump's number. Default: the last."
)
@click.option("--function", "functions", multiple=True, help="Only this function; may be repeated.")
@click.option("--kernel", help="A generated kernel's source instead: its name, as in kernels/NAME.py.")
@click.option("--plain", is_flag=True, help="Without costs, source lines and the rules that made an op.")
@click.option(
    "-O", "opt_level", type=int, help="Of a spec: the IR after this level's passes. Default: naive."
)
@click.option(
    "--target", help="Of a spec with -O, and of --cost: the device. Default: the IR's own, else cpu."
)
@click.option("--fp8", is_flag=True, help="Of a spec with -O: products in fp8, as `moec build --fp8`.")
@click.option("--cost", "cost", is_flag=True, help="What each op takes instead, as formulas or with --at.")
@click.option("--memory", "memory", is_flag=True, help="What a step holds at most instead, and where.")
@click.option("--at", help="Of both: sizes, as 'T=4096,S=8192,B=1'; T new tokens, S cached, B sequences.")
@click.option("--routing", default="uniform", show_default=True, help="Of --cost: or zipf:S, or FILE.npy.")
@click.option("--figures", default="", help="Of --cost: other figures, as 'bandwidth=3.35e12,bf16=989e12'.")
@click.option("--tile", type=click.IntRange(1), help="Of --cost: rows a tile of an expert has.")
@click.option("--json", "as_json", is_flag=True, help="Of --cost and --memory: print as JSON.")
def command(
    what: str,
    which: str | None,
    functions: tuple[str, ...],
    kernel: str | None,
    plain: bool,
    opt_level: int | None,
    target: str | None,
    fp8: bool,
    cost: bool,
    memory: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Print IR, what it costs or what memory it needs.

    WHAT is a package, a .moec file, or a spec as `moec build` takes it (then the naive IR is shown).
    """
    path = Path(what)
    if kernel is not None:
        if which is not None or functions or cost or memory:
            raise click.UsageError(
                "--kernel shows a source file: --pass, --function, --cost, --memory don't go with it"
            )
        click.echo(_kernel(path, kernel), nl=False)
        return
    if not cost and (how["figures"] or how["tile"]):
        raise click.UsageError("--figures and --tile are for --cost")
    if cost == memory and (as_json or how["at"] is not None or cost):
        raise click.UsageError("--at and --json are for one of --cost and --memory")
    module = ir_of(what, which, opt_level, target, fp8)
    if memory:
        from moec.commands import memory as plans

        plans.show(module, how["at"], functions, as_json)
        return
    if cost:
        from moec.commands import cost as tables

        tables.show(module, target=target, functions=functions, as_json=as_json, **how)
        return
    from moec.ir import print_module
    from moec.ir.text import print_function

    if not functions:
        click.echo(print_module(module, derived=not plain), nl=False)
    for name in functions:
        click.echo(print_function(module[name.removeprefix("@")], module, derived=not plain))


def ir_of(what: str, which: str | None, opt_level: int | None, target: str | None, fp8: bool = False) -> Any:
    """The module of a package (its dump ``which``, the last by default), a .moec file or a spec."""
    path = Path(what)
    package = is_package(path)
    if which is not None and not package:
        raise BadOption(f"--pass picks one of a package's dumps, and {what} is no package")
    if opt_level is not None and (package or path.suffix == ".moec"):
        raise BadOption(f"-O is for a spec: the passes over {what} have run")
    if fp8 and opt_level is None:
        raise BadOption("--fp8 goes with -O: the naive IR has no quantised products")
    from moec.ir import read_module

    if package:
        dump, note = find_dump(path, which)
        if note:
            click.echo(f"note: {note}", err=True)
        return read_module(dump)
    if path.suffix == ".moec":
        return read_module(path)
    from moec import models

    if path.is_dir() and what not in models.PRESETS and not (path / "config.json").is_file():
        raise NotAPackage(f"{what} is a folder with no package and no config.json in it")
    module = models.lower(models.resolve(what))
    if opt_level is not None:
        from moec import codegen, driver, passes
        from moec.config import BuildOptions

        module.target = codegen.target(target or "cpu").name
        options = BuildOptions(target=module.target, opt_level=opt_level, fp8=fp8)
        passes.PassManager(driver.pipeline_of(options)).run(module)
    return module


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
