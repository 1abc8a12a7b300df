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
@click.option("--passes", is_flag=True, help="Instead: the error that each pass brought, value by value.")
@click.option("--top", default=20, show_default=True, help="Of --passes: how many values to show.")
@click.option("--allow-edited", is_flag=True, help="Also a package whose files were edited.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    package: Path,
    weights: str,
    tokens: int | None,
    decode: int | None,
    seed: int,
    tolerance: float | None,
    passes: bool,
    top: int,
    allow_edited: bool,
    as_json: bool,
) -> int:
    """Compare PACKAGE with the reference interpreter.

    The interpreter runs the naive IR, as it was before any pass. Both get the same weights and tokens:
    ragged prompts, a batch of prefill and decode at once, then steps through the paged cache. Exits with 1
    where they differ by more than the tolerance.

    In 16 or 8 bits it also runs the IR after the last pass, with which the package is compared token by
    token; with the naive IR it is by SQNR, since that rounds elsewhere. Both are given the package's choices
    of experts.

    --passes runs no generated code: it interprets the dumps one after the other.
    """
    if passes:
        return _passes(package, weights, seed, top, as_json)
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
    signals = _signals(verdict)
    ui.table(
        f"{package}: generated code against the reference interpreter, {verdict.judged} error over tokens",
        ["value", *phases, *(["SQNR to naive"] if signals and not verdict.exact else []), ""],
        [
            [
                value,
                *(f"{of[p]:.1e}" if p in of else "" for p in phases),
                *([_decibel(signals.get(value))] if signals and not verdict.exact else []),
                _mark(value, verdict),
            ]
            for value, of in errors.items()
        ],
        right=range(1, 1 + len(phases) + 1),
    )
    click.echo(_result(verdict))
    return 0 if verdict.ok else 1


def _passes(package: Path, weights: str, seed: int, top: int, as_json: bool) -> int:
    """A table of what each pass did to each value, outputs first, then the worst."""
    with ui.status("interpreting the dumps"):
        from moec.pass_errors import pass_errors
        from moec.runtime.package import read_manifest

        read_manifest(package)
        rows = pass_errors(package, weights, seed)
    if as_json:
        ui.emit_json([row.as_dict() for row in rows])
        return 0
    changed = [row for row in rows if row.error > 0]
    changed.sort(key=lambda row: (not row.output, -row.error, row.number))
    none = f"{len(rows) - len(changed)} of {len(rows)} rows have none"
    ui.table(
        f"{package}: the error that each pass brought ({none})",
        ["pass", "value", "relative error", "SQNR", "SQNR to naive"],
        [
            [f"{r.number} {r.passed}", r.value, f"{r.error:.1e}", _decibel(r.sqnr), _decibel(r.total)]
            for r in changed[:top]
        ],
        right=[2, 3, 4],
    )
    if len(changed) > top:
        click.echo(f"{len(changed) - top} more, none worse; --top {len(changed)} shows all")
    return 0


def _decibel(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return "exact" if value == math.inf else f"{value:.0f} dB"


def _by_value(verdict: Verdict) -> dict[str, dict[str, float]]:
    """For each value the error that counts in each phase; of the decode steps the largest."""
    found: dict[str, dict[str, float]] = {}
    for row in verdict.rows:
        phase, _, value = row.value.rpartition(": ")
        if phase.startswith("decode"):  # all steps together, @step's beside @decode's
            phase = "decode by @step" if phase.endswith(" by @step") else "decode"
        phase = phase or "error"
        error = math.inf if row.nan else row.worst if verdict.judged == "worst" else row.median
        of = found.setdefault(value, {})
        of[phase] = max(error, of.get(phase, 0.0))
    return found


def _finite(value: Any) -> Any:
    """JSON has no infinities: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _signals(verdict: Verdict) -> dict[str, float]:
    """For each value the lowest SQNR of all steps."""
    found: dict[str, float] = {}
    for row in verdict.rows:
        if row.sqnr is not None:
            value = row.value.rpartition(": ")[2]
            found[value] = min(row.sqnr, found.get(value, math.inf))
    return found


def _mark(value: str, verdict: Verdict) -> str:
    same = all(row.ok for row in verdict.rows if row.value.rpartition(": ")[2] == value)
    return "ok" if same else "DIFFERS"


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
    flips = f"{verdict.flipped} of {verdict.routed} choices of experts flipped" if verdict.routed else ""
    if verdict.wrong:
        flips += f", {verdict.wrong} of them by more than rounding explains"
        head = head if head.startswith("DIFF") else "DIFFERENT: wrong experts"
    return "; ".join(filter(None, (head, tokens, "" if verdict.exact else flips)))
