"""mla-absorb: same results, where absorbing stops to pay, and why it stays away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadOption
from moec.ir import Builder, Function, Module, TensorType, parse_module, print_module, verify
from moec.ir.types import DTYPES, i32, symbol
from moec.models import lower, preset
from moec.passes import parse_pipeline, pipeline
from moec.passes.manager import PassManager
from moec.passes.mla_absorb import ALWAYS, crossover
from tests.passes.modules import (
    close,
    func,
    golden_text,
    interpret,
    module,
    op_names,
    random_weights,
    reasons,
    replaced,
    run,
    tokens,
)

N, B, S = (symbol(n) for n in "NBS")


@dataclass(frozen=True)
class Latent:
    """Expanded attention as a user could write it: ``x`` [S, 8] makes the latent, nothing is cached."""

    heads: int = 2
    nope: int = 4
    rope: int = 2
    value: int = 3
    rank: int = 5
    causal: bool = True
    window: int = 0
    dtype: str = "f32"
    cuts: int = 1  # c and k_pe may be cut from the latent by an op each
    negative: bool = True  # axes count from the end

    def build(self) -> Module:
        m = Module("test", "cpu", {"N": 64})
        kind, offsets = DTYPES[self.dtype], TensorType(i32, (B + 1,))
        q = TensorType(kind, (N, self.heads, self.nope + self.rope))
        x = TensorType(kind, (S, 8))
        forward = m.add(Function("forward", [("q", q), ("x", x), ("cu_q", offsets), ("cu_k", offsets)]))
        b = Builder(m, forward, kind)
        forward.ret(self.block(b, *forward.args))
        verify(m)
        return m

    def block(self, b: Builder, q: Any, x: Any, cu_q: Any, cu_k: Any) -> Any:
        columns, within = (-1, -1) if self.negative else (1, 2)
        latent = b.project(x, "down", self.rank + self.rope, out="latent")
        cuts = [
            b.split(latent, sizes=(self.rank, self.rope), axis=columns, out=("c", "pe"))
            for _ in range(self.cuts)
        ]
        kv = b.project(cuts[0][0], "up", self.heads * (self.nope + self.value), out="kv")
        kv = b.reshape(kv, shape=(S, self.heads, self.nope + self.value), out="kv.heads")
        k_nope, v = b.split(kv, sizes=(self.nope, self.value), axis=within, out=("k_nope", "v"))
        k_pe = b.broadcast(cuts[-1][1], axis=within - 1, size=self.heads, out="pe.heads")
        k = b.concat(k_nope, k_pe, axis=within, out="k")
        return b.attention(q, k, v, cu_q, cu_k, scale=0.6, causal=self.causal, window=self.window, out="o")

    def inputs(self, batch: list[tuple[int, int]], seed: int = 0) -> list[torch.Tensor]:
        """For each sequence its new tokens and the older ones."""
        news, keys = [n for n, _ in batch], [n + old for n, old in batch]
        q = tokens(sum(news), self.heads * (self.nope + self.rope), seed, self.dtype)
        cu_q, cu_k = (torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (news, keys))
        x = tokens(sum(keys), 8, seed + 1, self.dtype)
        return [q.view(-1, self.heads, self.nope + self.rope), x, cu_q, cu_k]


latents = st.builds(
    Latent,
    heads=st.integers(1, 4),
    nope=st.integers(1, 5),
    rope=st.integers(1, 4),
    value=st.integers(1, 5),
    rank=st.integers(1, 6),
    causal=st.booleans(),
    window=st.sampled_from([0, 2]),
    cuts=st.sampled_from([1, 2]),
    negative=st.booleans(),
)


@given(
    block=latents,
    batch=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=3),
    passes=st.permutations(["canonicalise", "expert-grouping", "mla-absorb"]),
    seed=st.integers(0, 99),
)
def test_same_result_in_any_order(
    block: Latent, batch: list[tuple[int, int]], passes: list[str], seed: int
) -> None:
    m = block.build()
    weights, args = random_weights(m, seed), block.inputs(batch, seed)
    before = interpret(m, weights, *args)
    run(",".join(passes), m)
    assert op_names(m) == ["linear", "latent_attention"]
    assert print_module(parse_module(print_module(m))) == print_module(m)
    close(before, interpret(m, weights, *args), tolerance=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_low_precision(dtype: str) -> None:
    """Keys and values were rounded, and no longer are: two units in the last place at most."""
    block = Latent(dtype=dtype)
    m = block.build()
    weights, args = random_weights(m), block.inputs([(3, 4), (1, 9)])
    before = interpret(m, weights, *args)
    PassManager(pipeline(2)).run(m)
    close(
        before.float(), interpret(m, weights, *args).float(), tolerance=2**-7 if dtype == "bf16" else 2**-10
    )


def test_names_do_not_matter() -> None:
    text = print_module(Latent().build(), derived=False)
    for old, new in [("up.weight", "zoo.lion"), ("%latent", "%a"), ("%pe", "%b"), ("%kv", "%c.all")]:
        assert old in text
        text = text.replace(old, new)
    m = parse_module(text)
    run("mla-absorb", m)
    assert op_names(m) == ["linear", "latent_attention"]


# Where absorbing stops to pay.
def flops(queries: int, keys: int, nope: int, rope: int, value: int, rank: int) -> tuple[int, int]:
    """Of a head, expanded and absorbed, product by product."""
    expanded = 2 * keys * rank * (nope + value)  # k_nope and v of each key
    expanded += 2 * queries * keys * (nope + rope) + 2 * queries * keys * value
    absorbed = 2 * queries * nope * rank + 2 * queries * rank * value  # q_lat, and o of o_lat
    absorbed += 2 * queries * keys * (rank + rope) + 2 * queries * keys * rank
    return expanded, absorbed


def test_deepseek_v3_absorbs_below_171_tokens() -> None:
    assert crossover(nope=128, value=128, rank=512) == 171
    queries, keys = 170, 10**7
    assert flops(queries, keys, nope=128, rope=64, value=128, rank=512) == (
        640 * queries * keys + 262_144 * keys,
        2176 * queries * keys + 262_144 * queries,
    )


@pytest.mark.parametrize(
    ("name", "layers"),
    [("deepseek-v3", 2), ("deepseek-v2", 2), ("deepseek-v2-lite", 2), ("deepseek-moe-16b", 0)],
)
def test_every_layer_of_mla_is_absorbed(name: str, layers: int) -> None:
    """The dense and the MoE layers' function; DeepSeek's first MoE model has plain attention."""
    m = lower(preset(name))
    (done,) = run("mla-absorb", m)
    assert done.fired.get("absorb", 0) == layers
    below = [op.attrs["absorb_below"] for f in m for op in f.ops if op.name == "latent_attention"]
    assert below == [171] * layers


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 300), st.integers(1, 600))
def test_the_crossover_is_where_the_flops_cross(nope: int, rope: int, value: int, rank: int) -> None:
    below, keys = crossover(nope, value, rank), 10**12
    if below == ALWAYS:
        assert 2 * rank <= nope + value
        below = 10**6
    else:
        expanded, absorbed = flops(below, keys, nope, rope, value, rank)
        assert expanded <= absorbed
    expanded, absorbed = flops(below - 1, keys, nope, rope, value, rank)
    assert absorbed < expanded
    assert below > 1, "decode is always absorbed"


@pytest.mark.parametrize(
    ("text", "below"),
    [("mla-absorb", 45), ("mla-absorb{absorb_below=0}", 0), ("mla-absorb{absorb_below=99}", 99)],
)
def test_the_threshold_can_be_given(text: str, below: int) -> None:
    m = Latent(rank=5, nope=4, value=5).build()  # 5·9 / (10 - 9) = 45
    run(text, m)
    (op,) = [op for op in m["forward"].ops if op.name == "latent_attention"]
    assert op.attrs["absorb_below"] == below


def test_a_negative_threshold_is_a_mistake() -> None:
    with pytest.raises(BadOption, match="absorb_below must not be negative"):
        parse_pipeline("mla-absorb{absorb_below=-1}")


# Why not.
EXPANDED = func(
    "@forward(%q: f32[N,2,6], %latent: f32[S,7], %cu_q: i32[B+1], %cu_k: i32[B+1]) -> f32[N,2,3]",
    "param $w: f32[14,5]",
    "%c, %pe = split(%latent) {sizes=[5,2]} : f32[S,5], f32[S,2]",
    "%kv = linear(%c, $w) : f32[S,14]",
    "%kv.heads = reshape(%kv) {shape=[S,2,7]} : f32[S,2,7]",
    "%k_nope, %v = split(%kv.heads) {sizes=[4,3]} : f32[S,2,4], f32[S,2,3]",
    "%pe.heads = broadcast(%pe) {axis=1, size=2} : f32[S,2,2]",
    "%k = concat(%k_nope, %pe.heads) : f32[S,2,6]",
    "%o = attention(%q, %k, %v, %cu_q, %cu_k) {scale=0.6} : f32[N,2,3]",
    "return %o",
)
KEYS = "concat(%k_nope, %pe.heads) : f32[S,2,6]"


def also_returns(name: str, type: str) -> Callable[[str], str]:
    return replaced(("-> f32[N,2,3]", f"-> (f32[N,2,3], {type})"), ("return %o", f"return %o, %{name}"))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        pytest.param(
            replaced(("%latent: f32[S,7],", "%latent: f32[S,7], %other: f32[S,7],"),
                     ("%kv =", "%_c, %pe2 = split(%other) {sizes=[5,2]} : f32[S,5], f32[S,2]\n%kv ="),
                     ("broadcast(%pe)", "broadcast(%pe2)")),
            "%other and %latent are not the same",
            id="two-latents",
        ),
        pytest.param(
            replaced(("%kv =", "%_c, %pe2, %_d = split(%latent) {sizes=[3,2,2]}"
                               " : f32[S,3], f32[S,2], f32[S,2]\n%kv ="),
                     ("broadcast(%pe)", "broadcast(%pe2)")),
            "%latent is cut into [5, 2] for c and [3, 2, 2] for k_pe",
            id="other-columns",
        ),
        pytest.param(
            replaced(("%latent: f32[S,7]", "%latent: f32[S,8]"),
                     ("%c, %pe = split(%latent) {sizes=[5,2]} : f32[S,5], f32[S,2]",
                      "%c, %pe, %_d = split(%latent) {sizes=[5,2,1]} : f32[S,5], f32[S,2], f32[S,1]")),
            "%latent is cut into [5, 2, 1] for c and [5, 2, 1] for k_pe",
            id="more-than-c-and-k_pe",
        ),
        pytest.param(
            replaced(("sizes=[5,2]} : f32[S,5], f32[S,2]", "sizes=[2,5]} : f32[S,2], f32[S,5]"),
                     ("%c, %pe", "%pe, %c")),
            "%c is result 1 of split",
            id="k_pe-before-c",
        ),
        pytest.param(
            replaced(("param $w", "param $b: f32[14]\nparam $w"), ("(%c, $w)", "(%c, $w, $b)")),
            "has bias $b",
            id="bias",
        ),
        pytest.param(
            replaced(("%kv =", "%n = rms_norm(%c, $n) {eps=0.1} : f32[S,5]\n%kv ="), ("(%c, $w)", "(%n, $w)"),
                     ("param $w", "param $n: f32[5]\nparam $w")),
            "%n comes from rms_norm, not split",
            id="norm-in-between",
        ),
        pytest.param(
            replaced((KEYS, "concat(%pe.heads, %k_nope) : f32[S,2,6]")),
            "%pe.heads comes from broadcast, not split",
            id="rotary-part-first",
        ),
        pytest.param(
            replaced(("%k_nope, %v = split(%kv.heads) {sizes=[4,3]} : f32[S,2,4], f32[S,2,3]",
                      "%v, %k_nope = split(%kv.heads) {sizes=[3,4]} : f32[S,2,3], f32[S,2,4]")),
            "%k_nope is result 1 of split",
            id="values-before-keys",
        ),
        pytest.param(
            replaced(("%k =", "%kv2 = linear(%c, $w) : f32[S,14]\n%k ="),
                     ("%k =", "%h2 = reshape(%kv2) {shape=[S,2,7]} : f32[S,2,7]\n%k ="),
                     ("%k =", "%_k, %v2 = split(%h2) {sizes=[4,3]} : f32[S,2,4], f32[S,2,3]\n%k ="),
                     ("%k, %v,", "%k, %v2,")),
            "keys and values are cut from two: %kv.heads and %h2",
            id="two-expansions",
        ),
        pytest.param(
            replaced(("%q: f32[N,2,6]", "%q: f32[N,4,6]"), ("-> f32[N,2,3]", "-> f32[N,4,3]"),
                     ("{scale=0.6} : f32[N,2,3]", "{scale=0.6} : f32[N,4,3]")),
            "4 query heads share 2 key heads",
            id="grouped-queries",
        ),
        pytest.param(
            replaced(("%k_nope, %v = split(%kv.heads) {sizes=[4,3]} : f32[S,2,4], f32[S,2,3]",
                      "%k_nope, %v, %_u = split(%kv.heads) {sizes=[4,2,1]}"
                      " : f32[S,2,4], f32[S,2,2], f32[S,2,1]"),
                     ("-> f32[N,2,3]", "-> f32[N,2,2]"),
                     ("{scale=0.6} : f32[N,2,3]", "{scale=0.6} : f32[N,2,2]")),
            "%kv.heads is cut into 3 parts",
            id="a-third-part",
        ),
        pytest.param(
            replaced((KEYS, KEYS.replace("pe.heads", "turned")),
                     ("%k =", "%turned = sigmoid(%pe.heads) : f32[S,2,2]\n%k =")),
            "%turned comes from sigmoid, not broadcast",
            id="k_pe-changed-per-head",
        ),
        pytest.param(
            also_returns("kv", "f32[S,14]"),
            "%kv is used more than once, by reshape and return",
            id="kv-in-use",
        ),
        pytest.param(
            also_returns("v", "f32[S,2,3]"),
            "%v is used more than once, by attention and return",
            id="v-in-use",
        ),
        pytest.param(
            also_returns("k", "f32[S,2,6]"),
            "%k is used more than once, by attention and return",
            id="k-in-use",
        ),
    ],
)  # fmt: skip
def test_why_not(edit: Callable[[str], str], reason: str) -> None:
    m = module(edit(EXPANDED))
    before = print_module(m)
    assert reasons(run("mla-absorb", m), "absorb") == [reason]
    assert print_module(m) == before, "a rule that doesn't fire leaves no trace"


def test_other_axes_are_not_mistaken_for_the_heads() -> None:
    """All sizes are 2 or 4, so that cuts along any axis have fitting shapes."""
    square = func(
        "@forward(%q: f32[N,2,4], %latent: f32[2,4], %cu: i32[B+1]) -> f32[N,2,2]",
        "param $w: f32[8,2]",
        "%c, %pe = split(%latent) {sizes=[2,2]} : f32[2,2], f32[2,2]",
        "%kv = linear(%c, $w) : f32[2,8]",
        "%h = reshape(%kv) {shape=[2,2,4]} : f32[2,2,4]",
        "%k_nope, %v = split(%h) {sizes=[2,2]} : f32[2,2,2], f32[2,2,2]",
        "%pe.h = broadcast(%pe) {axis=1, size=2} : f32[2,2,2]",
        "%k = concat(%k_nope, %pe.h) : f32[2,2,4]",
        "%o = attention(%q, %k, %v, %cu, %cu) {scale=0.6} : f32[N,2,2]",
        "return %o",
    )
    assert run("mla-absorb", module(square))[0].changed
    for edit, reason in [
        (replaced(("{axis=1, size=2}", "{axis=0, size=2}")), "k_pe repeats along axis 0, not once a head"),
        (
            replaced(
                ("%latent: f32[2,4]", "%latent: f32[4,2]"),
                ("split(%latent) {sizes=[2,2]}", "split(%latent) {axis=0, sizes=[2,2]}"),
            ),
            "%latent is not cut along its columns",
        ),
        (
            replaced(
                ("reshape(%kv) {shape=[2,2,4]} : f32[2,2,4]", "reshape(%kv) {shape=[2,4,2]} : f32[2,4,2]"),
                ("split(%h) {sizes=[2,2]}", "split(%h) {axis=1, sizes=[2,2]}"),
            ),
            "%h is not cut along each head's columns",
        ),
    ]:
        assert reasons(run("mla-absorb", module(edit(square))), "absorb") == [reason]


def test_what_is_free_may_be_used_elsewhere() -> None:
    """The latent, its parts and the weight: what an indexer or another layer may read too."""
    edit = replaced(
        ("-> f32[N,2,3]", "-> (f32[N,2,3], f32[S,5], f32[S,2,2], f32[S,7])"),
        ("return %o", "return %o, %c, %pe.heads, %latent"),
    )
    m = module(edit(EXPANDED))
    run("mla-absorb", m)
    assert op_names(m) == ["split", "broadcast", "latent_attention"]


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = Latent().build()
    golden("mla.before.moec", golden_text(m))
    run("mla-absorb", m)
    golden("mla.after.moec", golden_text(m))
