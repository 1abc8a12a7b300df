"""``moec verify PACKAGE``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands import ui

if TYPE_CHECKING:
    from moec.check import Verdict


@click.command("verify")
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--weights", default="random:0", show_default=True, help="A folder of safetensors, or random:SEED."
)
@click.option("--tokens", type=int, help="Tokens of the longest prompt. Default: a page of the cache and 8.")
@click.option("--decode", type=int, help="Greedy steps at the end. Default: 4, or what fits the model.")
@click.option("--seed", default=0, show_default=True, help="Of the random prompts.")
@click.option("--tolerance", type=float, help="Largest relative error; by default 1e-4 in f32.")
@click.option("--allow-edited", is_flag=True, help="Also a package whose files were edited.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    package: Path,
    weights: str,
    tokens: int | None,
    decode: int | None,
    seed: int,
    tolerance: float | None,
    allow_edited: bool,
    as_json: bool,
) -> int:
    """Compare PACKAGE with the reference interpreter.

    The interpreter runs the naive IR, as it was before any pass. Both get the same weights and tokens:
    ragged prompts, a batch of prefill and decode at once, then steps through the paged cache. Exits with 1
    where they differ by more than the tolerance.
    """
    with ui.status("loading") as say:
        from moec.check import verify_package

        verdict = verify_package(
            package,
            weights,
            tokens=tokens,
            decode=decode,
            seed=seed,
            tolerance=tolerance,
            allow_edited=allow_edited,
            say=say,
        )
    if as_json:
        rows = [{key: _finite(value) for key, value in asdict(row).items()} for row in verdict.rows]
        ui.emit_json(asdict(verdict) | {"rows": rows, "ok": verdict.ok})
        return 0 if verdict.ok else 1
    errors = _by_value(verdict)
    phases = list(dict.fromkeys(phase for of in errors.values() for phase in of))
    ui.table(
        f"{package}: generated code against the reference interpreter, {verdict.judged} error over tokens",
        ["value", *phases, ""],
        [
            [value, *(f"{of[p]:.1e}" if p in of else "" for p in phases), _mark(max(of.values()), verdict)]
            for value, of in errors.items()
        ],
        right=range(1, 1 + len(phases)),
    )
    click.echo(_result(verdict))
    return 0 if verdict.ok else 1


def _by_value(verdict: Verdict) -> dict[str, dict[str, float]]:
    """For each value the error that counts in each phase; of the decode steps the largest."""
    found: dict[str, dict[str, float]] = {}
    for row in verdict.rows:
        phase, _, value = row.value.rpartition(": ")
        phase = "decode" if phase.startswith("decode") else phase or "error"
        error = math.inf if row.nan else row.worst if verdict.judged == "worst" else row.median
        of = found.setdefault(value, {})
        of[phase] = max(error, of.get(phase, 0.0))
    return found


def _finite(value: Any) -> Any:
    """JSON has no infinity: null."""
    return None if value == math.inf else value


def _mark(error: float, verdict: Verdict) -> str:
    return "ok" if error <= verdict.tolerance else "DIFFERS"


def _result(verdict: Verdict) -> str:
    tokens = f"{verdict.same_tokens} of {verdict.tokens} greedy tokens the same" if verdict.tokens else ""
    first = next((r.value for r in verdict.rows if not r.ok), None)
    nan = next((r.value for r in verdict.rows if r.nan), None)
    if nan is not None:
        head = f"DIFFERENT: the reference is not a number, first in {nan}"
    elif first is None:
        head = f"{'equal' if verdict.ok else 'DIFFERENT'} within {verdict.tolerance:.0e}"
    else:
        head = f"DIFFERENT: more than {verdict.tolerance:.0e}, first in {first}"
    return "; ".join(filter(None, (head, tokens)))
