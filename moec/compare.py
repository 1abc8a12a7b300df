"""Models side by side: weights, arithmetic, cache and the floor of decoding, by the cost model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moec import codegen, models, passes
from moec.codegen.package import caches
from moec.config import BuildOptions
from moec.costs import entries
from moec.driver import pipeline_of
from moec.errors import BadOption
from moec.ir import Module, read_module
from moec.ir.cost import active_parameters, parameter_bytes, parameters
from moec.ir.devices import Device
from moec.ir.roofline import Costs, Price
from moec.ir.routing import Routing
from moec.ir.sizes import complete
from moec.ir.types import DTYPES


def compared(
    spec: str,
    device: Device,
    routing: Routing,
    *,
    context: int,
    batch: int,
    dtype: str | None = None,
    fp8: bool = False,
) -> dict[str, Any]:
    """The figures of one model, decoding ``batch`` sequences of ``context`` entries each on ``device``.

    weights, weights_active             elements, embedding and head counted; of the experts a token's own
    weights_bytes                       as the model computes with them
    flops_per_token                     of one sequence's next token, at that context
    cache_elements_per_token[_layer]    and cache_bytes_per_token[_layer]: what one token keeps
    cache_bytes                         what one sequence of ``context`` tokens keeps
    decode                              a step's FLOPs, bytes, launches and seconds: its floor

    Raises BadOption for what isn't a whole model, or has no room for the context.
    """
    name, naive, optimised, most = _modules(spec, device.name, dtype, fp8)
    if "step" not in naive or "head" not in naive:
        raise BadOption(f"{spec} is a part of a model: it has no step and head to compare")
    if most is not None and context > most:
        raise BadOption(f"context is {context}, but {name} has {most} positions")
    whole = ("step", "head")
    one = _step(optimised, device, routing, context, 1)
    kept = caches(naive)
    elements = {c["name"]: math.prod(c["entry"]) for c in kept}
    total = sum(elements[c["name"]] * len(c["layers"]) for c in kept)
    nbytes = sum(elements[c["name"]] * len(c["layers"]) * _bytes(c["dtype"]) for c in kept)
    layers = len({layer for c in kept for layer in c["layers"]})
    floor = _step(optimised, device, routing, context, batch)
    return {
        "name": name,
        "weights": parameters(naive, *whole),
        "weights_active": active_parameters(naive, *whole),
        "weights_bytes": parameter_bytes(optimised, *whole),
        "flops_per_token": one.flops,
        "cache_elements_per_token_layer": total / max(layers, 1),
        "cache_elements_per_token": total,
        "cache_bytes_per_token_layer": nbytes / max(layers, 1),
        "cache_bytes_per_token": nbytes,
        "cache_bytes": nbytes * context,
        "decode": {
            "flops": floor.flops,
            "bytes": floor.bytes,
            "launches": floor.launches,
            "seconds": floor.seconds,
        },
    }


def _modules(spec: str, target: str, dtype: str | None, fp8: bool) -> tuple[str, Module, Module, int | None]:
    """Name, naive and optimised IR of a spec or a package, and the longest sequence that it takes."""
    if (Path(spec) / "manifest.json").is_file():
        from moec.runtime.package import read_manifest

        if dtype is not None or fp8:
            raise BadOption(f"--dtype and --fp8 are for a spec: {spec} is built")
        manifest = read_manifest(Path(spec))
        dumps = sorted((Path(spec) / "ir").glob("*.moec"))
        most: int | None = manifest["max_positions"]
        return manifest["name"], read_module(dumps[0]), read_module(dumps[-1]), most
    model = models.resolve(spec)
    if dtype is not None:
        model = model.with_dtype(dtype)
    naive = models.lower(model)
    naive.target = codegen.target(target).name
    optimised = naive.clone()
    options = BuildOptions(target=naive.target, fp8=fp8)
    passes.PassManager(pipeline_of(options)).run(optimised)
    return model.name, naive, optimised, model.max_positions


def _step(module: Module, device: Device, routing: Routing, context: int, batch: int) -> Price:
    """One new token for each of ``batch`` sequences, and its logits."""
    sizes = complete({"N": batch, "B": batch, "context": context}, module)
    costs = Costs(module, device, sizes, routing)
    total = Price()
    for entry in entries(module, sizes):
        total += costs.function(entry)
    return total


def _bytes(dtype: str) -> float:
    return DTYPES[dtype].bits / 8
