"""``moec verify PACKAGE``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moec.commands import ui


@click.command("verify")
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--weights", default="random:0", show_default=True, help="A folder of safetensors, or random:SEED."
)
@click.option("--tokens", default=24, show_default=True, help="Tokens of the longest prompt.")
@click.option("--decode", default=4, show_default=True, help="Greedy steps after the prefill.")
@click.option("--seed", default=0, show_default=True, help="Of the random prompts.")
@click.option("--tolerance", type=float, help="Largest relative error; by default 1e-4 in f32.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    package: Path, weights: str, tokens: int, decode: int, seed: int, tolerance: float | None, as_json: bool
) -> int:
    """Compare PACKAGE with the reference interpreter.

    The interpreter runs the naive IR, as it was before any pass. Both get the same weights and tokens: ragged prompts
    first, then steps through the paged cache. Exits with 1 where they differ by more than the tolerance.
    """
    with ui.status("loading") as say:
        from moec.check import verify_package

        verdict = verify_package(
            package, weights, tokens=tokens, decode=decode, seed=seed, tolerance=tolerance, say=say
        )
    if as_json:
        ui.emit_json(asdict(verdict) | {"ok": verdict.ok})
        return 0 if verdict.ok else 1
    ui.table(
        f"{package}: generated code against the reference interpreter",
        ["value", "shape", "worst error", "median error", ""],
        [
            [r.value, list(r.shape), f"{r.worst:.1e}", f"{r.median:.1e}", "ok" if r.ok else "DIFFERS"]
            for r in verdict.rows
        ],
        right=(2, 3),
    )
    tokens_line = (
        f", {verdict.same_tokens} of {verdict.tokens} greedy tokens the same" if verdict.tokens else ""
    )
    result = "equal" if verdict.ok else "DIFFERENT"
    click.echo(
        f"{result}: the {verdict.judged} error of each value is judged by {verdict.tolerance:.0e}{tokens_line}"
    )
    return 0 if verdict.ok else 1
