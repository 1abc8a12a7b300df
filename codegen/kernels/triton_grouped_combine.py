"""The experts' second product and the sum of each token's rows: one launch while tokens are few.

The rows' tiles are stored at the places of their slots. While tokens are few, each program counts at its
column tile once it has stored, and the last one sums all tokens' rows there: in the order of the choices, as
``combine`` does, so that the bits are the same whoever comes last. With many tokens that would leave the sum
to a few programs, while the others are gone: then the product's kernel is followed by combine's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moec.codegen.constants import ASSUMED
from moec.codegen.kernels import register
from moec.codegen.kernels.triton import TritonKernel, not_float, tensor
from moec.codegen.kernels.triton_grouped import (
    Sums,
    constants_of,
    forms_of,
    problem,
    product_type,
    reasons,
    rungs,
    scaled_reasons,
    shown,
)
from moec.codegen.kernels.triton_routing import combine_constants
from moec.codegen.ladders import Ladder, print_ladder
from moec.ir.devices import GPU, GPUS
from moec.ir.op import Op

Many = Callable[[Op, GPU, Ladder], dict[str, Any]]


def few_tokens(rungs: Ladder, sums: Sums, experts: int, device: GPU) -> int:
    """For up to so many tokens one launch is taken to be faster than two.

    The last program of a column tile waits for memory once for each step of tokens, of which it has up to 16
    rows on their way; a launch of its own does all of them at once. Warps with tasks of their own never sum.
    """
    steps = int((1 + device.launch_s / ASSUMED.latency) / math.ceil(sums.top_k / 16))
    few = 16
    for start, (below, s) in zip(_starts(rungs), rungs, strict=True):
        if s.form == "specialised":
            return min(few, max(0, math.ceil(start * experts / sums.top_k) - 1))
        limit = steps * (sums.step // s.block_n)
        last = math.ceil(below * experts / sums.top_k) - 1 if below < math.inf else limit  # of the rung
        few = max(few, min(limit, last))
        if limit <= last:
            break
    return few


def _starts(rungs: Ladder) -> list[float]:
    """The rows an expert from which on each rung holds."""
    return [0.0, *(below for below, _ in rungs[:-1])]


def constants(op: Op, device: GPU) -> dict[str, Any]:
    """The template's constants, with the variants of the op's schedules, or those picked for ``device``."""
    return combined_constants(op, device, rungs(op, device))


def combined_constants(op: Op, device: GPU, rungs: Ladder, many: Many = constants_of) -> dict[str, Any]:
    """The same for a ladder of schedules: (rows an expert below which, schedule).

    ``many`` are the constants of the product's kernels where combine's follows them.
    """
    weights, plus = op.operands[4:6]
    rows, y, experts = product_type(op), tensor(op.results[0]), tensor(op.operands[1]).shape[0]
    sums = Sums(tensor(weights).shape[1], plus is not None)
    few = few_tokens(rungs, sums, experts, device)
    least, most = (few + 1) * sums.top_k / experts, few * sums.top_k / experts
    # Rungs of which some number of tokens up to ``few`` makes use, and those of more.
    once = [
        (below, replace(s, persistent=False))
        for start, (below, s) in zip(_starts(rungs), rungs, strict=True)
        if few and start <= most
    ]
    once[-1:] = [(math.inf, s) for _, s in once[-1:]]
    twice = [(below, s) for below, s in rungs if below > least]
    product, summing = many(op, device, twice), forms_of(op, device, [s for _, s in once], sums)
    return (
        combine_constants(rows, None, weights, plus, y)
        | product
        | {
            "forms": summing + product["forms"],
            "few": few,
            "ladders": [("FEW", shown(once, sums=True))] * bool(few) + product["ladders"],
            "few_splits": any(form.flags.split for form in summing),
        }
    )


def combine_reasons(op: Op) -> list[str]:
    """Against the sum of tokens' rows."""
    floats = [tensor(v) for v in (*op.operands[4:6], op.results[0]) if v is not None]
    return not_float(*floats)


def _kernel(scaled: bool) -> TritonKernel:
    return TritonKernel(
        "grouped_linear_combine",
        "triton/grouped_linear_combine.py.jinja",
        constants,
        (lambda op: scaled_reasons(op) + combine_reasons(op))
        if scaled
        else (lambda op: reasons(op) + combine_reasons(op)),
        helpers=("triton/grouped_tile.py.jinja",),
        targets=tuple(name for name, device in GPUS.items() if device.fp8 or not scaled),
        ladder=lambda op, device: print_ladder(rungs(op, device)),
        problem=problem,
        name="triton.fp8_grouped_linear_combine" if scaled else "",
    )


register(_kernel(scaled=False), _kernel(scaled=True))
