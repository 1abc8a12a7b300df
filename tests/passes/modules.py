"""Small modules for the tests of passes: from text, and a strategy for MoE blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

import moec.codegen  # noqa: F401 - the passes select and plan ask its records
from moec.ir import (
    Builder,
    Function,
    Interpreter,
    Module,
    Range,
    TensorType,
    Value,
    parse_module,
    print_module,
    verify,
)
from moec.ir.ops.control import Loop
from moec.ir.types import DTYPES, f32, symbol
from moec.ir.weights import weights_of
from moec.passes import parse_pipeline
from moec.passes.manager import PassManager, PassRun


def module(*functions: str) -> Module:
    """A module of these functions, each given as ``signature`` and ops, one a line."""
    m = parse_module("moec.ir 1 module @test target=cpu\n" + "\n".join(functions))
    verify(m)
    return m


def func(signature: str, *lines: str) -> str:
    """``@forward(%x: f32[N,4]) -> f32[N,4]`` with its lines."""
    return "\n".join([f"func {signature}", *lines, "end"])


def run(pipeline: str, m: Module) -> list[PassRun]:
    """Runs the passes, then each once more to see that it's a no-op."""
    runs = PassManager(parse_pipeline(pipeline)).run(m)
    last = parse_pipeline(pipeline)[-1]
    assert not last.run(m), f"{last} changes its own result"
    verify(m)
    return runs


def reasons(runs: list[PassRun], rule: str, function: str = "forward") -> list[str]:
    """Why ``rule`` didn't fire in ``function``, by the last pass."""
    return [m["reason"] for m in runs[-1].misses if (m["rule"], m["function"]) == (rule, function)]


def golden_text(m: Module) -> str:
    """The module as text with the rules that made its ops, without costs and source lines."""
    return re.sub(r" ; [^<\n]*(<?)", lambda note: " ; <" if note[1] else "", print_module(m))


def op_names(m: Module, function: str = "forward") -> list[str]:
    return [op.name for op in m[function].ops]


def random_weights(m: Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint: what the load-time functions read, and the parameters that they don't make."""
    generator = torch.Generator().manual_seed(seed)
    types: dict[str, Any] = {}

    def walk(name: str, prefix: str) -> None:
        function = m[name]
        for param in function.params.values():
            types.setdefault(prefix + param.name, param.type)
        for op in function.ops:
            if isinstance(op, Loop):
                for number in op.range:
                    walk(op.callee, prefix + op.prefix(number))

    if "weights" in m:
        walk("weights", "")
    for entry in ("forward", "step"):
        if entry in m:
            walk(entry, "")
    return {name: _random(type, generator) for name, type in types.items() if "*" not in name}


def tensor_type(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type


def _random(type: TensorType, generator: torch.Generator) -> torch.Tensor:
    t = torch.randn([int(d) for d in type.shape], generator=generator) * 0.4
    return t.to(type.dtype.torch)


def tokens(count: int, width: int, seed: int = 1, dtype: str = "f32") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator).to(DTYPES[dtype].torch)


def interpret(
    m: Module, weights: Mapping[str, torch.Tensor], *args: Any, entry: str = "forward"
) -> torch.Tensor:
    (out,) = Interpreter(m, weights).run(entry, *args)
    return out


@dataclass(frozen=True)
class MoE:
    """A naive MoE block, written as a user could write it: value and parameter names are free."""

    experts: int = 4
    k: int = 2
    hidden: int = 8
    inner: int = 6
    dtype: str = "f32"
    score: str = "softmax"
    renorm: bool = False
    shared: bool = False
    layered: bool = False  # the block is the body of two layers
    joined: bool = False  # gate and up are one weight [2I, H]
    gated: bool = True  # else: linear, sigmoid, linear
    fp8: bool = False  # expert and shared weights are stored in FP8 blocks
    router: bool = True  # else the ids and weights are arguments
    act: str = "silu"
    limit: float | None = None
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    prefix: str = "mlp.experts"

    def build(self) -> Module:
        m = Module("test", "cpu", {"N": 64})
        x_type = TensorType(DTYPES[self.dtype], (symbol("N"), self.hidden))
        arguments = [("x", x_type)]
        if not self.router:
            arguments += [
                ("w", TensorType(f32, (symbol("N"), self.k))),
                ("id", TensorType(DTYPES["i32"], (symbol("N"), self.k))),
            ]
        forward = m.add(Function("forward", arguments))
        b = Builder(m, forward, DTYPES[self.dtype])
        if self.layered:
            (y,) = b.loop(
                "call",
                Range(1, 2),
                "layers.*",
                "layer",
                [forward.args[0]],
                [],
                lambda b, _, x: [self.block(b, x)],
            )
        else:
            y = self.block(b, *forward.args)
        forward.ret(y)
        if self.fp8:
            self._store_in_fp8(m)
        verify(m)
        return m

    def block(self, b: Builder, x: Value, w: Value | None = None, id: Value | None = None) -> Value:
        H, I = self.hidden, self.inner
        gate, up, down = (f"{n}.weight" for n in self.names)
        if w is None or id is None:
            logits = b.linear(x, b.param("router.weight", (self.experts, H)), acc=f32)
            w, id = b.route(logits, k=self.k, score=self.score, renorm=self.renorm)

        def expert(b: Builder, e: Value, y: Value, x: Value, w: Value, id: Value) -> list[Value]:
            slot = b.expert_slots(id, e)
            rows = b.gather_rows(x, slot, per_row=self.k, out="rows")
            if not self.gated:
                h = b.sigmoid(b.linear(rows, b.param(up, (I, H))))
            elif self.joined:
                h = b.swiglu(
                    b.linear(rows, b.param("gate_up.weight", (2 * I, H))), act=self.act, limit=self.limit
                )
            else:
                g = b.linear(rows, b.param(gate, (I, H)), out="g")
                h = b.swiglu(g, b.linear(rows, b.param(up, (I, H)), out="u"), act=self.act, limit=self.limit)
            d = b.linear(h, b.param(down, (H, I)), out="d")
            return [b.scatter_add(y, d, slot, w, per_row=self.k)]

        zeros = b.zeros_like(x, dtype=f32)
        name = f"{b.function.name}.expert"
        (y,) = b.loop(
            "for_each",
            Range(0, self.experts - 1),
            f"{self.prefix}.*",
            name,
            [zeros],
            [x, w, id],
            expert,
            ["y"],
        )
        y = b.cast(y, b.dtype, out="routed")
        if not self.shared:
            return y
        with b.scope("mlp.shared"):
            g = b.linear(x, b.param(gate, (I, H)), out="sg")
            h = b.swiglu(
                g, b.linear(x, b.param(up, (I, H)), out="su"), act=self.act, limit=self.limit, out="sh"
            )
            return b.add(y, b.linear(h, b.param(down, (H, I)), out="s"), out="out")

    def _store_in_fp8(self, m: Module) -> None:
        for function in list(m):
            for param in list(function.params.values()):
                if param.name == "router.weight":
                    continue
                load = weights_of(m, function.name)
                rows, columns = (int(d) for d in tensor_type(param).shape)
                q = load.param(param.name, TensorType(DTYPES["f8e4m3"], (rows, columns)))
                scale = load.param(
                    f"{param.name}_scale_inv", TensorType(f32, (-(-rows // 4), -(-columns // 4)))
                )
                lb = Builder(m, load, DTYPES[self.dtype])
                pair = lb.scaled(q, scale, block=(4, 4), out="q")
                lb.bind(lb.dequant(pair, to=DTYPES[self.dtype]), param=param.name)


@st.composite
def moe_blocks(draw: Any, **fixed: Any) -> MoE:
    """Small MoE blocks of every kind that ``MoE`` knows, in fp32."""
    experts = draw(st.integers(1, 6))
    drawn = {
        "experts": experts,
        "k": draw(st.integers(1, experts)),
        "hidden": draw(st.integers(1, 9)),
        "inner": draw(st.integers(1, 7)),
        "score": draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        "renorm": draw(st.booleans()),
        "shared": draw(st.booleans()),
        "layered": draw(st.booleans()),
        "joined": draw(st.booleans()),
        "gated": draw(st.booleans()),
        "fp8": draw(st.booleans()),
        "act": draw(st.sampled_from(["silu", "gelu", "gelu_tanh"])),
        "limit": draw(st.sampled_from([None, 0.25])),
        "names": draw(
            st.sampled_from([("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("a", "b", "c")])
        ),
        "prefix": draw(st.sampled_from(["mlp.experts", "experts", "ffn.many"])),
    }
    return MoE(**(drawn | fixed))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal within ``tolerance`` of the largest magnitude: what another order of fp32 sums may change."""
    scale = max(float(a.abs().max()) if a.numel() else 0.0, 1e-6)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


def edited(edit: Callable[[str], str], **block: object) -> Module:
    """The default block's text, changed."""
    text = print_module(MoE(**block).build(), derived=False)  # type: ignore[arg-type]
    changed = edit(text)
    assert changed != text
    return parse_module(changed)


def replaced(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        for old, new in pairs:
            assert old in text, f"{old} is not in\n{text}"
            text = text.replace(old, new)
        return text

    return edit
