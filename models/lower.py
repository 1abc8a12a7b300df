"""From a spec to the naive IR: nothing fused, experts in a loop, latent attention expanded.

A model becomes two entry functions and one function for each distinct layer::

    @step(%ids, %positions, %cu_seqlens, %seq_lens, %block_table, %slot_mapping, %kv) -> (hidden [N, H], %kv)
    @head(%h [B, H]) -> logits [B, vocab]

``step`` takes N new tokens of B ragged sequences: ids and positions [N], cu_seqlens [B+1], seq_lens [B] (with
the new tokens), block_table [B, P], slot_mapping [N]. A single layer becomes ``@forward(%x [N, H])``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moec.ir import Builder, CacheType, DType, Function, Module, Op, Range, TensorType, Value, verify
from moec.ir.builder import stem
from moec.ir.types import DTYPES, Type, i32, i64, symbol
from moec.models.blocks import Decoder
from moec.models.blocks.base import Block, lower_block, lower_stream
from moec.models.blocks.cache import cache_name
from moec.models.blocks.norm import RMSNorm
from moec.models.quantization import read_quantized
from moec.models.spec import Layer, Model, Spec

# What one step takes at most; costs in IR dumps are given at these sizes.
MAX_TOKENS, MAX_SEQUENCES = 8192, 64

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Entry = tuple[int, ...]


def lower(spec: Spec, dtype: str | None = None) -> Module:
    """The verified naive IR of a model or layer, computing in ``dtype`` (the spec's own by default)."""
    if dtype is not None:
        spec = spec.with_dtype(dtype)
    module = Module(_identifier(spec.name), bounds=_bounds(spec.max_positions, spec.page))
    if isinstance(spec, Model):
        _step(spec, module)
        _head(spec, module)
        if spec.quantization is not None:
            read_quantized(module, spec.quantization, DTYPES[spec.dtype])
    else:
        _forward(spec, module)
    verify(module)
    return module


def _identifier(name: str) -> str:
    """A name that IR text can hold: ``Qwen3 (mine)`` is ``Qwen3_mine_``."""
    word = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)
    return word if re.match(r"[A-Za-z_]", word) else f"_{word}"


def _bounds(max_positions: int, page: int) -> dict[str, int]:
    return {
        "N": MAX_TOKENS,
        "B": MAX_SEQUENCES,
        "P": -(-max_positions // page),
        "S": MAX_SEQUENCES * max_positions,
    }


def _inputs() -> dict[str, Type]:
    """What describes the batch of one step."""
    N, B, P = symbol("N"), symbol("B"), symbol("P")
    return {
        "ids": TensorType(i64, (N,)),
        "positions": TensorType(i64, (N,)),
        "cu_seqlens": TensorType(i32, (B + 1,)),
        "seq_lens": TensorType(i32, (B,)),
        "block_table": TensorType(i32, (B, P)),
        "slot_mapping": TensorType(i64, (N,)),
    }


def _caches(entries: Sequence[Entry], dtype: DType, page: int) -> dict[str, Type]:
    """One cache for each shape of entry: ``kv``, or ``kv0``, ``kv1``, ..."""
    names = ["kv"] if len(entries) == 1 else [f"kv{i}" for i in range(len(entries))]
    return {name: CacheType(dtype, entry, page) for name, entry in zip(names, entries, strict=True)}


def _step(model: Model, module: Module) -> None:
    dtype = DTYPES[model.dtype]
    entries = list(dict.fromkeys(e for layer in model.layers for e in layer.cache_entries))
    caches = _caches(entries, dtype, model.page)
    step = module.add(Function("step", [*_inputs().items(), *caches.items()]))
    b = Builder(module, step, dtype)
    for arg in step.args:
        b.context[arg.name] = arg
    for entry, name in zip(entries, caches, strict=True):
        b.context[cache_name(entry)] = b.context[name]

    table = b.param(EMBEDDING, (model.vocab, model.hidden))
    h = b.embedding(b.context["ids"], table, out="h")
    layers = _Layers(b)
    for run in _runs(model):
        h = layers.add(run, h)
    h = RMSNorm(model.eps, "model.norm", out="h.norm").lower(b, h)
    step.ret(h, *(b.context[cache_name(entry)] for entry in entries))


def _head(model: Model, module: Module) -> None:
    dtype = DTYPES[model.dtype]
    head = module.add(Function("head", [("h", TensorType(dtype, (symbol("B"), model.hidden)))]))
    b = Builder(module, head, dtype)
    weight = b.param(EMBEDDING if model.tied else HEAD, (model.vocab, model.hidden))
    head.ret(b.linear(head.args[0], weight, out="logits"))


@dataclass(frozen=True)
class _Run:
    """Equal layers in a row."""

    decoder: Decoder
    numbers: Range


def _runs(model: Model) -> Iterator[_Run]:
    first = 0
    for i, layer in enumerate(model.layers):
        if i + 1 == len(model.layers) or model.layers[i + 1] != layer:
            yield _Run(layer, Range(model.first_layer + first, model.first_layer + i))
            first = i + 1


class _Layers:
    """Writes each distinct layer as one function; a layer met again is one more call of it."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self._numbers: dict[str, int] = {}  # by name: no smaller number behind it is free
        self._known: dict[int | None, list[tuple[Decoder, Op]]] = {}  # by the decoder's hash

    def add(self, run: _Run, h: Value) -> Value:
        b, keys = self.b, [cache_name(e) for e in run.decoder.cache_entries]
        carried = [h, *(b.context[key] for key in keys)]
        names = ["h", *(stem(v.name) for v in carried[1:])]
        alike = self._known.setdefault(_hash(run.decoder), [])
        known = next((op for decoder, op in alike if decoder == run.decoder), None)
        if known is not None:
            invariants = [v for v in known.operands[len(carried) :] if v is not None]
            body = b.module[known.attrs["callee"]]
            return b.run("call", body, run.numbers, "model.layers.*", carried, invariants, names)[0]

        def write(b: Builder, layer: Value, x: Value, *caches: Value) -> list[Value]:
            b.context["layer"] = layer
            y = lower_stream(run.decoder, b, x)
            return [y, *(b.context[key] for key in keys)]

        name = self._unused(f"layer.{_identifier(run.decoder.label)}")
        after = b.loop("call", run.numbers, "model.layers.*", name, carried, [], write, names)
        call = b.module.callers(name)[0][1]
        alike.append((run.decoder, call))
        return after[0]

    def _unused(self, name: str) -> str:
        number = self._numbers.get(name, 1)
        while (candidate := name if number == 1 else f"{name}{number}") in self.b.module:
            number += 1
        self._numbers[name] = number + 1
        return candidate


def _hash(decoder: Decoder) -> int | None:
    """None where a user's block has none."""
    try:
        return hash(decoder)
    except TypeError:
        return None


def _forward(layer: Layer, module: Module) -> None:
    """``@forward(%x)``, with what the block asks of the context as further arguments."""
    dtype = DTYPES[layer.dtype]
    x_type = TensorType(dtype, (symbol("N"), layer.hidden))
    forward = module.add(Function("forward", [("x", x_type)]))
    b = Builder(module, forward, dtype, inputs=_inputs())
    entries = _entries(layer.block)
    if not entries:
        forward.ret(lower_block(layer.block, b, forward.args[0]))
        return
    for entry, (name, type) in zip(entries, _caches(entries, dtype, layer.page).items(), strict=True):
        b.context[cache_name(entry)] = forward.add_argument(name, type)
    keys = [cache_name(entry) for entry in entries]

    def write(b: Builder, number: Value, x: Value, *caches: Value) -> list[Value]:
        b.context["layer"] = number
        return [lower_stream(layer.block, b, x), *(b.context[key] for key in keys)]

    # The cache's ops want a layer's number, which only a call gives.
    numbers, carried = Range(layer.number, layer.number), [forward.args[0], *(b.context[key] for key in keys)]
    names = ["y", *(v.name for v in carried[1:])]
    forward.ret(*b.loop("call", numbers, "", "layer", carried, [], write, names))


def _entries(block: Block) -> list[Entry]:
    if isinstance(block, Decoder):
        return list(block.cache_entries)
    return [] if block.cache_entry is None else [block.cache_entry]
