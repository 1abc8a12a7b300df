"""What kernels allocate beside their results, at most: by the name of their record.

What isn't in the table stays below ``wide_copies`` (functions) or needs nothing (expressions, Triton's). The
figures bound what tests/codegen measures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import sympy

from moec.ir.amount import NOTHING, Amount, bytes_as, bytes_of, total
from moec.ir.op import Op, Param
from moec.ir.ops.experts import parts_of
from moec.ir.types import f32, symbol

Workspace = Callable[[Op], Amount]


def nothing(op: Op) -> Amount:
    return NOTHING


def wide_copies(op: Op) -> Amount:
    """Of what flows in and out, all in fp32 and half as much again: what most functions stay below."""
    values = [v for v in (*op.operands, *op.results) if v is not None and not isinstance(v, Param)]
    return total(bytes_as(v.type, 32) for v in values) * 1.5


def with_weights(op: Op) -> Amount:
    """As ``wide_copies``, weights too: of products that are computed on widened operands."""
    return total(bytes_as(v.type, 32) for v in (*op.operands, *op.results) if v is not None) * 1.5


def times(operand: int, bits: int) -> Workspace:
    """So many bits for each element of one operand."""
    return lambda op: bytes_as(_type(op, operand), bits)


def _type(op: Op, operand: int) -> Any:
    value = op.operands[operand]
    if value is None:
        raise TypeError(f"{op!r} has no operand {operand}")
    return value.type


def _ids(op: Op) -> Any:
    """The type of the choices that a sort is of."""
    return op.id.type  # type: ignore[attr-defined]


def _linear(op: Op) -> Amount:
    """Copies in the dtype of the product, and the product before it's rounded."""
    types: list[Any] = [v.type for v in (*op.operands, *op.results) if v is not None]
    return NOTHING if len({t.dtype for t in types}) == 1 else _in_fp32(types)


def _in_fp32(types: Iterable[Any]) -> Amount:
    return total(bytes_as(t, 32) for t in types if t.dtype != f32)


def _rows(op: Op) -> Amount:
    """A copy with as many rows as oneDNN is let meet."""
    return bytes_of(_type(op, 0))


def _product(op: Op) -> Amount:
    """One expert's product before it is stored: it may have all rows."""
    return bytes_of(op.results[0].type)


def _by_slot(op: Op) -> Amount:
    """The products before they are summed."""
    return bytes_of(op.product_type())  # type: ignore[attr-defined]


def _summed(op: Op) -> Amount:
    """All products and one expert's, then below fp32 all of them widened, and the sums."""
    rows = op.product_type()  # type: ignore[attr-defined]
    return _by_slot(op) * 2 + _in_fp32(
        [rows, *(v.type for v in (*op.operands[5:], *op.results) if v is not None)]
    )


_SPLIT = re.compile(r"(?:<(\S+) rows: *)?[^;]* split(\d+)")


def _split(op: Op) -> Amount:
    """Where its schedule splits K: the sums of the parts, of as many rows as that rung of it is for."""
    w = _type(op, 1)
    experts = w.shape[0] if w.rank == 3 else 1
    rows = _type(op, 2).shape[0] if op.name == "gather_grouped_linear" else math.prod(_type(op, 0).shape[:-1])
    most = NOTHING
    for below, parts in _SPLIT.findall(op.annotations.get("schedule") or ""):
        held = sympy.Min(rows, math.ceil(float(below) * experts)) if below else rows
        most += Amount.of(held * w.shape[-2] * 4 * int(parts))
    return most


def _gathered(op: Op) -> Amount:
    """One expert's rows, a copy of them for oneDNN, and their product in fp32 with the activation's."""
    bits = _type(op, 0).dtype.bits
    _, rows, depth = _type(op, 1).shape
    return bytes_as(_type(op, 2), 64 + 2 * depth * bits + rows * (bits + 64))


def _sorted(op: Op) -> Amount:
    """Ids without strangers, sorted ids and their places in 64 bits; the experts' numbers."""
    return bytes_as(_ids(op), 128) + Amount.of(4 * (op.attrs["experts"] + 1))


def _counts(op: Op) -> Amount:
    """Each chunk's count of each bin."""
    bins = 32 << op.attrs["experts"].bit_length()  # in bits
    return bytes_as(_ids(op), bins) * (1 / 1024) + Amount.of(bins // 8)


def _counts_of_blocks(op: Op) -> Amount:
    """Each block's count of each expert; a block has at least 8 tokens."""
    return bytes_as(_type(op, 0), 32) * (1 / 8) + Amount.of(4 * _type(op, 0).shape[1])


def _places(op: Op) -> Amount:
    """Where the row of each slot lies."""
    return NOTHING if op.operands[1] is None else bytes_as(_type(op, 1), 32)


def _swiglu(op: Op) -> Amount:
    """In fp32 the activation is the result, multiplied in place; what is clamped is a copy."""
    in_place = _type(op, 0).dtype == f32 and op.attrs["limit"] is None
    return NOTHING if in_place else wide_copies(op)


def _paged(op: Op) -> Amount:
    """Beside ``wide_copies``: a mask, and of entries that don't lie together the scores and a copy in fp32.

    Scores are made of one sequence at a time, of as many rows at once as 64 MiB hold: two such lie side by
    side, and a third where there are more rows. Which entries lie together isn't known before a step.
    """
    heads, cache, entries = _type(op, 0).shape[1], _type(op, 1), symbol(op.attrs["rows"])
    pairs = _type(op, 0).shape[0] * entries
    scores = Amount.of(sympy.Min(2 * 4 * heads * pairs, 3 << 26))
    copies = 0 if cache.dtype == f32 else 5 if cache.quantised else 1
    widened = Amount.of(copies * 4 * math.prod(cache.elements) * entries)
    return wide_copies(op) + Amount.of(pairs) + scores + widened


def _read(op: Op) -> Amount:
    """Of a cache of 8 bits its entries as they are stored, and their numbers and scales in fp32."""
    if not _type(op, 0).quantised:
        return wide_copies(op)
    return bytes_as(op.results[0].type, 32) * 5


def _parts(op: Op) -> Amount:
    """Masks of rows, and numbers of rows in 64 bits."""
    return total(bytes_of(r.type) for r in op.results) * 3


def _between(op: Op) -> Amount:
    """What a router gives, the first products, and the second ones before they are summed."""
    route, up, down = parts_of(op)
    chosen = total(bytes_of(r.type) for r in route.results) if route is not None else NOTHING
    return chosen + bytes_of(up.results[0].type) + _by_slot(down)


def _one_by_one(op: Op) -> Amount:
    """The same, and beside it what PyTorch's functions of the parts need."""
    _, up, down = parts_of(op)
    scaled = with_weights(op) if _type(op, 0).scale else NOTHING
    return _between(op) + scaled + _gathered(up) + _summed(down) + wide_copies(op)


WORKSPACE: dict[str, Workspace] = {
    "torch.linear": _linear,
    "onednn.linear": _rows,
    "torch.prefix_sum": wide_copies,
    "torch.gather_rows": times(1, 128),
    "torch.expert_slots": times(0, 128),
    "torch.grouped_linear": _product,
    "onednn.grouped_linear": lambda op: _product(op) + _rows(op),
    "torch.gather_grouped_linear": _gathered,
    "onednn.gather_grouped_linear": _gathered,
    "torch.grouped_linear_combine": _summed,
    "onednn.grouped_linear_combine": lambda op: _summed(op) + _rows(op),
    "torch.emulated_fp8_grouped_linear_combine": lambda op: with_weights(op) + _summed(op),
    "torch.emulated_fp8_linear": with_weights,
    "torch.emulated_fp8_grouped_linear": with_weights,
    "torch.emulated_fp8_gather_grouped_linear": lambda op: with_weights(op) + _gathered(op),
    "torch.emulated_fp8_gather_grouped_linear_quant": lambda op: with_weights(op) + _gathered(op),
    "torch.gather_grouped_linear_quant": lambda op: wide_copies(op) + _gathered(op),
    "torch.experts": _one_by_one,
    "torch.routed_experts": _one_by_one,
    "torch.swiglu": _swiglu,
    "torch.route": times(0, 7 * 32),  # scores, and what is sorted by them
    "torch.sort_by_expert": _sorted,
    "torch.sort_by_expert_and_quant": lambda op: wide_copies(op) + _sorted(op),
    "torch.local_sort": lambda op: wide_copies(op) + _sorted(op),
    "torch.local_sort_and_quant": lambda op: wide_copies(op) + _sorted(op),
    "torch.cache_read": _read,
    "torch.paged_attention": _paged,
    "torch.latent_attention": _paged,
    "torch.split_batch": _parts,
    "torch.take_rows": nothing,
    "torch.merge_rows": nothing,
    "triton.sort_by_expert": _counts,
    "triton.sort_by_expert_and_quant": _counts,
    "triton.local_sort": _counts,
    "triton.local_sort_and_quant": _counts,
    "cuda.route_sort": _counts_of_blocks,
    "cuda.route_sort_and_quant": _counts_of_blocks,
    "triton.combine": _places,
    "triton.grouped_linear_combine": lambda op: _by_slot(op) + _split(op),
    "triton.fp8_grouped_linear_combine": lambda op: _by_slot(op) + _split(op),
    "triton.experts": _between,
    "triton.fp8_experts": _between,
    "triton.routed_experts": _between,
    "triton.fp8_routed_experts": _between,
    "triton.grouped_linear": _split,
    "triton.fp8_grouped_linear": _split,
    "triton.gather_grouped_linear": _split,
    "triton.fp8_gather_grouped_linear": _split,
    "triton.fp8_linear": _split,
    "gluon.grouped_linear_combine": lambda op: _by_slot(op) + _split(op),
    "gluon.grouped_linear": _split,
    "gluon.gather_grouped_linear": _split,
}
