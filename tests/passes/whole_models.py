"""Strategies over whole models, tiny ones, and over what a cached step can be asked to do.

Models have every router, every kind of attention, sizes that nothing divides, layers that differ, shared
experts, FP8 checkpoints of small blocks, and blocks that a user wrote. Runs prefill, go on with a mixture,
and decode, over pages that lie anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from moec import models
from moec.ir import Builder, CacheType, Module, Range, TensorType, Value
from moec.ir.types import f32
from moec.runtime.batch import Batch

Draw = Callable[[st.SearchStrategy[Any]], Any]
VOCAB = 13
_of = st.sampled_from
_flag = st.booleans()


# Blocks that a user could write: other names, other shapes of the same computations.
@dataclass(frozen=True)
class OwnExperts(models.Block):
    """Experts of one projection there and one back, a sigmoid between; the router's weights are halved."""

    experts: int
    k: int
    inner: int
    joined: bool  # a swiglu of one weight [2·inner, H] instead

    def lower(self, b: Builder, x: Value) -> Value:
        assert isinstance(x.type, TensorType)
        H, I, k = int(x.type.shape[-1]), self.inner, self.k
        logits = b.linear(x, b.param("ffn.choose.weight", (self.experts, H)), acc=f32, out="choose")
        w, id = b.route(logits, score="softmax", k=k, scale=0.5, out=("p", "who"))

        def one(b: Builder, e: Value, y: Value, x: Value, w: Value, id: Value) -> list[Value]:
            slot = b.expert_slots(id, e, out="mine")
            rows = b.gather_rows(x, slot, per_row=k, out="rows")
            if self.joined:
                h = b.swiglu(b.linear(rows, b.param("there.weight", (2 * I, H)), out="wide"))
            else:
                h = b.sigmoid(b.linear(rows, b.param("there.weight", (I, H)), out="narrow"))
            back = b.linear(h, b.param("back.weight", (H, I)), out="back")
            return [b.scatter_add(y, back, slot, w, per_row=k, out="y")]

        start = b.zeros_like(x, dtype=f32, out="nothing")
        numbers, name = Range(0, self.experts - 1), f"{b.function.name}.one"
        (y,) = b.loop("for_each", numbers, "ffn.many.*", name, [start], [x, w, id], one)
        return b.cast(y, b.dtype, out="sum")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class OwnMix(models.Block):
    """x·W, gated by sigmoid(x·G), with a norm of its own: no attention, no experts."""

    def lower(self, b: Builder, x: Value) -> Value:
        assert isinstance(x.type, TensorType)
        H = int(x.type.shape[-1])
        x = models.RMSNorm(1e-3, "own.norm", out="own").lower(b, x)
        gate = b.sigmoid(b.project(x, "own.gate", H, out="own.g"), out="own.s")
        mixed: Value = b.mul(gate, b.project(x, "own.mix", H, bias=True, out="own.m"), out="own.y")
        return mixed


# Parts of models.
@st.composite
def ropes(draw: Draw, layout: str) -> models.RoPE:
    kind = draw(_of(["plain", "linear", "llama3", "yarn"]))
    theta = draw(_of([100.0, 10000.0]))
    if kind == "linear":
        return models.LinearRoPE(theta, layout, factor=draw(_of([1.0, 3.0])))
    if kind == "llama3":
        return models.Llama3RoPE(theta, layout, original=8)
    if kind == "yarn":
        m = draw(_of([{}, {"mscale": 0.707, "mscale_all_dim": 0.707}, {"mscale_all_dim": 1.0}]))
        return models.YaRN(theta, layout, factor=draw(_of([1.0, 4.0, 40.0])), original=8, **m)
    return models.RoPE(theta, layout)


@st.composite
def mla(draw: Draw) -> models.MLA:
    return models.MLA(
        heads=draw(_of([1, 2, 3])),
        qk_nope_head_dim=draw(_of([1, 3, 4])),
        qk_rope_head_dim=draw(_of([2, 4])),
        v_head_dim=draw(_of([1, 4, 5])),
        kv_lora_rank=draw(_of([1, 5, 8])),
        q_lora_rank=draw(_of([None, 3, 8])),
        rope=draw(ropes(draw(_of(["interleaved", "half"])))),
        bias=draw(_flag),
        scale=draw(_of([None, 0.3])),
        eps=draw(_of([1e-6, 1e-2])),
    )


@st.composite
def gqa(draw: Draw) -> models.GQA:
    kv_heads, share = draw(_of([(1, 1), (1, 2), (2, 1), (2, 2), (1, 3)]))
    return models.GQA(
        heads=kv_heads * share,
        kv_heads=kv_heads,
        head_dim=draw(_of([2, 4, 6])),
        rope=draw(ropes(draw(_of(["half", "interleaved"])))),
        qkv_bias=draw(_flag),
        out_bias=draw(_flag),
        qk_norm=draw(_of([None, "head", "full"])),
        window=draw(_of([0, 0, 1, 3])),
        clip=draw(_of([None, 0.5])),
        scale=draw(_of([None, 0.3])),
        eps=draw(_of([1e-6, 1e-2])),
    )


@st.composite
def routers(draw: Draw) -> models.Router:
    groups, size = draw(_of([(1, 1), (1, 2), (1, 3), (1, 5), (2, 1), (2, 2), (2, 3), (3, 2)]))
    kept, masked = draw(st.integers(1, groups)), draw(_of(["zero", "neginf"]))
    most = groups * size if masked == "zero" or groups == 1 else kept * size
    return models.Router(
        experts=groups * size,
        top_k=draw(st.integers(1, most)),
        score=draw(_of(["softmax", "sigmoid", "sqrtsoftplus"])),
        renorm=draw(_flag),
        scale=draw(_of([1.0, 2.5])),
        groups=groups,
        topk_groups=kept,
        group_score=draw(_of(["max", "top2sum"])) if size > 1 else "max",
        masked=masked,
        bias=draw(_flag),
        fp32=draw(_flag),
        round_weights=draw(_flag),
    )


@st.composite
def moe(draw: Draw) -> models.MoE:
    router = draw(routers())
    names = draw(_of([("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")]))
    act = draw(_of(["silu", "silu", "gelu", "gelu_tanh"]))
    inner = draw(_of([1, 3, 4]))
    shared = None
    if draw(_flag):
        # As wide as the experts, or a few times as wide: what folding them in asks for, and what it doesn't.
        width, same = inner * draw(_of([1, 2])) + draw(_of([0, 0, 1])), draw(_flag)
        shared = models.SwiGLU(width, act if same else "silu", name="shared_experts", bias=draw(_flag))
    gate = "shared_gate" if shared is not None and draw(_flag) else ""
    return models.MoE(router, models.Experts(router.experts, inner, act, names), shared, gate)


@st.composite
def own_experts(draw: Draw) -> OwnExperts:
    experts = draw(st.integers(1, 4))
    return OwnExperts(experts, draw(st.integers(1, experts)), draw(_of([1, 3])), draw(_flag))


@st.composite
def decoders(draw: Draw) -> models.Decoder:
    dense = st.builds(
        models.SwiGLU, _of([1, 5, 8]), _of(["silu", "gelu_tanh"]), _flag, limit=_of([None, 0.5])
    )
    return models.Decoder(
        attn=draw(st.one_of(mla(), mla(), gqa(), gqa(), st.just(OwnMix()))),
        mlp=draw(st.one_of(moe(), moe(), moe(), dense, own_experts())),
        eps=draw(_of([1e-6, 1e-2])),
    )


@st.composite
def whole_models(draw: Draw, dtype: str = "f32") -> models.Model:
    """One to three layers, some of them equal, in fp32 unless another ``dtype`` is asked for."""
    kinds = [draw(decoders()), *([draw(decoders())] if draw(_flag) else [])]
    layers = draw(st.lists(_of(kinds), min_size=1, max_size=3))
    fp8 = None
    if draw(_of([True, False, False])):
        keep = draw(_of([(), (r".*self_attn\.",)]))
        fp8 = models.BlockFP8(
            (draw(_of([1, 2, 3, 5])), draw(_of([1, 2, 3, 4]))), keep, draw(_of(["fp32", "ue8m0"]))
        )
    return models.Model(
        vocab=VOCAB,
        hidden=draw(_of([1, 6, 8, 9])),
        layers=layers,
        eps=draw(_of([1e-6, 1e-2])),
        tied=draw(_flag),
        dtype=dtype,
        max_positions=64,
        page=draw(_of([1, 2, 3, 16])),
        quantization=fp8,
        first_layer=draw(_of([0, 0, 2])),
    )


# Runs.
@dataclass(frozen=True)
class Run:
    """Steps over one cache of ``pages`` pages, and of what kind the weights are, drawn by ``seed``."""

    steps: tuple[Batch, ...]
    pages: int
    seed: int
    ties: bool  # pairs of experts score alike
    all_to: int | None  # of routers with a bias

    def __repr__(self) -> str:  # what a failing example prints
        counts = [b.cu_seqlens.diff().tolist() for b in self.steps]
        return f"<new tokens {counts}, seed {self.seed}, ties {self.ties}, all to {self.all_to}>"


@st.composite
def runs(draw: Draw, page: int, steps: int = 3, checked: bool = False) -> Run:
    """Prefill, then a mixture, then decode, of 1 to 3 sequences, each with a few new tokens or none.

    Pages are taken in any order. A table is longer than need be, and names no page where nothing is kept.
    ``checked``: only what the runtime's own checks let pass: a step has a token.
    """
    sequences = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**16))
    kinds = [draw(_of([0, 1, 2, 5])) for _ in range(sequences)], None, [1] * sequences
    counts = []
    for number in range(steps):
        kind = kinds[min(number, 2)]
        counts.append(kind or [draw(_of([0, 1, 3])) for _ in range(sequences)])
    if checked:
        counts = [new if sum(new) else [1] * sequences for new in counts]
    generator = torch.Generator().manual_seed(seed)
    most = [sum(new[b] for new in counts) for b in range(sequences)]
    need = [-(-n // page) for n in most]
    pages = sum(need) + draw(st.integers(0, 2)) + 1
    order = torch.randperm(pages, generator=generator).tolist()
    owned = [[order.pop() for _ in range(n)] for n in need]
    width = max(need) + draw(st.integers(0, 1))
    batches, length = [], [0] * sequences
    for new in counts:
        table = torch.randint(-9, 2**31 - 1, (sequences, width), generator=generator, dtype=torch.int32)
        positions: list[int] = []
        slots: list[int] = []
        for b, count in enumerate(new):
            where = range(length[b], length[b] + count)
            positions += where
            slots += [owned[b][p // page] * page + p % page for p in where]
            length[b] += count
            kept = -(-length[b] // page)
            table[b, :kept] = torch.tensor(owned[b][:kept], dtype=torch.int32)
        offsets = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
        ids = torch.randint(VOCAB, (sum(new),), generator=generator)
        lens = torch.tensor(length, dtype=torch.int32)
        at = torch.tensor(positions, dtype=torch.int64)
        batches.append(Batch(ids, at, offsets, lens, table, torch.tensor(slots, dtype=torch.int64)))
    all_to = draw(_of([None, None, 0, 1]))
    return Run(tuple(batches), pages, seed, draw(_flag), all_to)


def checkpoint(module: Module, run: Run) -> dict[str, torch.Tensor]:
    """Tensors for a naive module, at scales where each of them matters."""
    generator = torch.Generator().manual_seed(run.seed)
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, prefix: str) -> None:
        function = module[name]
        for param in function.params.values():
            if prefix + param.name not in found and "*" not in param.name:
                assert isinstance(param.type, TensorType)
                found[prefix + param.name] = _tensor(param.name, param.type, run, generator)
        for op in function.loops():
            for number in op.range:
                walk(op.callee, prefix + op.prefix(number))

    for entry in ("weights", "step", "head"):  # what is stored in FP8 is so, whatever else has its name
        if entry in module:
            walk(entry, "")
    return found


def _tensor(name: str, type: TensorType, run: Run, generator: torch.Generator) -> torch.Tensor:
    shape = [int(d) for d in type.shape]
    t = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        t = 1 + 0.3 * t
    elif name.endswith("scale_inv"):
        t = 0.1 + 0.3 * t.abs()
    elif name.endswith("e_score_correction_bias"):
        t = 0.1 * t
        if run.all_to is not None:
            t[run.all_to % len(t)] += 50.0
    elif len(shape) == 2:
        t *= (0.3 + shape[1]) ** -0.5 * (3 if "embed" in name else 1.2)
    if run.ties and name.endswith(("mlp.gate.weight", "choose.weight")):
        t[1::2] = t[: len(t) - 1 : 2][: len(t[1::2])]
    return t.to(type.dtype.torch)


def caches(module: Module, entry: str = "step") -> list[CacheType]:
    return [a.type for a in module[entry].args if isinstance(a.type, CacheType)]
