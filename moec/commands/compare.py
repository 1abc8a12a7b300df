"""``moec compare SPEC SPEC...``."""

from __future__ import annotations

from typing import Any

import click

from moec.commands import ui
from moec.errors import BadOption


@click.command("compare")
@click.argument("specs", nargs=-1, required=True)
@click.option("--context", default=4096, show_default=True, help="Cached entries of each sequence.")
@click.option("--batch", default=1, show_default=True, help="Sequences that decode together.")
@click.option("--target", default="sm_90a", show_default=True, help="The device that decodes.")
@click.option("--dtype", help="f32, bf16 or f16; the models' own by default.")
@click.option("--fp8", is_flag=True, help="Products in fp8, as `moec build --fp8`.")
@click.option("--routing", default="uniform", show_default=True, help="Or zipf:S, or FILE.npy.")
@click.option("--figures", default="", help="Other figures of the device, as 'bandwidth=3.35e12'.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    specs: tuple[str, ...],
    context: int,
    batch: int,
    target: str,
    dtype: str | None,
    fp8: bool,
    routing: str,
    figures: str,
    as_json: bool,
) -> None:
    """Put models side by side: weights, FLOPs a token, cache, decode floor.

    Each SPEC is one as `moec build` takes it, or a package.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise BadOption(f"{name} is {value}; it must be at least 1")
    from moec import codegen
    from moec.compare import compared
    from moec.ir.devices import DEVICES, with_figures
    from moec.ir.routing import parse_routing

    device = with_figures(DEVICES[codegen.target(target).name], figures)
    assumed = parse_routing(routing)
    found = []
    with ui.status("comparing") as say:
        for spec in specs:
            say(spec)
            how: dict[str, Any] = {"context": context, "batch": batch, "dtype": dtype, "fp8": fp8}
            found.append(compared(spec, device, assumed, **how))
    if as_json:
        head = {"device": device.name, "context": context, "batch": batch, "routing": routing, "fp8": fp8}
        ui.emit_json({**head, "models": found})
        return
    click.echo(
        f"context {context}, batch {batch}, routing {routing}{', fp8' if fp8 else ''}; "
        f"{device.name}, {device.stands_for}, {device.bandwidth / 1e12:g} TB/s"
    )
    rows = [[label, *(show(model) for model in found)] for label, show in ROWS]
    ui.table("", ["", *(model["name"] for model in found)], rows, right=range(1, len(found) + 1))


def _billions(value: float) -> str:
    return f"{value / 1e9:.1f}B" if value >= 5e7 else f"{value / 1e6:.3g}M"


def _bytes(value: float) -> str:
    from moec.ir.cost import short

    return short(value, "B")


def _flops(value: float) -> str:
    from moec.ir.cost import short

    return short(value, "F")


ROWS: list[tuple[str, Any]] = [
    ("weights", lambda m: _billions(m["weights"])),
    ("of these active", lambda m: _billions(m["weights_active"])),
    ("share", lambda m: f"{m['weights_active'] / m['weights']:.1%}"),
    ("weights in bytes", lambda m: _bytes(m["weights_bytes"])),
    ("FLOPs a token", lambda m: _flops(m["flops_per_token"])),
    ("cache elements a token and layer", lambda m: f"{m['cache_elements_per_token_layer']:,.0f}"),
    ("cache elements a token", lambda m: f"{m['cache_elements_per_token']:,.0f}"),
    ("cache bytes a token and layer", lambda m: f"{m['cache_bytes_per_token_layer']:,.0f}"),
    ("cache bytes a token", lambda m: f"{m['cache_bytes_per_token']:,.0f}"),
    ("cache of one sequence", lambda m: _bytes(m["cache_bytes"])),
    ("a decode step moves", lambda m: _bytes(m["decode"]["bytes"])),
    ("a decode step computes", lambda m: _flops(m["decode"]["flops"])),
    ("a decode step launches", lambda m: f"{m['decode']['launches']:,}"),
    ("its floor, launches aside", lambda m: f"{m['decode']['seconds'] * 1e3:.2f} ms"),
]
