"""The tables of ``moec show --cost``."""

from __future__ import annotations

from typing import Any

import click

from moec.commands import ui
from moec.errors import BadOption

RIGHT = (2, 3, 4, 5, 6)


def show(
    module: Any,
    at: str | None,
    routing: str,
    target: str | None,
    figures: str,
    tile: int | None,
    functions: tuple[str, ...],
    as_json: bool,
) -> None:
    """Prints what ``module`` costs: formulas without ``at``, else figures for those sizes."""
    from moec import codegen, costs
    from moec.ir.devices import DEVICES, with_figures
    from moec.ir.routing import parse_routing
    from moec.ir.sizes import complete, parse_sizes

    goal = codegen.target(target or module.target or "cpu")
    device = with_figures(DEVICES[goal.name], figures)
    assumed = parse_routing(routing)
    wanted = [module[name.removeprefix("@")].name for name in functions]
    if at is None:
        _formulas(module, wanted, as_json)
        return
    sizes = complete(parse_sizes(at, module), module)
    data = costs.report(costs.Costs(module, device, sizes, assumed), tile)
    if wanted:
        for name, entry in data["entries"].items():
            # Also as the entry has it for itself: @decode runs @decode.layer in place of @layer.
            own = {*wanted, *(f"{name}.{w}" for w in wanted)}
            entry["functions"] = [f for f in entry["functions"] if f["name"] in own]
        data["entries"] = {name: e for name, e in data["entries"].items() if e["functions"]}
        if not data["entries"]:
            raise BadOption(f"nothing that a step of these sizes runs is called {', '.join(wanted)}")
    if as_json:
        ui.emit_json(data)
    else:
        _tables(data, whole=not wanted)


def _formulas(module: Any, wanted: list[str], as_json: bool) -> None:
    from moec import costs
    from moec.ir.weights import WEIGHTS

    names = wanted or [f.name for f in module if f.name.split(".")[0] != WEIGHTS]
    found = {name: costs.formulas(module, name) for name in names}
    if as_json:
        ui.emit_json({name: [row.__dict__ for row in rows] for name, rows in found.items()})
        return
    for name, rows in found.items():
        cells = [[r.value, r.op, r.launches or "", r.flops, r.bytes] for r in rows]
        ui.table(f"@{name}", ["value", "op", "launches", "FLOPs", "bytes"], cells, right=(2,))
        click.echo()


def _tables(data: dict[str, Any], whole: bool) -> None:
    device = data["device"]
    rates = ", ".join(f"{dtype} {rate / 1e12:g}" for dtype, rate in device["matmul_flops"].items())
    click.echo(f"{data['module']} at {', '.join(f'{k}={v}' for k, v in data['at'].items())}")
    click.echo(
        f"{device['name']}, {device['stands_for']}: {device['bandwidth'] / 1e12:g} TB/s, TFLOP/s: {rates}"
    )
    for load in data["routers"]:
        click.echo(
            f"routing {data['routing']}: {load['active']:.1f} of {load['experts']} experts have rows, "
            f"{load['mean']:.1f} each, {load['most']:.1f} at most; "
            f"tiles of {load['tile']} rows: {load['tiles']:.0f}, {load['waste']:.0%} of them padding"
            + (f"; {load['shared']} more that every token takes" if load["shared"] else "")
        )
    click.echo()
    for entry in data["entries"].values():
        for function in entry["functions"]:
            _function(function)
    if whole:
        _totals(data)


def _function(function: dict[str, Any]) -> None:
    once = function["once"]["seconds"]
    rows = []
    for op in function["ops"]:
        if op["launches"]:
            label = f"{op['op']} @{op['callee']}" if "callee" in op else op["op"]
            rows.append([op["value"], label, *_cells(op, once), op.get("bound", ""), _family(op)])
    rows.append(["", "total", *_cells(function["once"], once), "", ""])
    runs = "" if function["runs"] == 1 else f", run {function['runs']} times"
    if function["working_runs"] < function["runs"] - 1e-6:
        runs += f", {function['working_runs']:.1f} times with rows"
    columns = [*COLUMNS, "bound by", "kernel"]
    if not any(row[-1] for row in rows):  # nothing has been selected yet
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    ui.table(f"@{function['name']}{runs}", columns, rows, right=RIGHT)
    click.echo()


def _family(op: dict[str, Any]) -> str:
    """Who emits the op: the family of its kernel's record."""
    family = (op.get("kernel") or "").partition(".")[0]
    known = {"torch": "PyTorch", "onednn": "PyTorch", "triton": "Triton", "gluon": "Gluon", "cuda": "CUDA"}
    return known.get(family, family)


def _totals(data: dict[str, Any]) -> None:
    rows: list[list[Any]] = []
    for name, entry in data["entries"].items():
        whole = entry["total"]["seconds"]
        for function in entry["functions"]:
            rows.append([f"@{function['name']}", function["runs"], *_cells(function["own"], whole)])
        rows.append([f"@{name} in all", "", *_cells(entry["total"], whole)])
    columns = ["function, its own ops", "runs", *COLUMNS[2:]]
    ui.table("", columns, rows, right=(1, *RIGHT))
    launches = sum(e["total"]["launches"] for e in data["entries"].values())
    each = data["device"]["launch_s"]
    click.echo(
        f"\n{launches} launches are counted beside: at {each * 1e6:g} µs {launches * each * 1e6:.0f} µs"
    )


COLUMNS = ["value", "op", "launches", "FLOPs", "bytes", "µs", "share"]


def _cells(priced: dict[str, Any], whole: float) -> list[str]:
    from moec.ir.cost import short

    share = priced["seconds"] / whole if whole else 0.0
    return [
        str(priced["launches"]),
        short(priced["flops"], "F") if priced["flops"] else "",
        short(priced["bytes"], "B"),
        micros(priced["seconds"]),
        f"{share:.1%}",
    ]


def micros(seconds: float) -> str:
    """µs to three digits, thousands whole."""
    value = seconds * 1e6
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"
