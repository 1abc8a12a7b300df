"""``moec list models|targets|passes|rules|ops|kernels``."""

from __future__ import annotations

from typing import Any

import click

from moec.commands import kernels, ui
from moec.errors import BadOption

Rows = tuple[list[str], list[list[Any]]]


def _summary(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0].replace("``", "")


def _models() -> Rows:
    from moec.models import PRESETS

    return ["model", "family", "what it is"], [[p.name, p.family, p.summary] for p in PRESETS.values()]


def _targets() -> Rows:
    from moec.codegen import TARGETS

    return ["target", "device", "what it is"], [[t.name, t.device, t.describes] for t in TARGETS.values()]


def _passes() -> Rows:
    from moec.passes import PASSES

    # In a legal order: no pass runs after one of a higher phase.
    passes = sorted(PASSES.items(), key=lambda item: (item[1].phase, item[0]))
    return ["pass", "phase", "options", "what it does"], [
        [name, cls.phase, str(cls())[len(name) :] or "", _summary(cls)] for name, cls in passes
    ]


def _ops() -> Rows:
    from moec.ir import OPS

    rows = []
    for name, cls in sorted(OPS.items()):
        operands = ", ".join(
            f"{s.name}..." if s.variadic else f"{s.name}?" if s.optional else s.name
            for s in cls.operand_specs
        )
        attrs = ", ".join(k for k, s in cls.attr_specs.items() if not s.hidden)
        rows.append([name, operands, attrs, _summary(cls)])
    return ["op", "operands", "attributes", "what it does"], rows


def _rules() -> Rows:
    from moec.passes import PASSES
    from moec.why_not import rules_of

    rows = []
    for name, cls in sorted(PASSES.items()):
        for rule, (pattern, _) in rules_of(cls()).items():
            rows.append([f"{name}.{rule}", pattern.op_name, pattern.line.short if pattern.line else ""])
    return ["rule", "looks at", "written at"], rows


KINDS = {"models": _models, "targets": _targets, "passes": _passes, "rules": _rules, "ops": _ops}


def _tokens(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadOption(f"--tokens {text!r}: numbers and commas, as in 1,64,4096") from None


@click.command("list")
@click.argument("kind", type=click.Choice([*KINDS, "kernels"]))
@click.option("--target", default="sm_90a", show_default=True, help="Of kernels: what they run on.")
@click.option("--explain", "spec", help="Of kernels: which schedules this spec's get, and by which terms.")
@click.option("--tokens", default="1,16,64,256,1024,8192", show_default=True, help="Of --explain.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(kind: str, target: str, spec: str | None, tokens: str, as_json: bool) -> None:
    """List models, targets, passes, rules, ops or kernels."""
    if kind in KINDS:
        columns, rows = KINDS[kind]()
    elif spec is None:
        columns, rows = kernels.emitted(target)
    else:
        columns, rows = kernels.explained(spec, target, _tokens(tokens))
    if as_json:
        ui.emit_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        ui.table("", columns, rows)
