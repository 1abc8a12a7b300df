"""``moec opt FILE -p PASSES``."""

from __future__ import annotations

from pathlib import Path

import click

from moec.errors import OutputExists, OutputUnwritable


@click.command("opt")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-p", "--passes", "text", default="", help="The pipeline, as 'canonicalise,expert-grouping{x=1}'."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write to this file instead of stdout.")
@click.option("--plain", is_flag=True, help="Without costs, source lines and the rules that made an op.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(file: Path, text: str, out: Path | None, plain: bool, force: bool) -> None:
    """Read the IR in FILE, verify it, run passes over it and print the result."""
    import moec.codegen  # noqa: F401
    from moec.ir import print_module, read_module
    from moec.passes import PassManager, parse_pipeline

    if out is not None and out.exists() and not force:
        raise OutputExists(f"{out} exists; --force replaces it")
    passes = parse_pipeline(text)
    module = read_module(file)
    PassManager(passes).run(module)
    printed = print_module(module, derived=not plain)
    if out is None:
        click.echo(printed, nl=False)
        return
    try:
        out.write_text(printed, encoding="utf-8")
    except OSError as error:
        raise OutputUnwritable(f"can't write {out}: {error.strerror}") from None
