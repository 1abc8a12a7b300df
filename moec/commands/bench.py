"""``moec bench PACKAGE``."""

from __future__ import annotations

from pathlib import Path

import click

from moec.commands import ui
from moec.commands.run import load


@click.command("bench")
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--weights", default="random:0", show_default=True, help="A folder of safetensors, or random:SEED."
)
@click.option("--prefill", type=int, help="Tokens of each prompt. Default: 512, or what fits the model.")
@click.option("--decode", type=int, help="Steps after it. Default: 32, or what fits the model.")
@click.option("--batch", default=1, show_default=True, help="Sequences at once.")
@click.option("--repeats", default=5, show_default=True, help="Runs whose median counts.")
@click.option("--allow-edited", is_flag=True, help="Also a package whose files were edited.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    package: Path,
    weights: str,
    prefill: int | None,
    decode: int | None,
    batch: int,
    repeats: int,
    allow_edited: bool,
    as_json: bool,
) -> None:
    """Time prefill and decode of PACKAGE: medians over several runs."""
    model = load(package, weights, allow_edited)
    from moec.runtime.bench import bench

    if decode is None:
        room = model.max_positions
        decode = max(1, min(32, room // 2 if prefill is None else room - prefill))
    if prefill is None:
        prefill = max(1, min(512, model.max_positions - decode))
    with ui.bar("runs") as progress:
        found = bench(model, prefill, decode, batch, repeats, progress)
    if as_json:
        ui.emit_json(found)
        return
    rows = [
        [
            "prefill",
            f"{batch} × {prefill}",
            f"{found['prefill_s'] * 1e3:.2f}",
            f"{found['prefill_tokens_per_s']:,.0f}",
        ],
        ["decode", f"{batch} × 1", f"{found['decode_s'] * 1e3:.2f}", f"{found['decode_tokens_per_s']:,.0f}"],
    ]
    what = f"{found['model']} for {found['target']}, {found['dtype']}, {found['threads']} threads"
    title = f"{what}: medians of {repeats}"
    ui.table(title, ["phase", "tokens", "ms", "tokens/s"], rows, right=(1, 2, 3))
