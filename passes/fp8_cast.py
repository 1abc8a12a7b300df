"""Linear products in fp8: weights quantised when they are loaded, activations as they come.

::

    %y = linear(%x, $proj.weight)
    %d = grouped_linear(%xp, $experts.w13, %off)

    %x.q = quant(%x) {block=1x128}
    %y = linear(%x.q, $proj.weight.q)
    %xp.q = gather_rows(%x.q, %slot)
    %d = grouped_linear(%xp.q, $experts.w13.q, %off)

A recipe says which products and which blocks (``fp8_recipes``). All products of one x share its ``quant``,
and rows are quantised before they are gathered. A native fp8 checkpoint's weights are taken as they are
stored, in its blocks whatever the recipe's, with no second rounding (``fp8_weights``). Where its scales are
powers of two (``scale_fmt=ue8m0`` of ``scaled``), so are those of what is multiplied by them, unless the
recipe names a format.

What stays as it is, whatever the recipe: the embedding, the head, the router's product (its scores choose
experts), a product of a single column (a gate), norms, softmax and attention. Of a native checkpoint also the
weights that it stores plainly, unless ``plain=cast``.

With ``kv`` the KV cache is kept in 8 bits too (``fp8_cache``).

Not exact: every value is rounded to 3 bits of mantissa. For values that are normally distributed the results
keep about 28 dB or more of signal to noise."""

from __future__ import annotations

import warnings

from moec.ir import DType, Module, Value
from moec.ir.devices import GPUS
from moec.ir.op import Param
from moec.ir.ops.hash_route import HashRoute
from moec.ir.ops.moe import GatherGroupedLinear, GroupedLinearCombine
from moec.ir.ops.route import Route
from moec.ir.types import bf16, f16, f32, parse_block
from moec.ir.weights import bindings, weights_name
from moec.passes.cleanup import drop_dead_ops
from moec.passes.fp8_cache import cast_caches
from moec.passes.fp8_recipes import STORED, Options, Skips, without_fp8
from moec.passes.fp8_weights import Quantiser, all_native, is_native, stored_formats
from moec.passes.loading import (
    bind,
    bound_outside,
    drop_dead_bindings,
    fresh_name,
    loaded,
)
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Rules, maybe, param

DTYPES = (f32, bf16, f16)


# Conditions: "" or why not.
def floats(m: Match) -> str:
    x, w = m["x"].type, m["w"].type
    if x.scale or w.scale:
        return f"{(m['x'] if x.scale else m['w']).text} has scales already"
    return "" if x.dtype in DTYPES else f"{m['x'].text} is {x.dtype}, none of {', '.join(map(str, DTYPES))}"


def no_router(m: Match) -> str:
    """Scores may be cast on their way to the router."""
    todo = [m.root.results[0]]
    while todo:
        value = todo.pop()
        for user in m.function.users(value):
            if isinstance(user, Route | HashRoute) and user.operands[0] is value:
                return f"{value.text} are a router's scores"
            if user.name == "cast":
                todo += user.results
    return ""


def no_head(m: Match) -> str:
    return "the head stays as it is" if m.function.name == "head" else ""


def no_gate(m: Match) -> str:
    return f"{m.root.results[0].text} is one column, a gate" if m["w"].type.shape[0] == 1 else ""


def rows_have_scales(m: Match) -> str:
    block = m.root.attrs["block"]
    return "" if len(block) == 2 and block[0] <= 1 else "rows share scales: gathered ones would share others"


# Rewrites.
def quantise_first(m: Match) -> Value:
    """The gather of quantised rows; the quant is that of all who want it so."""
    x = quantised(m, m["x"], m.root.attrs["block"], m.root.attrs["scale"])
    (rows,) = m.create("gather_rows", x, m["slot"], per_row=m["gather"].attrs["per_row"]).op.results
    return rows


def quantised(m: Match, x: Value, block: tuple[int, ...], scale: str) -> Value:
    """x with scales: by the op that is there already, or a new one."""
    for user in m.function.users(x):
        if user.name == "quant" and (user.attrs["block"], user.attrs["scale"]) == (block, scale):
            return user.results[0]
    q: Value = m.create("quant", x, block=block, scale=scale, out=f"{x.name}.q")
    return q


GATHER: Rules = {
    "gather": (
        P.quant(P.gather_rows("x", "slot", per_row=ANY).once().named("gather"), block=ANY, scale=ANY).where(
            rows_have_scales
        ),
        quantise_first,
    ),  # quant(gather_rows(x)) -> gather_rows(quant(x))
}


@register
class FP8Cast(Pass):
    """Linear products in fp8 with block scales, by a recipe; native fp8 checkpoints as they are."""

    name = "fp8-cast"
    Options = Options

    def run(self, module: Module) -> bool:
        self.recipe = self.options.chosen
        self._skips = Skips(module, self.recipe.skip)
        self._skips.check()
        stored = [op for f in module for op in f.ops_named("scaled")]
        self._native, self._formats = bool(stored), {op.attrs["scale_fmt"] for op in stored}
        if instead := without_fp8(module.target, self.recipe):
            warnings.warn(instead, stacklevel=2)
        gpu = GPUS.get(module.target)
        self._lacking = "" if gpu is None or gpu.fp8 else f"{gpu.name} ({gpu.stands_for})"
        rules = {name: rule for op in self.recipe.ops for name, rule in self._rules(op).items()}
        changed = self.apply(module, rules)
        if changed:
            drop_dead_bindings(module)
            drop_dead_ops(module)
        changed = self.apply(module, GATHER) or changed
        return cast_caches(module, self.recipe, self.log) or changed

    def _rules(self, op: str) -> Rules:
        if op == "linear":
            product = P.linear("x", param("w"), maybe("bias"), acc=ANY).where(self._has_fp8)
            product = product.where(floats).where(no_head).where(no_router).where(no_gate)
            return {
                "linear": (product.where(self._not_kept), self._cast),
            }  # linear(x, w) -> linear(quant(x), w.q)
        if op == "head_linear":
            heads = P.head_linear("x", param("w"), transposed=ANY).where(floats).where(self._not_kept)
            return {
                "heads": (
                    heads,
                    lambda m: m.create("head_linear", m["x"], self._weight(m, m["w"]), **m.root.attrs),
                ),
            }  # head_linear(x, w) -> head_linear(x, w.q)
        experts = P.grouped_linear("x", param("w"), "off", maybe("slot"), to=ANY)
        fused = P.gather_grouped_linear(
            "x", param("w"), "slot", "off", **dict.fromkeys(GatherGroupedLinear.attr_specs, ANY)
        )
        summed = P.grouped_linear_combine(
            "x", param("w"), "off", "slot", "weights", maybe("plus"), rows=ANY, to=ANY
        )
        return {
            "experts": (
                experts.where(self._has_fp8).where(floats).where(self._not_kept),
                self._cast,
            ),  # grouped_linear(x, w) -> grouped_linear(quant(x), w.q)
            "gathered": (
                fused.where(self._has_fp8).where(floats).where(self._not_kept),
                self._cast,
            ),  # gather_grouped_linear(x, w) -> gather_grouped_linear(quant(x), w.q)
            "summed": (
                summed.where(self._has_fp8).where(floats).where(self._not_kept),
                self._cast,
            ),  # grouped_linear_combine(x, w) -> grouped_linear_combine(quant(x), w.q)
        }

    def _has_fp8(self, m: Match) -> str:
        return f"{self._lacking} multiplies no fp8" if self._lacking else ""

    def _not_kept(self, m: Match) -> str:
        w = m["w"]
        value = self._loaded(m, w)
        if pattern := self._skips.covers(m.function, w, value):
            return f"skip={pattern} keeps {w.text}"
        if why := bound_outside(m.module, m.function.name, w.name):
            return why
        if self._native and self.recipe.plain == "keep" and (value is None or not all_native(value)):
            part = " in part" if is_native(value) else ""
            return f"the checkpoint, else in fp8, stores {w.text}{part} plainly"
        return ""

    @staticmethod
    def _loaded(m: Match, w: Param) -> Value | None:
        """What is bound to ``w``, None where it's the checkpoint's tensor; without writing anything."""
        load = m.module.functions.get(weights_name(m.function.name))
        bound = bindings(load).get(w.name) if load is not None else None
        return None if bound is None else bound.x

    def _cast(self, m: Match) -> Value:
        """The same product of quantised operands."""
        root, recipe = m.root, self.recipe
        x = quantised(m, m["x"], parse_block(recipe.activations), self._format(m, m["w"]))
        w = self._weight(m, m["w"])
        attrs = dict(root.attrs)
        key = "acc" if root.name == "linear" else "to"
        if isinstance(root, GroupedLinearCombine):
            attrs["rows"] = _said(root.product_type().dtype)
        elif attrs.get("quant") is None:
            attrs[key] = _said(root.tensor(root.results[0]).dtype)
        (y,) = m.create(root.name, x, w, *root.operands[2:], **attrs).op.results
        return y

    def _format(self, m: Match, w: Param) -> str:
        """Of the scales of ``w``, where they are made here, and of what it is multiplied by."""
        if self.recipe.scale != STORED:
            return self.recipe.scale
        value = self._loaded(m, w)
        formats = stored_formats(value) if value is not None and is_native(value) else self._formats
        return "ue8m0" if formats == {"ue8m0"} else "fp32"

    def _weight(self, m: Match, w: Param) -> Param:
        """The scaled parameter in place of ``w``."""
        module, holder = m.module, m.function
        writer = Quantiser(module, holder, parse_block(self.recipe.weights), self._format(m, w))
        value = writer.scaled(loaded(module, holder, w))
        return bind(module, holder, value, fresh_name(module, holder, f"{w.name}.q"))


def _said(dtype: DType) -> DType | None:
    """As an attribute: bf16 is what a product of scaled operands gives anyway."""
    return None if dtype == bf16 else dtype
