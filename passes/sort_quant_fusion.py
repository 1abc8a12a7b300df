"""What the experts read is quantised beside the sort by expert: two ops without a tie become one.

::

    %w, %id, %slot, %off = route_sort(%logits) {k=8, score=sigmoid}
    %x.q = quant(%x) {block=1x128}
    %h = gather_grouped_linear(%x.q, $experts.w13.q, %slot, %off) {per_row=8}

    %w, %id, %slot, %off, %x.q = route_sort_and_quant(%logits, _, %x) {k=8, quant=1x128, score=sigmoid}
    %h = gather_grouped_linear(%x.q, $experts.w13.q, %slot, %off) {per_row=8}

So with ``local_sort`` and ``sort_by_expert``. They fit into one launch: a routed layer whose x no norm
quantises (``norm-fusion`` comes first) is three with the two products. Right bit for bit.

Where x depends on the sort, or the router on the quantised rows, the one has to wait for the other: they stay
apart."""

from __future__ import annotations

from typing import Any

from moec.ir import Module, Op, Value
from moec.ir.devices import GPUS
from moec.ir.op import OpResult
from moec.ir.ops.moe import GatherGroupedLinear
from moec.ir.ops.route import Route
from moec.ir.types import bf16, f16, f32, format_block
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Refusal, Rules

BLOCK = (1, 128)  # what the kernels do
DTYPES = (bf16, f16, f32)


# Conditions: "" or why not.
def multiplies_fp8(m: Match) -> str:
    gpu = GPUS.get(m.module.target)
    return "" if gpu is None or gpu.fp8 else f"{gpu.name} has no kernel for it: it multiplies no fp8"


def feeds_a_product_of_quantised_rows(m: Match) -> str:
    product = _product(m)
    if product is None:
        return f"no product gathers its rows by {m.root.results[-2].text}"
    x = product.operands[0]
    if not isinstance(x, OpResult) or x.op.name != "quant":
        return f"{_text(x)} is not the result of quant"
    return ""


def rows_of_its_kind(m: Match) -> str:
    rows, tokens = _first(_quant(m)), _first(m.root)
    block = _quant(m).attrs["block"]
    if block != BLOCK:
        return f"blocks are {format_block(block)}: the kernels do {format_block(BLOCK)}"
    if rows.dtype not in DTYPES:
        return f"the rows are {rows.dtype}: the kernels take {', '.join(map(str, DTYPES))}"
    if rows.shape[0] != tokens.shape[0]:
        return f"{rows.shape[0]} rows are quantised, {tokens.shape[0]} tokens sorted"
    return ""


def independent(m: Match) -> str:
    quant = _quant(m)
    if m.root in m.function.ancestors([quant]):
        return f"{quant.results[0].text} depends on {m.root.results[-2].text}"
    if quant in m.function.ancestors([m.root]):
        return f"{m.root.results[-2].text} depends on {quant.results[0].text}"
    return ""


def _product(m: Match) -> Op | None:
    """The first product that gathers rows by the root's slots."""
    slot, off = m.root.results[-2:]
    users = (op for op in m.function.users(slot) if isinstance(op, GatherGroupedLinear))
    return next((op for op in users if op.operands[2] is slot and op.operands[3] is off), None)


def _quant(m: Match) -> Op:
    """What makes the rows that the product gathers."""
    product = _product(m)
    if product is None or not isinstance(product.operands[0], OpResult):
        raise Refusal("nothing is quantised", m.root)
    return product.operands[0].op


def _first(op: Op) -> Any:
    """The type of the first operand: [rows, K], or [tokens, ...]."""
    return op.operands[0].type  # type: ignore[union-attr]


def _text(value: Value | None) -> str:
    return "nothing" if value is None else value.text


# The rewrite.
def beside(m: Match) -> list[Value]:
    """The results of the sort; whoever uses the quantised rows has those of the new op."""
    sort, quant = m.root, _quant(m)
    how = dict(sort.attrs) | {"quant": quant.attrs["block"], "quant_scale": quant.attrs["scale"]}
    out = [r.name for r in (*sort.results, *quant.results)]
    *sorted, q = m.create(f"{sort.name}_and_quant", *sort.operands, quant.operands[0], out=out, **how)
    m.also(quant, q)
    return sorted


SORTS = {
    "route-sort": P.route_sort(..., **dict.fromkeys(Route.attr_specs, ANY)),
    "local-sort": P.local_sort(..., first=ANY, experts=ANY),
    "sort": P.sort_by_expert(..., experts=ANY),
}
CONDITIONS = (multiplies_fp8, feeds_a_product_of_quantised_rows, rows_of_its_kind, independent)


def _rules() -> Rules:
    rules = {}
    for name, pattern in SORTS.items():
        for condition in CONDITIONS:
            pattern = pattern.where(condition)
        rules[name] = (pattern, beside)
    return rules


RULES = _rules()  # slot, off = sort(..); quant(x) -> slot, off, q = sort_and_quant(.., x)


@register
class SortQuantFusion(Pass):
    """The sort by expert and the quantisation of what the experts read, side by side in one launch."""

    name = "sort-quant-fusion"

    def run(self, module: Module) -> bool:
        return self.apply(module, RULES)
