"""Projections of one input become one, with the weights one below the other.

::

    %q_a = linear(%x, $q_a_proj.weight)
    %kv_a = linear(%x, $kv_a_proj_with_mqa.weight)

    %x.proj = linear(%x, $q_a_proj_kv_a_proj_with_mqa.weight)
    %q_a, %kv_a = split(%x.proj) {sizes=[1536,576]}

x is read once, and one product fills a GPU better than two narrow ones. Each column is the dot product that
it was. The joint weight is made when a checkpoint is loaded, where the parts are then not kept.

A router's product stays apart: its scores choose experts, and another kernel's order of sums could turn a
tie. So does a weight that something else reads, which would be there twice, and a product whose columns are
no multiple of ``align``: behind it, or in its rows, nothing would start where copies of 16 bytes can."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir import Function, Module, Op, TensorType, Value
from moec.ir.graph import ENTRIES
from moec.ir.op import Param
from moec.ir.ops.hash_route import HashRoute
from moec.ir.ops.route import Route
from moec.ir.weights import WEIGHTS
from moec.passes.loading import bind, bound_outside, drop_dead_bindings, emit, fresh_name, loaded
from moec.passes.manager import Pass, register
from moec.passes.pattern import ANY, Match, P, Rules, maybe, param


@dataclass(frozen=True)
class Options:
    align: int = 8  # each product's columns are a multiple of it: 16 bytes of a 16-bit dtype

    def __post_init__(self) -> None:
        if self.align < 1:
            raise ValueError("align must be 1 or more")


def parameters(op: Op) -> list[Param]:
    """Its weight, and its bias where it has one."""
    return [v for v in op.operands[1:] if isinstance(v, Param)]


# Conditions: "" or why not.
def why_apart(module: Module, function: Function, op: Op, align: int) -> str:
    """Why a product can't be part of a joint one, whichever the others are."""
    y = op.results[0]
    for user in function.users(y):
        if isinstance(user, Route | HashRoute):
            return f"{y.text} are a router's scores"
    columns = op.tensor(op.operands[1], 2, scaled=True).shape[0]  # type: ignore[arg-type]
    if not isinstance(columns, int) or columns % align:
        return f"{y.text} has {columns} columns, no multiple of {align}"
    for p in parameters(op):
        if len(function.uses(p)) > 1:
            return f"{p.text} is used elsewhere too"
        for entry in ENTRIES if function.name in ENTRIES else ():
            if entry not in (WEIGHTS, function.name) and entry in module and p.name in module[entry].params:
                return f"{p.text} is used in @{entry} too"
        if why := bound_outside(module, function.name, p.name):
            return why
    return ""


def why_not_together(a: Op, b: Op) -> str:
    if a.attrs["acc"] != b.attrs["acc"]:
        return f"acc is {a.attrs['acc'] or 'not given'} and {b.attrs['acc'] or 'not given'}"
    have, want = [p.type for p in parameters(a)], [p.type for p in parameters(b)]
    if len(have) != len(want):
        return "only one has a bias"
    for x, y in zip(have, want, strict=True):
        if not (isinstance(x, TensorType) and isinstance(y, TensorType) and x.with_(shape=y.shape) == y):
            return f"weights are {x} and {y}"
        if x.scale and (not x.scale[0] or any(int(t.shape[0]) % x.scale[0] for t in (x, y))):
            return f"blocks of {x} and {y} don't end where the weights do"
    return ""


def in_halves(m: Match) -> str:
    split = m["split"]
    if (m.root.operands[0], m.root.operands[1]) != split.results:
        return f"gate and up are not the two parts of {m['x'].text} in order"
    if split.attrs["axis"] not in (-1, split.results[0].type.rank - 1):
        return f"{m['x'].text} is not cut along its columns"
    return ""


# Rewrites.
def whole(m: Match) -> Value:
    (h,) = m.create("swiglu", m["x"], **m.root.attrs).op.results
    return h


def joint_name(names: list[str]) -> str:
    """``attn.q_proj.weight``, ``attn.k_proj.weight`` -> ``attn.q_proj_k_proj.weight``."""
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts))
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    most = min(len(p) - head for p in parts)
    tail = next((i for i in range(most) if len({p[-1 - i] for p in parts}) > 1), most)
    middle = ["_".join(p[head : len(p) - tail]) for p in parts]
    end = parts[0][len(parts[0]) - tail :] if tail else []
    return ".".join([*parts[0][:head], "_".join(filter(None, middle)), *end])


@register
class MergeProjections(Pass):
    """Projections of one input -> one with their weights joined, and a split of its columns."""

    name = "merge-projections"
    Options = Options

    def run(self, module: Module) -> bool:
        rules: Rules = {
            "projections": (
                P.linear("x", param("w"), maybe("bias"), acc=ANY).named("first").where(self._has_others),
                self._join,
            ),  # linear(x, u), linear(x, v) -> split(linear(x, [u; v]))
            "swiglu-halves": (
                P.swiglu(P.split("x", sizes=ANY, axis=ANY).named("split"), "up", act=ANY, limit=ANY).where(
                    in_halves
                ),
                whole,
            ),  # g, u = split(x); swiglu(g, u) -> swiglu(x)
        }
        changed = self.apply(module, rules)
        if changed:
            drop_dead_bindings(module)
        return changed

    def _has_others(self, m: Match) -> str:
        """Whether anything can join ``first``; if so, ``m["all"]`` are they and it, in order."""
        first = m["first"]
        if why := why_apart(m.module, m.function, first, self.options.align):
            return why
        whole, reason = [first], ""
        for other in m.function.users(m["x"]):
            if other is first or other.name != "linear" or other.operands[0] is not m["x"]:
                continue
            if not isinstance(other.operands[1], Param) or len(parameters(other)) != _given(other):
                why = f"{other!r} has weights that are no parameters"
            else:
                why = why_apart(m.module, m.function, other, self.options.align)
                why = why or why_not_together(first, other)
            if why:
                reason = reason or why
            else:
                whole.append(other)
        m.captures["all"] = sorted(whole, key=m.function.position)
        return "" if len(whole) > 1 else reason or f"no other projection reads {m['x'].text}"

    def _join(self, m: Match) -> Value:
        products: list[Op] = m["all"]
        joint = [
            self._joint(m, [parameters(op)[i] for op in products])
            for i in range(len(parameters(products[0])))
        ]
        y = m.create("linear", m["x"], *joint, acc=m.root.attrs["acc"], out=f"{m['x'].name}.proj")
        sizes = tuple(int(op.results[0].type.shape[-1]) for op in products)  # type: ignore[union-attr]
        parts = m.create("split", y, sizes=sizes, out=[op.results[0].name for op in products])
        for op, part in zip(products, parts, strict=True):
            if op is not m.root:
                m.also(op, part)
        old = [p for op in products for p in parameters(op)]

        def tidy() -> None:
            for p in old:
                m.function.drop_param(p.name)

        m.later(tidy)
        return parts[products.index(m.root)]

    def _joint(self, m: Match, params: list[Param]) -> Param:
        module, holder = m.module, m.function
        name = joint_name([p.name for p in params])
        parts = [loaded(module, holder, p) for p in params]
        value = emit(module, holder, "concat", parts, {"axis": 0}, "joint").results[0]
        return bind(module, holder, value, fresh_name(module, holder, name))


def _given(op: Op) -> int:
    return sum(v is not None for v in op.operands[1:])
