"""The memory plan: what each function holds at each op, the most that an entry ever holds, and buffers.

A loop's body counts once, with what lives across it in the function that runs it. Counted are the results of
ops and what their kernels allocate beside these (``Records.workspace``); not counted are weights, caches and
arguments, which are the caller's.

The generated Python of a planned module keeps to the plan: ``drops`` says where it must let go of a value
that would otherwise live until its function returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import networkx as nx

from moec.ir.amount import NOTHING, Amount, Sizes, largest, total
from moec.ir.graph import ENTRIES, Function, Module
from moec.ir.lifetimes import Escape, Held, escapes, lifetimes, rows_at_most, taken_over, without_views
from moec.ir.ops.control import Loop
from moec.ir.records import Records
from moec.ir.sizes import complete, symbols
from moec.ir.types import symbol
from moec.ir.weights import WEIGHTS

# What generated code may hold above what is needed: closer would be many lines for little.
SLACK = 1.1
# Of what may be held, the share that a value must have to be worth letting go of.
WORTH = 1 / 64
# New tokens of a step where a module's bounds don't say.
TOKENS = 4096


@dataclass
class FunctionPlan:
    """``held`` in order; by op its ``workspace`` and what a loop's body needs (one of these is the most).

    ``buffers`` numbers each held value's buffer. ``drops``: what generated code lets go of before an op.
    ``parts`` are the ways in which a batch may be parted, as sizes: the peak is that of the worst.
    """

    function: Function
    held: list[Held]
    workspace: list[Amount]
    body: list[list[Amount]]
    buffers: dict[Held, int] = field(default_factory=dict)
    drops: dict[int, list[Held]] = field(default_factory=dict)
    parts: Sequence[Mapping[Any, Any]] = ({},)

    def at(self, i: int) -> list[Held]:
        """What is held while op ``i`` runs."""
        return [h for h in self.held if h.at(i)]

    def needs(self, i: int, held: Amount | None = None) -> list[Amount]:
        """What op ``i`` needs in all, for who knows what is ``held`` then: one of these is the most."""
        own = (total(h.size for h in self.at(i)) if held is None else held) + self.workspace[i]
        return [own.subs(part) + body for part in self.parts for body in self.body[i] or [NOTHING]]

    def peaks(self) -> list[Amount]:
        """What the function needs: one of these is the most."""
        change = [NOTHING] * (len(self.workspace) + 1)
        for h in self.held:
            if h.first + h.after < h.end:
                change[h.first + h.after] += h.size
                change[min(h.end, len(self.workspace))] -= h.size
        held = accumulate(change[:-1])
        return largest(need for i, now in enumerate(held) for need in self.needs(i, now))


@dataclass
class MemoryPlan:
    """The plans of the functions that run in a step, by name, bodies before what runs them.

    ``sizes`` are those at which buffers are shared.
    """

    module: Module
    functions: dict[str, FunctionPlan]
    sizes: dict[str, float]
    peaks: dict[str, list[Amount]] = field(default_factory=dict)

    @property
    def entries(self) -> list[str]:
        return [name for name in self.functions if name in ENTRIES]

    def peak(self, entry: str, sizes: Mapping[str, float] | None = None) -> int:
        """Bytes that a run of ``entry`` holds at most, beside weights, caches and arguments.

        Raises BadOption where ``sizes`` lack a symbol.
        """
        return Sizes(self.sizes if sizes is None else sizes).most(self.peaks[entry])

    def formula(self, entry: str) -> str:
        """The peak as text: ``max(8*N, 16*S)``."""
        peaks = [str(p) for p in self.peaks[entry]]
        return f"max({', '.join(peaks)})" if len(peaks) > 1 else (peaks or ["0"])[0]

    def peak_ops(
        self, entry: str, sizes: Mapping[str, float] | None = None
    ) -> list[tuple[FunctionPlan, int]]:
        """Where the peak of ``entry`` is: its op, the op of the body that this runs, and so on."""
        numbers = Sizes(self.sizes if sizes is None else sizes)
        found, name = [], entry
        while name and (ops := self.functions[name].function.ops):
            plan = self.functions[name]
            i = max(range(len(ops)), key=lambda i: numbers.most(plan.needs(i)))
            found.append((plan, i))
            op = ops[i]
            name = op.callee if isinstance(op, Loop) else ""
        return found

    def arena(self, entry: str, sizes: Mapping[str, float] | None = None) -> int:
        """Bytes of all buffers that a run of ``entry`` has at once, without workspace."""
        numbers = self.numbers(sizes)
        known: dict[str, int] = {}
        for name, plan in self.functions.items():
            buffers: dict[int, int] = {}
            for held, number in plan.buffers.items():
                buffers[number] = max(buffers.get(number, 0), numbers[held.size])
            bodies = [known[op.callee] for op in plan.function.ops if isinstance(op, Loop)]
            known[name] = sum(buffers.values()) + max(bodies, default=0)
        return known[entry]

    def numbers(self, sizes: Mapping[str, float] | None = None) -> Sizes:
        """``sizes``, by default the plan's, with those of a batch's parts as if all sequences were alike."""
        known = dict(self.sizes if sizes is None else sizes)
        found = dict(known)
        for op in _parting(self.module):
            shares = op.shares({symbol(name): size for name, size in known.items()})
            found |= {s.name: size for s, size in shares.items()}
        return Sizes(found)

    def sum_up(self) -> None:
        """Works out ``peaks``, of bodies first."""
        for name, plan in self.functions.items():
            bounds = rows_at_most(plan.function)
            for i, op in enumerate(plan.function.ops):
                if isinstance(op, Loop):
                    plan.body[i] = [peak.subs(bounds) for peak in self.peaks[op.callee]]
            self.peaks[name] = plan.peaks()


def is_planned(module: Module) -> bool:
    """Whether the pass ``plan`` has given its ops buffers: only then does generated code keep to the plan."""
    return any("buffer" in op.annotations for function in module for op in function.ops)


def plan_memory(module: Module, records: Records, target: str = "") -> MemoryPlan:
    """The plan of ``module`` for ``target`` (by default its own), whose kernels ``records`` know."""
    target = target or module.target or "cpu"
    callees_first = list(nx.lexicographical_topological_sort(module.call_graph(), _place(module)))[::-1]
    plans: dict[str, FunctionPlan] = {}
    kept: dict[str, list[Escape]] = {}
    for name in callees_first:
        if name.split(".")[0] != WEIGHTS:
            function = module[name]
            plans[name] = _function_plan(function, kept, records, target)
            kept[name] = escapes(function, plans[name].held)
    prefill, decode = typical_sizes(module)
    parts = ways_to_part(module)
    for each in plans.values():
        each.parts = parts
    plan = MemoryPlan(module, plans, prefill)
    plan.sum_up()  # with each value until its last use
    numbers = plan.numbers(prefill)
    for each in plans.values():
        each.buffers = share_buffers(each.held, numbers)
    _decide_drops(
        plan, [Sizes(sizes | numbers_of(part, sizes)) for sizes in (prefill, decode) for part in parts]
    )
    plan.sum_up()  # with what generated code holds
    return plan


def _place(module: Module) -> Callable[[str], int]:
    return {name: i for i, name in enumerate(module.functions)}.__getitem__


def _function_plan(
    function: Function, kept: dict[str, list[Escape]], records: Records, target: str
) -> FunctionPlan:
    bounds = rows_at_most(function)
    workspace = [
        NOTHING if isinstance(op, Loop) else records.workspace(op, target).subs(bounds) for op in function.ops
    ]
    return FunctionPlan(function, lifetimes(function, kept), workspace, [[] for _ in workspace])


def _parting(module: Module) -> list[Any]:
    """Ops that part a batch."""
    return [op for function in module for op in function.ops if hasattr(op, "shares")]


def ways_to_part(module: Module) -> list[dict[Any, Any]]:
    """Sizes of the parts where an op parts the batch: all of it short, or all long.

    What a step needs is linear in them, so that one of these ways needs the most. Without such an op there is
    one way, which says nothing.
    """
    short: dict[Any, Any] = {}
    long: dict[Any, Any] = {}
    for op in _parting(module):
        whole = op.like.type.shape[0], op.seq_lens.type.shape[0], symbol("S")
        of_short = op.rows, op.sequences, op.short_entries
        short |= {symbol(s): size for s, size in zip(of_short, whole, strict=True)} | {
            symbol(op.long_entries): 0
        }
        long |= {symbol(s): 0 for s in of_short} | {symbol(op.long_entries): whole[2]}
    return [short, long] if short else [{}]


def numbers_of(part: Mapping[Any, Any], sizes: Mapping[str, float]) -> dict[str, float]:
    """The sizes of a part as numbers."""
    numbers = Sizes(sizes)
    return {s.name: numbers[Amount.of(size)] for s, size in part.items()}


def typical_sizes(module: Module) -> tuple[dict[str, float], dict[str, float]]:
    """What a plan is made for: one sequence's prefill, as long as may be, and 64 sequences that decode."""
    tokens = module.bounds.get("N", TOKENS)
    few = min(64, tokens)
    context = few * max(tokens, TOKENS)
    prefill, decode = {"N": tokens}, {"N": few, "B": few, "S": context}
    # Sizes of other names are as large as N.
    unknown = dict.fromkeys(symbols(module))
    return tuple(dict.fromkeys(unknown, s["N"]) | complete(s, module) for s in (prefill, decode))  # type: ignore[return-value]


def share_buffers(held: list[Held], sizes: Sizes) -> dict[Held, int]:
    """A buffer for each, never one for two that are needed at once.

    The largest first, each into the smallest buffer that has room (best fit): buffer 0 is the largest.
    """
    found: dict[Held, int] = {}
    buffers: list[list[Held]] = []
    for each in sorted(held, key=lambda h: -sizes[h.size]):
        # Buffers come in falling size: the last one that is free fits best.
        free = [n for n, inside in enumerate(buffers) if not any(each.overlaps(h) for h in inside)]
        if not free:
            buffers.append([])
        found[each] = number = free[-1] if free else len(buffers) - 1
        buffers[number].append(each)
    return found


def _decide_drops(plan: MemoryPlan, points: list[Sizes]) -> None:
    """Where generated code must let go of what is dead: late and all at once, where the peak asks for it."""
    budgets = {entry: [SLACK * p.most(plan.peaks[entry]) for p in points] for entry in plan.entries}
    for name in reversed(plan.functions):  # callers first: they say what is left for bodies
        if name in budgets:
            _drops_of(plan.functions[name], budgets, points)


def _drops_of(plan: FunctionPlan, budgets: dict[str, list[float]], points: list[Sizes]) -> None:
    """Decides one function's ``drops`` and ``end`` of what it holds, and what that leaves for bodies."""
    budget = budgets[plan.function.name]
    share = {
        h: max((p[h.size] / b for p, b in zip(points, budget, strict=True) if b > 0), default=0.0)
        for h in plan.held
    }
    ops, alone = plan.function.ops, without_views(plan.held)
    starting: dict[int, list[Held]] = {}
    for h in plan.held:
        starting.setdefault(h.first + h.after, []).append(h)
    alive: dict[Held, None] = {}
    living = [0.0 for _ in points]  # bytes of what is alive

    def end(h: Held) -> list[float]:
        del alive[h]
        return [n - p[h.size] for n, p in zip(living, points, strict=True)]

    for i, op in enumerate(ops):
        for h in starting.get(i, []):
            alive[h] = None
            living = [n + p[h.size] for n, p in zip(living, points, strict=True)]
        held = [n + p[plan.workspace[i]] for n, p in zip(living, points, strict=True)]
        inner = [p.most(plan.body[i]) for p in points]
        if any(h + n > b for h, n, b in zip(held, inner, budget, strict=True)):
            # All that is dead at once: one line now rather than one before each op from here on.
            dropped = [h for h in alive if h.last < i and share[h] >= WORTH]
            for each in dropped:
                each.end = i
                living = end(each)
                held = [h - p[each.size] for h, p in zip(held, points, strict=True)]
            plan.drops |= {i: dropped} if dropped else {}
        if isinstance(op, Loop):
            left = [b - h for b, h in zip(budget, held, strict=True)]
            known = budgets.get(op.callee, left)
            budgets[op.callee] = [min(a, b) for a, b in zip(known, left, strict=True)]
            for number in range(op.carry):  # the results get the names of what was carried in
                if (taken := taken_over(op, number, alone, plan.function)) in alive:
                    living = end(taken)
    for each in alive:
        each.end = len(ops)
