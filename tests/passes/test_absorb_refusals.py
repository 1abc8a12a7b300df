"""mla-absorb: why it stays away."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moec.ir import parse_module, print_module
from tests.passes.cached import Latent
from tests.passes.modules import func, module, op_names, reasons, replaced, run

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
    assert reasons(run("mla-absorb", module(square)), "absorb") == ["%latent is not read from a cache"]
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


CACHED = print_module(Latent().build(), derived=False)
RUN = "call @layer0(%x, %kv, %cu_q, %lens, %table, %slots, %cu_k)"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        pytest.param(
            replaced(("prefix_sum(%lens)", "prefix_sum(%others)"),
                     ("@forward(%x: f32[N,8],", "@forward(%x: f32[N,8], %others: i32[B],")),
            "%cu_k isn't known to be the prefix_sum of %lens, by which the cache is read",
            id="offsets-of-other-lengths",
        ),
        pytest.param(
            replaced((RUN, RUN.replace("%cu_k)", "%cu_q)"))),
            "%cu_k isn't known to be the prefix_sum of %lens, by which the cache is read",
            id="offsets-that-are-no-sums",
        ),
        pytest.param(
            replaced(("linear(%c, $up.weight)", "linear(%c, %up)"),
                     ("  %kv.2 =", "  %up = cast($up.weight) {to=f32} : f32[14,5]\n  %kv.2 =")),
            "%up is no parameter",
            id="a-weight-that-is-computed",
        ),
    ],
)  # fmt: skip
def test_why_not_of_a_cache(edit: Callable[[str], str], reason: str) -> None:
    m = parse_module(edit(CACHED))
    before = print_module(m)
    assert reasons(run("mla-absorb", m), "absorb", "layer0") == [reason]
    assert print_module(m) == before, "a rule that doesn't fire leaves no trace"


def test_where_the_layer_is_run_twice_both_runs_must_know() -> None:
    """A second run whose offsets are other sequences' keeps the layer as it is."""
    second = RUN.replace("%x,", "%x.1,").replace("%kv,", "%kv.1,").replace("%cu_k", "%cu_q")
    both = replaced(
        ("  return %x.1, %kv.1\n", f"  %x.2, %kv.2 = {second} {{layers=2..2, scope=layers.*}} : f32[N,8],"
         " cache<f32[7], page=4>\n  return %x.2, %kv.2\n"),
    )  # fmt: skip
    m = parse_module(both(CACHED))
    (reason,) = reasons(run("mla-absorb", m), "absorb", "layer0")
    assert reason.startswith("%cu_k isn't known")
    m = parse_module(both(CACHED).replace(second, second.replace("%cu_q)", "%cu_k)")))
    run("mla-absorb", m)
    assert op_names(m) == ["prefix_sum", "split_batch", "prefix_sum", "call", "call"]


def test_what_is_free_may_be_used_elsewhere() -> None:
    """The latent, its parts and the weight: what an indexer or another layer may read too."""
    edit = replaced(("  %y =", "  %up.rows = linear(%c, $up.weight) : f32[S,14]\n  %y ="))
    m = parse_module(edit(CACHED))
    run("mla-absorb", m)
    assert "latent_attention" in op_names(m, "layer0")
    assert op_names(m, "layer0").count("cache_read") == 2
