"""``moec build SPEC``."""

from __future__ import annotations

import time
from pathlib import Path
from textwrap import wrap
from typing import Any

import click

from moec.commands import ui
from moec.config import BuildOptions
from moec.errors import BadOption


@click.command("build")
@click.argument("spec")
@click.option("--target", help="What to compile for; see `moec list targets`. Default: cpu.")
@click.option("-o", "--out", type=click.Path(), help="The package's folder. Default: build/NAME.")
@click.option("--dtype", help="f32, bf16 or f16; the model's own by default.")
@click.option("-O", "opt_level", type=int, help="Optimisation level 0 to 3. Default: 2.")
@click.option("-p", "--passes", help="This pipeline instead, as 'canonicalise,expert-grouping'.")
@click.option("--stop-after", help="End the pipeline after this pass: its name (the last of it) or number.")
@click.option("--resume", type=click.Path(), help="Go on from this dump of SPEC, edited or not.")
@click.option("--fp8", is_flag=True, help="Products in fp8, by the recipe of DeepSeek-V3.")
@click.option("--fp8-recipe", help="--fp8 by another recipe, as per-row or 'deepseek-v3.1{skip=[o_proj]}'.")
@click.option(
    "--tuning", help="A file of `moec tune`'s, or none. Default: this device's, where there is one."
)
@click.option("--kernels", help="Whose kernels go first, wherever one can: cuda, gluon, triton or torch.")
@click.option("--batch-invariant", is_flag=True, help="A token's bits never depend on what is beside it.")
@click.option("--layers", help="Only the first N layers, or layers A-B.")
@click.option("--cache", help="Folder of compiled kernels, kept between builds. Default: ~/.cache/moec.")
@click.option("--weights", type=click.Path(path_type=Path), help="A folder of safetensors to check now.")
@click.option("--force", is_flag=True, help="Replace an existing package.")
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
def command(
    spec: str,
    out: str | None,
    weights: Path | None,
    as_json: bool,
    force: bool,
    fp8: bool,
    fp8_recipe: str | None,
    batch_invariant: bool,
    **given: Any,
) -> None:
    """Compile SPEC into a package.

    SPEC is a preset (`moec list models`), a Hugging Face folder or its config.json, or a model of your own as
    FILE.py:NAME.
    """
    if fp8_recipe is not None and not fp8_recipe.strip():
        raise BadOption("--fp8-recipe is empty; --fp8 alone takes the default recipe")
    options = BuildOptions.from_environment(
        **given,
        force=force or None,
        fp8=fp8_recipe or fp8 or None,
        batch_invariant=batch_invariant or None,
    )
    start = time.perf_counter()
    with ui.status(f"building {spec}") as say:
        from moec.driver import build

        built = build(spec, out=out, options=options, weights=weights, progress=say)
    seconds = time.perf_counter() - start
    if as_json:
        ui.emit_json({"package": str(built.path), "seconds": round(seconds, 3), "manifest": built.manifest})
    else:
        report(built, seconds)


# How a report calls the families of kernels that emit ops for GPUs.
FAMILIES = {"triton": "Triton", "gluon": "Gluon", "cuda": "CUDA", "torch": "still PyTorch"}


def report(built: Any, seconds: float) -> None:
    """What was built, in a few lines."""
    manifest = built.manifest
    click.echo(
        f"{manifest['name']} for {manifest['target']}, {manifest['dtype']}: {built.path}  ({seconds:.1f} s)"
    )
    for label, value in facts(manifest):
        for i, line in enumerate(wrap(value, 94)):
            click.echo(f"  {'' if i else label:<13} {line}")
    dumps = [f.stem for f in built.ir_files]
    between = f", {len(dumps) - 2} more" if len(dumps) > 2 else ""
    click.echo(f"  {'IR':<13} ir/: {dumps[0]}" + (f"{between}, {dumps[-1]}" if len(dumps) > 1 else ""))
    kernels = sum(f.parent.name == "kernels" and f.name != "__init__.py" for f in built.sources)
    click.echo(f"  {'sources':<13} model.py, weights.py" + (f", {kernels} kernel files" if kernels else ""))


def facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Figures of a package that its manifest gives."""
    from moec.runtime.cache import CacheSpec

    count = size = 0
    bits = {"f64": 64, "f32": 32, "bf16": 16, "f16": 16}
    for entry in manifest["parameters"]:
        elements = 1
        for axis in (*entry["shape"], *(last - first + 1 for first, last in entry["ranges"])):
            elements *= axis
        if entry.get("view"):
            continue
        count += elements
        size += elements * bits.get(entry["dtype"], 8) // 8
    found = [("parameters", f"{human(count)} ({human(size)}B)")]
    for cache in map(CacheSpec.of, manifest["caches"]):
        entry = " × ".join(map(str, cache.entry))
        total = f"{cache.bytes_per_token:,} bytes a token over all layers"
        what = {"u8": "bytes", "f8e4m3": "elements in fp8"}.get(cache.dtype, "elements")
        found.append(("KV cache", f"{entry} {what} a token and layer, {total}"))
    if plan := manifest["memory_plan"]:
        for entry in (e for e in ("step", "forward") if e in plan["entries"]):
            at = ", ".join(f"{k}={v}" for k, v in plan["at"].items())
            found.append(("step memory", f"{human(plan['entries'][entry]['bytes'])}B at most, for {at}"))
    if manifest["device"] == "cuda":
        emitted = manifest["emitted_by"]
        found += [
            (label, ", ".join(emitted.get(family, [])) or "none")
            for family, label in FAMILIES.items()
            if family != "gluon" or family in emitted
        ]
    return found + schedules(manifest)


def schedules(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """How schedules were picked, where it wasn't by the model and by M."""
    found = []
    if tuning := manifest.get("tuning"):
        used = "; ".join(f"{', '.join(p['ops'])} of {p['problem']}" for p in tuning["used"])
        found.append(("tuned", f"{tuning['file']} of {tuning['device']}: {used or 'none of these products'}"))
    if invariant := manifest.get("batch_invariant"):
        found.append(
            ("invariant", f"but for {', '.join(invariant['not'])}" if invariant["not"] else "all of it")
        )
        for product in invariant["cost"]:
            rows, worst = max(product["times"], key=lambda pair: pair[1])
            what = f"{', '.join(product['ops'])} of {product['problem']}: {product['schedule']}"
            found.append(
                ("", f"{what}, by the model up to {worst:.2f} times as long, at {rows:g} rows an expert")
            )
        if unknown := invariant["unknown"]:
            what = f"{', '.join(unknown)}: Gluon's kernels, by name"
            found.append(("", f"{what}, in tiles of 128 rows for any number; what that costs no model says"))
    return found


def human(value: float) -> str:
    """Three digits with a decimal prefix."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "K")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.0f} "
