"""The memory plan against brute force: peaks by adding up, buffers by looking at each pair."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadOption
from moec.ir import Module, Op, TensorType, parse_module
from moec.ir.amount import NOTHING, Amount, Sizes, bytes_of, largest
from moec.ir.graph import Function
from moec.ir.lifetimes import lifetimes, view_of
from moec.ir.memory import FunctionPlan, plan_memory, share_buffers, typical_sizes
from moec.ir.ops.control import Loop
from moec.ir.types import STATE_TYPES, symbol
from tests.strategies_ir import Case, cases

N, S = symbol("N"), symbol("S")


@dataclass
class Kernels:
    """Records of kernels that allocate ``share`` of their results beside these."""

    share: float = 0.0

    def annotations(self, op: Op, target: str) -> dict[str, str]:
        return {}

    def workspace(self, op: Op, target: str) -> Amount:
        return sum((bytes_of(r.type) for r in op.results), NOTHING) * self.share


def module(text: str) -> Module:
    return parse_module(f"moec.ir 1 module @tests target=cpu sym={{N<=64}}\n{text}")


CHAIN = """func @forward(%x: f32[N,4]) -> f32[N,4]
  %a = sigmoid(%x) : f32[N,4]
  %b, %c = split(%a) {sizes=[1,3]} : f32[N,1], f32[N,3]
  %d = sigmoid(%c) : f32[N,3]
  %e = concat(%b, %d) : f32[N,4]
  %f = sigmoid(%e) : f32[N,4]
  return %f
end"""


def spans(function: Function) -> dict[str, tuple[int, int]]:
    return {h.value.name: (h.first, h.last) for h in lifetimes(function)}


def test_a_view_keeps_what_it_looks_at() -> None:
    found = spans(module(CHAIN)["forward"])
    assert found == {"a": (0, 3), "d": (2, 3), "e": (3, 4), "f": (4, 5)}


SPLIT = "%a, %b = split(%x) {sizes=[2,2]} : f32[N,2], f32[N,2]"


@pytest.mark.parametrize(
    ("ops", "copies"),
    [
        (["%y = reshape(%x) {shape=[N,2,2]} : f32[N,2,2]"], False),
        ([SPLIT, "%y = reshape(%b) {shape=[2*N]} : f32[2*N]"], True),
        ([SPLIT, "%y = reshape(%b) {shape=[N,2,1]} : f32[N,2,1]"], False),
        ([SPLIT, "%y = broadcast(%b) {axis=1, size=3} : f32[N,3,2]"], False),
        (
            [
                SPLIT,
                "%c = broadcast(%b) {axis=0, size=3} : f32[3,N,2]",
                "%y = reshape(%c) {shape=[3*N,2]} : f32[3*N,2]",
            ],
            True,
        ),
        (
            [
                "%a = broadcast(%x) {axis=1, size=3} : f32[N,3,4]",
                "%y = reshape(%a) {shape=[N,12]} : f32[N,12]",
            ],
            True,
        ),
        (
            [
                "%a = broadcast(%x) {axis=0, size=3} : f32[3,N,4]",
                "%y = reshape(%a) {shape=[3,4*N]} : f32[3,4*N]",
            ],
            False,
        ),
        (["%y = cast(%x) {to=f32} : f32[N,4]"], False),
        (["%y = cast(%x) {to=f16} : f16[N,4]"], True),
    ],
)
def test_what_is_a_view_is_one_in_pytorch(ops: list[str], copies: bool) -> None:
    type = ops[-1].rpartition(" : ")[2]
    m = module("\n".join([f"func @forward(%x: f32[N,4]) -> {type}", *ops, "return %y", "end"]))
    assert bool(lifetimes(m["forward"])) == copies
    x = torch.zeros(5, 4)
    values: dict[Any, Any] = {m["forward"].args[0]: x}
    for op in m["forward"].ops:
        made = in_pytorch(op, values[op.operands[0]])
        values.update(zip(op.results, made, strict=True))
    y = values[m["forward"].outputs[0]]
    assert (y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()) == copies


def in_pytorch(op: Op, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the generated code makes of x."""
    if op.name == "split":
        return x.split(list(op.attrs["sizes"]), dim=-1)
    if op.name == "cast":
        return (x.to(op.attrs["to"].torch),)
    if op.name == "reshape":
        return (x.reshape([int(Amount.of(d).expr.subs({N: 5})) for d in op.attrs["shape"]]),)
    sizes = [-1] * (x.dim() + 1)
    sizes[op.attrs["axis"]] = op.attrs["size"]
    return (x.unsqueeze(op.attrs["axis"]).expand(sizes),)


# Brute force.
def bases(value: Any) -> Any:
    while hasattr(value, "op") and (seen := view_of(value.op)) is not None:
        value = seen
    return value


def brute_force(function: Function, sizes: dict[str, int], share: float) -> int:
    """The most bytes at any op: of each tensor that an op has made and that this or a later one reaches."""
    numbers, ops, most = Sizes(sizes), function.ops, 0
    made = [r for op in ops for r in op.results if isinstance(r.type, TensorType) and view_of(op) is None]
    for i, op in enumerate(ops):
        later = {bases(v) for o in ops[i:] for v in o.operands} | {bases(v) for v in function.outputs}
        held = [r for r in made if (ops.index(r.op) < i and r in later) or r.op is op]
        beside = sum((bytes_of(r.type) for r in op.results), NOTHING) * share
        most = max(most, sum(numbers[bytes_of(r.type)] for r in held) + numbers[beside])
    return most


def plain(case: Case) -> bool:
    """Whether brute force knows it all: no loops, no reshape that may copy, no sizes that ops define."""
    return not any(
        isinstance(op, Loop) or op.name in ("reshape", "expert_slots", "split_batch")
        for op in case.module["main"].ops
    )


@given(cases(most=9).filter(plain), st.integers(0, 9), st.integers(0, 99), st.sampled_from([0.0, 1.0, 2.5]))
def test_the_peak_is_that_of_brute_force(case: Case, n: int, s: int, share: float) -> None:
    function = case.module["main"]
    sizes = dict.fromkeys((str(v) for v in all_symbols(function)), s) | {"N": n}
    plan = plan_memory(case.module, Kernels(share))
    function_plan = plan.functions["main"]
    for held in function_plan.held:
        held.end = held.last + 1  # as if each went after its last use
    want = brute_force(function, sizes, share)
    assert Sizes(sizes).most(function_plan.peaks()) == want


def all_symbols(function: Function) -> set[Any]:
    values = [*function.args, *(r for op in function.ops for r in op.results)]
    types = [v.type for v in values if isinstance(v.type, TensorType)]
    return {s for t in types for d in t.shape if not isinstance(d, int) for s in d.free_symbols}


@given(cases(most=9))
def test_no_two_values_that_are_needed_at_once_share_a_buffer(case: Case) -> None:
    plan = plan_memory(case.module, Kernels()).functions["main"]
    assert plan.buffers.keys() == set(plan.held)
    for a, b in combinations(plan.held, 2):
        if plan.buffers[a] == plan.buffers[b]:
            assert a.last < b.first or b.last < a.first, f"{a.value} and {b.value}"
    state = {r for op in plan.function.ops for r in op.results if isinstance(r.type, STATE_TYPES)}
    assert not state & {v for h in plan.held for v in h.names}, "a cache is the caller's"
    assert not set(plan.function.args) & {v for h in plan.held for v in h.names}


def test_buffers_are_reused_best_fit() -> None:
    m = module(CHAIN)
    held = lifetimes(m["forward"])
    assert {h.value.name: n for h, n in share_buffers(held, Sizes({"N": 8})).items()} == {
        "a": 0,
        "d": 2,
        "e": 1,
        "f": 0,
    }


@given(cases(most=9))
def test_plans_are_deterministic(case: Case) -> None:
    first, again = (plan_memory(case.module, Kernels()).functions["main"] for _ in range(2))
    assert [first.buffers[h] for h in first.held] == [again.buffers[h] for h in again.held]
    names = [{i: [h.value.name for h in d] for i, d in p.drops.items()} for p in (first, again)]
    assert names[0] == names[1]


LOOP = """func @forward(%x: f32[N,4]) -> f32[N,4]
  %a = sigmoid(%x) : f32[N,4]
  %b = call @body({operand}) {{layers=0..{last}, scope=""}} : f32[N,4]
  %y = add(%b, {other}) : f32[N,4]
  return %y
end
func @body(%layer: index, %h: f32[N,4]) -> f32[N,4]
  %w = concat(%h, %h) : f32[N,8]
  %v, %u = split(%w) {{sizes=[4,4]}} : f32[N,4], f32[N,4]
  %o = add(%v, %u) : f32[N,4]
  return %o
end"""


@pytest.mark.parametrize(
    ("operand", "other", "last", "rows"),
    [
        ("%a", "%x", 0, 4 + 12),  # a; w and o in the body
        ("%a", "%x", 2, 4 + 12),  # each run's result takes the place of the one before
        ("%a", "%a", 2, 4 + 4 + 12),  # a stays: beside it the last run's result
        ("%a", "%a", 0, 4 + 12),
        ("%x", "%a", 2, 4 + 4 + 12),  # an argument is the caller's, the last run's result isn't
    ],
)
def test_a_loop_counts_its_body_once(operand: str, other: str, last: int, rows: int) -> None:
    m = module(LOOP.format(operand=operand, other=other, last=last))
    if operand == "%x":
        m["forward"].erase(m["forward"].ops[0]) if not m["forward"].uses(
            m["forward"].ops[0].results[0]
        ) else None
    plan = plan_memory(m, Kernels())
    assert plan.peak("forward", {"N": 10}) == rows * 4 * 10
    assert plan.formula("forward") == f"{4 * rows}*N"
    assert [p.function.name for p, _ in plan.peak_ops("forward")] == ["forward", "body"]


def test_a_body_that_hands_out_a_view_keeps_all_of_it() -> None:
    text = LOOP.format(operand="%a", other="%x", last=0).replace("return %o", "return %v")
    plan = plan_memory(module(text), Kernels())
    (b,) = (h for h in plan.functions["forward"].held if h.value.name == "b")
    assert b.size == Amount.of(32 * N)


def test_an_expert_may_get_every_slot() -> None:
    m = module("""func @forward(%x: f32[N,4], %id: i32[N,2], %e: index) -> f32[R,4]
  %slot = expert_slots(%id, %e) {rows=R} : i32[R]
  %rows = gather_rows(%x, %slot) {per_row=2} : f32[R,4]
  return %rows
end""")
    assert plan_memory(m, Kernels()).formula("forward") == f"{2 * 4 + 2 * 16}*N"


def test_sizes_that_are_missing_are_asked_for() -> None:
    plan = plan_memory(module(CHAIN), Kernels())
    with pytest.raises(BadOption, match="no number is given for N"):
        plan.peak("forward", {})


# Drops.
def emitted_peak(plan: FunctionPlan, sizes: Sizes) -> int:
    """What Python holds at most: each value until it is dropped, or else until the function returns."""
    dropped = {h: i for i, held in plan.drops.items() for h in held}
    return max(
        sum(sizes[h.size] for h in plan.held if h.first <= i < dropped.get(h, len(plan.workspace)))
        + sizes[plan.workspace[i]]
        for i in range(len(plan.workspace))
    )


@given(cases(most=12).filter(plain), st.sampled_from([0.0, 1.0]))
def test_what_is_dropped_is_dead_and_enough(case: Case, share: float) -> None:
    m = Module("tests", bounds=case.module.bounds)
    function = case.module["main"].clone()
    function.name = "forward"
    m.add(function)
    plan = plan_memory(m, Kernels(share))
    mine = plan.functions["forward"]
    for i, dropped in mine.drops.items():
        rest = mine.function.ops[i:]
        used = {v for op in rest for v in op.operands} | set(mine.function.outputs)
        assert not used & {v for h in dropped for v in h.names}
    if not mine.workspace:
        return
    for sizes in typical_sizes(m):
        whole = sizes | {s: 1 for s in map(str, all_symbols(mine.function)) if s not in sizes}
        ideal = brute_force(mine.function, whole, share)
        assert emitted_peak(mine, Sizes(whole)) == plan.peak("forward", whole)
        if whole == sizes:
            assert plan.peak("forward", sizes) <= 1.1 * ideal + ideal * len(mine.held) / 64


def test_nothing_is_dropped_where_that_would_not_lower_the_peak() -> None:
    def drops(text: str) -> list[list[str]]:
        plan = plan_memory(module(text), Kernels()).functions["forward"]
        return [[h.value.name for h in dropped] for dropped in plan.drops.values()]

    grown = CHAIN.replace("%f = sigmoid(%e) : f32[N,4]", "%f = concat(%e, %e, %e, %e) : f32[N,16]")
    assert drops(grown.replace("-> f32[N,4]", "-> f32[N,16]")) == [["a", "d"]]  # in the way of f
    # The peak is where %z is needed: what comes later may lie beside it.
    wide = f"%z = concat({', '.join(['%x'] * 24)}) : f32[N,96]"
    ops = [wide, "%s, %t = split(%z) {sizes=[4,92]} : f32[N,4], f32[N,92]", "%a = sigmoid(%s) : f32[N,4]"]
    more = [f"%b{i} = sigmoid(%a) : f32[N,4]" for i in range(4)]

    def text(ops: list[str]) -> str:
        return "\n".join(["func @forward(%x: f32[N,4]) -> f32[N,4]", *ops, "return %a", "end"])

    assert drops(text([*ops, *more[:2]])) == []
    assert drops(text([*ops, *more])) == [["z", "b0", "b1"]]


# Amounts.
AMOUNTS = st.lists(st.integers(0, 20), min_size=3, max_size=3).map(
    lambda c: Amount.of(c[0] + c[1] * N + c[2] * N * S)
)


@given(AMOUNTS, AMOUNTS, st.integers(0, 50), st.integers(0, 50))
def test_amounts_are_polynomials(a: Amount, b: Amount, n: int, s: int) -> None:
    sizes = Sizes({"N": n, "S": s})
    assert sizes[a + b] == sizes[a] + sizes[b]
    assert sizes[a] == int(a.expr.subs({N: n, S: s}))
    if a.within(b):
        assert sizes[a] <= sizes[b]
    assert sizes[a * 2.5] >= 2.5 * sizes[a]


@given(st.lists(AMOUNTS), st.integers(0, 50), st.integers(0, 50))
def test_the_largest_cover_all(amounts: list[Amount], n: int, s: int) -> None:
    sizes = Sizes({"N": n, "S": s})
    assert sizes.most(largest(amounts)) == sizes.most(amounts)
    for a, b in combinations(largest(amounts), 2):
        assert not a.within(b) and not b.within(a)
