"""The tables of ``moec show --memory``."""

from __future__ import annotations

from typing import Any

import click

from moec.commands import ui
from moec.ir.cost import short


def show(module: Any, at: str | None, functions: tuple[str, ...], as_json: bool) -> None:
    """Prints what each entry holds at most, and by function what holds it from where to where.

    ``at`` gives sizes; without it the plan's own, a prefill as long as the module's bounds allow.
    """
    import moec.codegen  # noqa: F401 - provides the records
    from moec.ir.memory import plan_memory
    from moec.ir.records import kernel_records
    from moec.ir.sizes import complete, parse_sizes

    plan = plan_memory(module, kernel_records())
    sizes = dict(plan.sizes)
    if at is not None:
        sizes = {**complete(parse_sizes(at, module), module)}
    wanted = [module[name.removeprefix("@")].name for name in functions]
    data = report(plan, sizes)
    if wanted:
        data["functions"] = {name: rows for name, rows in data["functions"].items() if name in wanted}
    if as_json:
        ui.emit_json(data)
        return
    click.echo(
        f"{module.name} at {', '.join(f'{k}={v}' for k, v in sizes.items())}, beside weights and caches"
    )
    for name, entry in data["entries"].items():
        where = " > ".join(f"@{p['function']} {p['op']}" for p in entry["where"])
        click.echo(f"@{name} holds {short(entry['bytes'], 'B')} at most, at {where}")
        click.echo(f"  {entry['peak']} bytes; in shared buffers {short(entry['buffers'], 'B')}")
    for name, rows in data["functions"].items():
        click.echo()
        cells = [_cells(row) for row in rows]
        columns = ["value", "type", "bytes", "from", "to", "buffer", "at the peak"]
        ui.table(f"@{name}", columns, cells, right=(2, 5))


def _cells(row: dict[str, Any]) -> list[str]:
    buffer = "" if row["buffer"] is None else str(row["buffer"])
    size, mark = short(row["bytes"], "B"), "*" if row["at_peak"] else ""
    return [row["value"], row["type"], size, row["from"], row["to"], buffer, mark]


def report(plan: Any, sizes: dict[str, float]) -> dict[str, Any]:
    """A plan as JSON can hold it. Sizes in bytes; ``from`` and ``to`` name the ops by their results."""
    numbers = plan.numbers(sizes)
    entries, peaks = {}, set()
    for entry in plan.entries:
        path = plan.peak_ops(entry, sizes)
        peaks |= {(p.function.name, i) for p, i in path}
        entries[entry] = {
            "bytes": plan.peak(entry, sizes),
            "peak": plan.formula(entry),
            "buffers": plan.arena(entry, sizes),
            "where": [
                {
                    "function": p.function.name,
                    "op": p.function.ops[i].users_label,
                    "workspace": numbers[p.workspace[i]],
                }
                for p, i in path
            ],
        }
    return {
        "module": plan.module.name,
        "at": sizes,
        "entries": entries,
        "functions": {
            name: [_row(held, p, numbers, [i for f, i in peaks if f == name]) for held in p.held]
            for name, p in reversed(plan.functions.items())
            if p.held
        },
    }


def _row(held: Any, plan: Any, numbers: Any, peaks: list[int]) -> dict[str, Any]:
    ops = plan.function.ops
    return {
        "value": held.value.text,
        "type": str(held.value.type),
        "bytes": numbers[held.size],
        "from": ops[held.first].name,
        "to": "return" if held.end >= len(ops) else ops[held.end - 1].users_label,
        "buffer": plan.buffers.get(held),
        "at_peak": any(held.at(i) for i in peaks),
    }
