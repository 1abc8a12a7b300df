"""The KV cache in 8 bits.

::

    func @step(.., %kv: cache<bf16[576], page=64>) {
      %kv.1 = call @layer(%kv, ..)
    func @layer(.., %kv: cache<bf16[576], page=64>, ..) {
      %kv.1 = cache_write(%kv, %layer, %latent, %slot_mapping)
      %latent.long = cache_read(%kv.1, %layer, %long.table, %long.lens)

    func @step(.., %kv: cache<u8[656], page=64, rank=512>) {
      %kv.1 = call @layer(%kv, ..)
    func @layer(.., %kv: cache<u8[656], page=64, rank=512>, ..) {
      %kv.1 = cache_write(%kv, %layer, %latent, %slot_mapping)
      %latent.long = cache_read(%kv.1, %layer, %long.table, %long.lens) {to=bf16}

The type says how entries are kept, and ops that write or read them do as it says: what changes is the type,
wherever the cache goes, and ``to`` of what gathers entries. So it may be done at any point of a pipeline
before kernels are chosen.

Which elements are latent, as ``packed`` asks, follows from the ops: ``latent_attention`` and
``latent_cache_write`` say so, a ``cache_read`` by how its entries are cut into [c | k_pe]; all must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import networkx as nx

from moec.errors import BadOption
from moec.ir import CacheType, Function, Module, Op, Value
from moec.ir.op import Argument
from moec.ir.ops.control import Loop
from moec.ir.types import DTYPES, bf16, f16, f32
from moec.passes.fp8_recipes import Recipe
from moec.passes.pattern import Miss
from moec.passes.rewrite import Log

Place = tuple[Function, Argument]


def cast_caches(module: Module, recipe: Recipe, log: Log) -> bool:
    """Gives every cache of the module the type that ``recipe.kv`` asks for; whether one changed.

    Raises BadOption where there are caches, but none that can be kept so.
    """
    if recipe.kv == "off":
        return False
    changed, refused, kept = 0, [], 0
    for places in _caches(module):
        type = places[0][1].type
        if not isinstance(type, CacheType) or type.quantised:
            kept += 1
            continue
        ops = [(f, op, v) for f, arg in places for op, v in _users(f, arg)]
        new, why = _quantised(type, ops, recipe)
        if new is None:
            refused.append(f"{places[0][1].text} {why}")
            for function, op, _ in ops[:1]:
                log.misses.append(Miss(f"{refused[-1]}", op, op.loc, f"kv-{recipe.kv}", function.name))
            continue
        _say_dtype(type, ops)
        for function, arg in places:
            function.retype(arg, new)
        log.fired[f"kv-{recipe.kv}"] += 1
        changed += 1
    if refused and not changed + kept:
        raise BadOption(f"fp8-cast: kv={recipe.kv}: {'; '.join(refused)}")
    return changed > 0


def _quantised(
    type: CacheType, ops: list[tuple[Function, Op, Value]], recipe: Recipe
) -> tuple[CacheType | None, str]:
    """The new type of a cache, or why there is none."""
    if type.dtype not in (f32, bf16, f16):
        return None, f"is {type}, no cache of floats"
    if recipe.kv == "per-tensor":
        return replace(type, dtype=DTYPES["f8e4m3"], scale=recipe.kv_scale), ""
    if len(type.entry) != 1:
        return None, f"is {type}, no cache of latents"
    ranks: dict[int, Op] = {}
    for function, op, _ in ops:
        for rank in _ranks(function, op):
            ranks.setdefault(rank, op)
    if len(ranks) > 1:
        return None, "is read otherwise by " + " than by ".join(f"{op!r}" for op in ranks.values())
    for rank in ranks:
        return type.packed(rank), ""
    return None, f"is {type}: no op says which of its elements are latent"


def _ranks(function: Function, op: Op) -> Iterator[int]:
    """How many elements of an entry are latent, by an op that reads or writes it."""
    if op.name == "latent_attention":
        yield op.attrs["rank"]
    elif op.name == "latent_cache_write":
        yield op.w.type.shape[0]  # type: ignore[attr-defined]
    elif op.name == "cache_read":
        for user in function.users(op.results[0]):
            if user.name == "split" and user.attrs["axis"] in (-1, 1) and len(user.results) == 2:
                yield user.attrs["sizes"][0]


def _say_dtype(type: CacheType, ops: list[tuple[Function, Op, Value]]) -> None:
    """Every ``cache_read`` says its dtype, which the cache's will not."""
    for function, op, _ in ops:
        if op.name == "cache_read" and op.attrs["to"] is None:
            new = op.__class__(op.operands, op.attrs | {"to": type.dtype}, op.loc)
            new.take_notes(op)
            new.origin = f"fp8-cast({op.results[0].text})"
            function.create(new, before=op)
            function.replace(op.results[0], new.results[0])
            function.erase(op)


def _users(function: Function, arg: Argument) -> Iterator[tuple[Op, Value]]:
    """The ops that a cache is given to in a function, with the version that each is given."""
    todo: list[Value] = [arg]
    while todo:
        version = todo.pop()
        for op, number in function.uses(version):
            yield op, version
            if isinstance(op, Loop):
                todo += op.results[number : number + 1]
            else:
                todo += [r for r in op.results if isinstance(r.type, CacheType)]


def _caches(module: Module) -> list[list[Place]]:
    """The arguments that are one cache: in entries, by name, and in the bodies that these give it to."""
    graph = nx.Graph()
    called = {loop.callee for f in module for loop in f.loops()}
    entries: dict[str, Place] = {}
    for function in module:
        for arg in function.args:
            if not isinstance(arg.type, CacheType):
                continue
            place = (function, arg)
            graph.add_node(place)
            if function.name not in called:
                graph.add_edge(place, entries.setdefault(arg.name, place))
            for op, version in _users(function, arg):
                if isinstance(op, Loop):
                    body = module[op.callee]
                    for number, value in enumerate(op.operands):
                        if value is version:
                            graph.add_edge(place, (body, body.args[1 + number]))
    order = {place: n for n, place in enumerate(graph)}
    return [sorted(each, key=order.__getitem__) for each in nx.connected_components(graph)]
