"""mla-absorb: same results, where absorbing stops to pay, and why it stays away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadOption
from moec.ir import Module, parse_module, print_module
from moec.models import lower, preset
from moec.passes import parse_pipeline, pipeline
from moec.passes.latent_forms import ALWAYS, Sizes, crossover
from moec.passes.manager import PassManager
from tests.passes.cached import BATCHES, Latent, latents
from tests.passes.modules import (
    close,
    golden_text,
    op_names,
    random_weights,
    reasons,
    replaced,
    run,
)

BODY = ["linear", "reshape", "linear", "cache_write"]
ABSORBED = ["split", "head_linear", "concat", "latent_attention", "head_linear"]
EXPANDED = ["cache_read", "split", "linear", "reshape", "split", "broadcast", "concat", "attention"]
AFTER = ["reshape", "linear", "add"]


def sorted_ops(m: Module, function: str = "layer0") -> list[str]:
    return sorted(op_names(m, function))


@given(
    block=latents,
    batch=BATCHES,
    below=st.sampled_from([1, 2, 3, 4, 99]),
    passes=st.permutations(["canonicalise", "expert-grouping", "mla-absorb", "paged-attention"]),
    seed=st.integers(0, 99),
)
def test_same_result_in_any_order(
    block: Latent, batch: list[tuple[int, int]], below: int, passes: list[str], seed: int
) -> None:
    """Prefill, decode, chunks over a cached prefix, empty sequences: in one batch, short and long."""
    m = block.build()
    weights, args = random_weights(m, seed), block.inputs(batch, seed)
    before = block.run(m, weights, args)
    run(",".join(passes).replace("mla-absorb", f"mla-absorb{{absorb_below={below}}}"), m)
    found = op_names(m, "layer0")
    assert ("latent_attention" in found) == (below > 1) and "attention" in found
    assert print_module(parse_module(print_module(m))) == print_module(m)
    close(before, block.run(m, weights, args), tolerance=1e-5)


def test_what_becomes_of_a_layer() -> None:
    """One split of the batch for both layers, outside of them."""
    m = Latent(bodies=2).build()
    run("mla-absorb,canonicalise", m)
    assert op_names(m) == ["split_batch", "prefix_sum", "call", "call"]
    segments = ["take_rows", *ABSORBED, "take_rows", *EXPANDED, "merge_rows"]
    for body in ("layer0", "layer1"):
        assert sorted_ops(m, body) == sorted([*BODY, *segments, *AFTER])


def test_layers_of_other_sizes_split_the_batch_elsewhere() -> None:
    m = Latent(bodies=2, target="").build()
    text = print_module(m, derived=False)
    second = text.index("func @layer1")
    wide = replaced(
        ("[14,5]", "[16,5]"),
        ("[S,14]", "[S,16]"),
        ("[S,2,7]", "[S,2,8]"),
        ("sizes=[4,3]", "sizes=[4,4]"),
        ("[S,2,3]", "[S,2,4]"),
        ("[N,2,3]", "[N,2,4]"),
        ("[N,6]", "[N,8]"),
        ("[8,6]", "[8,8]"),
    )
    m = parse_module(text[:second] + wide(text[second:]))
    weights, args = random_weights(m), Latent().inputs([(1, 4), (30, 3), (13, 0)])
    before = Latent().run(m, weights, args)
    run("mla-absorb", m)
    splits = [op for op in m["forward"].ops if op.name == "split_batch"]
    assert [op.attrs["below"] for op in splits] == [12, 20]
    assert len({op.attrs[key] for op in splits for key in ("rows", "short_entries", "long_entries")}) == 6
    close(before, Latent().run(m, weights, args), tolerance=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_low_precision(dtype: str) -> None:
    """Keys and values were rounded, and no longer are: two units in the last place at most."""
    block = Latent(dtype=dtype)
    m = block.build()
    weights, args = random_weights(m), block.inputs([(3, 4), (1, 9)])
    before = block.run(m, weights, args)
    PassManager(pipeline(2)).run(m)
    tolerance = 2**-7 if dtype == "bf16" else 2**-10
    close(before.float(), block.run(m, weights, args).float(), tolerance=tolerance)


def test_names_do_not_matter() -> None:
    text = print_module(Latent().build(), derived=False)
    for old, new in [("up.weight", "zoo.lion"), ("%latent", "%a"), ("%pe", "%b"), ("%kv.heads", "%c.all")]:
        assert old in text
        text = text.replace(old, new)
    m = parse_module(text)
    run("mla-absorb", m)
    assert "latent_attention" in op_names(m, "layer0")
    assert {"zoo.lion", "zoo.lion.w_uk", "zoo.lion.w_uv"} <= m["layer0"].params.keys()


# Weights.
@pytest.mark.parametrize("fp8", [None, (4, 4)])
def test_the_halves_of_the_weight_are_views_of_it(fp8: tuple[int, int] | None) -> None:
    """Heads of 7 rows, in FP8 blocks of 4: what straddles them is dequantised whole, then cut."""
    m = Latent(fp8=fp8).build()
    run("mla-absorb", m)
    load = [op.name for op in m["weights.layer0"].ops]
    assert load == [*(["scaled", "dequant"] if fp8 else []), "bind", "reshape", "split", "bind", "bind"]
    shapes = {name: p.type.shape for name, p in m["layer0"].params.items() if name.startswith("up")}  # type: ignore[union-attr]
    assert shapes == {"up.weight": (14, 5), "up.w_uk": (2, 4, 5), "up.w_uv": (2, 3, 5)}


# Where absorbing stops to pay.
def sizes(
    nope: int = 128, rope: int = 64, value: int = 128, rank: int = 512, heads: int = 128, dtype: str = "bf16"
) -> Sizes:
    return Sizes(heads, nope, rope, value, rank, dtype)


def flops(queries: int, keys: int, nope: int, rope: int, value: int, rank: int) -> tuple[int, int]:
    """Of a head, expanded and absorbed, product by product."""
    expanded = 2 * keys * rank * (nope + value)  # k_nope and v of each key
    expanded += 2 * queries * keys * (nope + rope) + 2 * queries * keys * value
    absorbed = 2 * queries * nope * rank + 2 * queries * rank * value  # q_lat, and o of o_lat
    absorbed += 2 * queries * keys * (rank + rope) + 2 * queries * keys * rank
    return expanded, absorbed


def test_deepseek_v3_absorbs_below_171_tokens_by_flops() -> None:
    """262,144 / (2176 - 640) = 170.7 (a target without a device: FLOPs alone)."""
    assert crossover(sizes()) == 171
    queries, keys = 170, 10**7
    assert flops(queries, keys, nope=128, rope=64, value=128, rank=512) == (
        640 * queries * keys + 262_144 * keys,
        2176 * queries * keys + 262_144 * queries,
    )


def test_deepseek_v3_absorbs_below_199_tokens_by_time_on_an_h100() -> None:
    """For a cached entry, at 3.0 TB/s and 798 TFLOP/s, in ns: making its keys and values takes 42.0, reading
    them 27.3, which bounds few queries; absorbed, each query takes 0.349: the two meet at 198.7.
    """
    heads, bandwidth, rate = 128, 3.0e12, 798e12
    make = heads * 262_144 / rate
    read = heads * (192 + 128) * 2 / bandwidth  # k and v in bf16: 81,920 bytes
    assert (make * 1e9, read * 1e9) == (pytest.approx(42.05, abs=0.01), pytest.approx(27.31, abs=0.01))
    assert heads * 640 * 198 / rate < read, "attention over 198 queries is bound by memory"
    meet = (make + read) / (heads * 2176 / rate)
    assert meet == pytest.approx(198.7, abs=0.05)
    assert crossover(sizes(), "sm_90a") == 199


@pytest.mark.parametrize(
    ("target", "dtype", "heads", "below"),
    [
        # 153 FLOP for a byte: attention over 171 queries is bound by its products, as the projection is.
        ("sm_80", "bf16", 128, 171),
        ("sm_89", "bf16", 128, 244),
        ("sm_100a", "bf16", 128, 204),
        ("sm_90a", "f32", 128, 171),  # 22 FLOP for a byte
        # With one head its products are as little as the bytes of the latent, of its key and of its value.
        ("sm_90a", "bf16", 1, 266),
    ],
)
def test_the_crossover_moves_with_the_device(target: str, dtype: str, heads: int, below: int) -> None:
    assert crossover(sizes(heads=heads, dtype=dtype), target) == below


@pytest.mark.parametrize(
    ("name", "target", "layers", "expected"),
    [
        ("deepseek-v3", "cpu", 2, 171),
        ("deepseek-v3", "sm_90a", 2, 199),
        ("deepseek-v2", "sm_90a", 2, 199),
        ("deepseek-v2-lite", "", 2, 171),
        ("deepseek-moe-16b", "cpu", 0, 0),
    ],
)
def test_every_layer_of_mla_is_absorbed(name: str, target: str, layers: int, expected: int) -> None:
    """The dense and the MoE layers' function, q_lora or none; DeepSeek's first model has plain attention."""
    m = lower(preset(name))
    m.target = target
    (done,) = run("mla-absorb", m)
    assert done.fired.get("absorb", 0) == layers
    splits = [op.attrs["below"] for op in m["step"].ops if op.name == "split_batch"]
    assert splits == [expected] * (layers > 0)
    scales = {op.attrs["scale"] for f in m for op in f.ops if op.name in ("latent_attention", "attention")}
    assert len(scales) == 1


def test_yarn_s_scale_stays() -> None:
    m = lower(preset("deepseek-v3"))
    run("mla-absorb", m)
    (scale,) = {op.attrs["scale"] for f in m for op in f.ops if op.name == "latent_attention"}
    assert scale == pytest.approx(0.135234, abs=1e-6)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 300), st.integers(1, 600))
def test_the_crossover_is_where_the_flops_cross(nope: int, rope: int, value: int, rank: int) -> None:
    below, keys = crossover(sizes(nope, rope, value, rank, 2)), 10**12
    if below == ALWAYS:
        assert 2 * rank <= nope + value
        below = 10**6
    else:
        expanded, absorbed = flops(below, keys, nope, rope, value, rank)
        assert expanded <= absorbed
    expanded, absorbed = flops(below - 1, keys, nope, rope, value, rank)
    assert absorbed < expanded
    assert below > 1, "decode is always absorbed"


def test_where_absorbing_always_pays_nothing_is_expanded() -> None:
    block = Latent(rank=2, nope=4, value=3)  # rows of the latent are narrower than keys and values
    m = block.build()
    weights, args = random_weights(m), block.inputs([(9, 5), (1, 3)])
    before = block.run(m, weights, args)
    run("mla-absorb,canonicalise", m)
    assert sorted_ops(m) == sorted([*BODY, *ABSORBED, *AFTER])
    assert op_names(m) == ["call"]
    close(before, block.run(m, weights, args), tolerance=1e-5)


@pytest.mark.parametrize(("text", "below"), [("mla-absorb", 45), ("mla-absorb{absorb_below=99}", 99)])
def test_the_threshold_can_be_given(text: str, below: int) -> None:
    m = Latent(rank=5, nope=4, value=5, target="").build()  # 5·9 / (10 - 9) = 45
    run(text, m)
    (op,) = [op for op in m["forward"].ops if op.name == "split_batch"]
    assert op.attrs["below"] == below


@pytest.mark.parametrize("below", [0, 1])
def test_a_threshold_that_no_sequence_is_below(below: int) -> None:
    m = Latent().build()
    before = print_module(m)
    runs = run(f"mla-absorb{{absorb_below={below}}}", m)
    assert reasons(runs, "absorb", "layer0") == [f"absorb_below is {below}: no sequence has fewer new tokens"]
    assert print_module(m) == before


def test_a_negative_threshold_is_a_mistake() -> None:
    with pytest.raises(BadOption, match="absorb_below must not be negative"):
        parse_pipeline("mla-absorb{absorb_below=-1}")


def test_golden(golden: Callable[[str, str], None]) -> None:
    m = Latent().build()
    golden("mla.before.moec", golden_text(m))
    run("mla-absorb", m)
    golden("mla.after.moec", golden_text(m))
