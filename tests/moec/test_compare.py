"""``moec compare`` against the published figures, each counted by hand from the reports' dimensions.

Nothing here is the cost model's: the sums are written out once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moec import models, passes
from moec.compare import compared
from moec.ir.devices import DEVICES
from moec.ir.roofline import Costs
from moec.ir.routing import Uniform

from .conftest import PRESET, Cli

H100 = DEVICES["sm_90a"]
CONTEXT = 4096


def mla(hidden: int, heads: int, q_rank: int = 1536) -> int:
    """q down and up, the latent and its norm, K and V from it, the way out; two norms of the layer."""
    q = hidden * q_rank + q_rank + q_rank * heads * 192
    return q + hidden * 576 + 512 + 512 * heads * 256 + heads * 128 * hidden + 2 * hidden


def mlp(hidden: int, width: int) -> int:
    return 3 * hidden * width


# (total, active, embedding, cache elements a token, attention's FLOPs for each token, key and all layers)
V3_MOE = 58 * (256 * 7168 + 256 + mlp(7168, 2048))
V3_DENSE = 61 * mla(7168, 128) + 3 * mlp(7168, 18432) + V3_MOE + 2 * 129280 * 7168 + 7168
V2_DENSE = (
    60 * mla(5120, 128)
    + mlp(5120, 12288)
    + 59 * (160 * 5120 + mlp(5120, 2 * 1536))
    + 2 * 102400 * 5120
    + 5120
)
V1_DENSE = (
    28 * (4 * 2048 * 2048 + 2 * 2048)
    + mlp(2048, 10944)
    + 27 * (64 * 2048 + mlp(2048, 2 * 1408))
    + 2 * 102400 * 2048
    + 2048
)
LLAMA = 95 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + mlp(8192, 22016) + 2 * 8192) + 2 * 102400 * 8192 + 8192
HAND = {
    "deepseek-v3": (
        V3_DENSE + 58 * 256 * mlp(7168, 2048),
        V3_DENSE + 58 * 8 * mlp(7168, 2048),
        129280 * 7168,
        61 * 576,
        61 * 128 * 2176,
    ),
    "deepseek-v2": (
        V2_DENSE + 59 * 160 * mlp(5120, 1536),
        V2_DENSE + 59 * 6 * mlp(5120, 1536),
        102400 * 5120,
        60 * 576,
        60 * 128 * 2176,
    ),
    "deepseek-moe-16b": (
        V1_DENSE + 27 * 64 * mlp(2048, 1408),
        V1_DENSE + 27 * 6 * mlp(2048, 1408),
        102400 * 2048,
        28 * 2 * 2048,
        28 * 16 * 2 * 2 * 128,
    ),
    "deepseek-67b": (LLAMA, LLAMA, 102400 * 8192, 95 * 2 * 8 * 128, 95 * 64 * 2 * 2 * 128),
}
PUBLISHED = {  # billions in all and active; elements a token
    "deepseek-v3": (671.0, 37.6, 35_136),
    "deepseek-v2": (235.7, 21.4, 34_560),
    "deepseek-moe-16b": (16.4, 2.8, 114_688),
    "deepseek-67b": (67.4, 67.4, 194_560),
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {name: compared(name, H100, Uniform(), context=CONTEXT, batch=1) for name in HAND}


@pytest.mark.parametrize("name", HAND)
def test_weights_and_cache_are_the_published_ones(name: str, found: dict[str, Any]) -> None:
    model, (total, active, _, elements, _) = found[name], HAND[name]
    assert (model["weights"], model["weights_active"]) == (total, active)
    assert model["cache_elements_per_token"] == elements
    assert model["cache_bytes_per_token"] == 2 * elements
    billions, billions_active, published = PUBLISHED[name]
    assert (round(total / 1e9, 1), round(active / 1e9, 1)) == (billions, billions_active)
    assert elements == published


def test_v2_s_cache_is_82_percent_smaller_than_the_67b_model_s(found: dict[str, Any]) -> None:
    v2, dense = (found[n]["cache_elements_per_token"] for n in ("deepseek-v2", "deepseek-67b"))
    assert 1 - v2 / dense == pytest.approx(0.822, abs=5e-4)


@pytest.mark.parametrize("name", HAND)
def test_flops_are_two_a_weight_and_attention(name: str, found: dict[str, Any]) -> None:
    """Two for each active weight but the embedding's, which are looked up; and what grows with keys."""
    model, (_, active, embedding, _, attention) = found[name], HAND[name]
    by_hand = 2 * (active - embedding) + attention * CONTEXT
    assert model["flops_per_token"] == pytest.approx(by_hand, rel=2e-3)


@pytest.mark.parametrize("name", HAND)
def test_decoding_reads_active_weights_and_the_cache(name: str, found: dict[str, Any]) -> None:
    model, (total, active, embedding, elements, _) = found[name], HAND[name]
    # bf16 but for the routers' biases. MLA holds kv_b_proj for long prompts, its halves for short ones.
    layers = elements // 576 if name in ("deepseek-v2", "deepseek-v3") else 0
    assert model["weights_bytes"] == pytest.approx(2 * (total + layers * 512 * 128 * 256), rel=1e-6)
    moved = model["decode"]["bytes"]
    least = 2 * (active - embedding) + 2 * elements * CONTEXT
    assert least < moved < 1.1 * least
    assert model["decode"]["seconds"] == pytest.approx(moved / H100.bandwidth, rel=0.01)


def test_a_batch_reads_the_weights_once_and_each_sequence_s_cache(found: dict[str, Any]) -> None:
    model = compared("deepseek-67b", H100, Uniform(), context=CONTEXT, batch=32)
    one = found["deepseek-67b"]
    _, active, embedding, elements, _ = HAND["deepseek-67b"]
    least = 2 * (active - embedding) + 32 * 2 * elements * CONTEXT
    assert least < model["decode"]["bytes"] < 1.6 * least
    assert model["flops_per_token"] == one["flops_per_token"]
    assert model["decode"]["flops"] == pytest.approx(32 * one["decode"]["flops"])


def layer_bytes(pipeline: str, tokens: int) -> float:
    """What the MoE of one DeepSeek-V3 layer moves, by its IR after ``pipeline``."""
    moe = models.preset("deepseek-v3").layers[3].mlp
    module = models.lower(models.Layer(moe, hidden=7168))
    module.target = "sm_90a"
    passes.PassManager(passes.parse_pipeline(pipeline)).run(module)
    return Costs(module, H100, {"N": tokens}).function("forward").bytes


def test_the_traffic_of_v3_s_moe_layer_in_bf16() -> None:
    """26.1 GB at 4096 tokens, all 256 experts having rows; every operand and result once."""
    t, h, e, i, rows = 4096, 7168, 256, 2048, 8 * 4096
    off = 4 * (e + 1)
    by_hand = [
        2 * t * h + 2 * e * h + 4 * t * e,  # logits
        4 * t * e + 4 * e + 8 * rows,  # route: logits, bias; weights and ids
        4 * rows + 4 * rows + off,  # sort
        2 * t * h + 4 * rows + 2 * rows * h,  # gather
        2 * rows * h + 2 * e * 2 * i * h + off + 2 * rows * 2 * i,  # gate and up
        2 * rows * 2 * i + 2 * rows * i,  # swiglu
        2 * rows * i + 2 * e * h * i + off + 2 * rows * h,  # down
        2 * t * h + 2 * 2 * i * h + 2 * t * 2 * i,  # the shared expert: gate and up,
        2 * t * 2 * i + 2 * t * i,  # swiglu,
        2 * t * i + 2 * h * i + 2 * t * h,  # down
        2 * rows * h + 4 * rows + 4 * rows + 4 * t * h,  # combine, to fp32
        (4 + 2) * t * h + (2 + 2 + 2) * t * h,  # rounded; the shared expert's result added
    ]
    # The published 25.7 GB take the shared expert for one op, and its result for an operand of combine.
    inside_shared = 2 * (2 * t * 2 * i + 2 * t * i)
    inside_combine = 16 * t * h - (2 + 2) * t * h
    assert (sum(by_hand) - inside_shared - inside_combine) / 1e9 == pytest.approx(25.7, abs=0.05)
    assert layer_bytes("canonicalise,expert-grouping", t) == pytest.approx(sum(by_hand), rel=1e-9)


def test_the_traffic_of_v3_s_moe_layer_in_fp8() -> None:
    """12.9 GB: fp8 values with a scale for 128 of them; no gathered copy, gate and up never stored."""
    t, h, e, i, rows = 4096, 7168, 256, 2048, 8 * 4096
    off, scaled = 4 * (e + 1), 1 + 4 / 128  # bytes of a value with its share of a scale

    def weight(n: int, k: int) -> int:
        return n * k + 4 * (n // 128) * (k // 128)

    by_hand = {
        "logits": 2 * t * h + 2 * e * h + 4 * t * e,
        "route and sort": 4 * t * e + 4 * e + 8 * rows + 8 * rows + off,
        "quant": 2 * t * h + t * h * scaled,
        "gate, up, swiglu, quant": t * h * scaled + e * weight(2 * i, h) + 4 * rows + off + rows * i * scaled,
        "down": rows * i * scaled + e * weight(h, i) + off + 4 * rows + 2 * rows * h,
        "shared gate and up": t * h * scaled + weight(2 * i, h) + 2 * t * 2 * i,
        "shared swiglu, quant": 2 * t * 2 * i + 2 * t * i + 2 * t * i + t * i * scaled,
        "shared down": t * i * scaled + weight(h, i) + 2 * t * h,
        "combine": 2 * rows * h + 4 * rows + 2 * t * h + 2 * t * h,
    }
    assert by_hand["quant"] / 1e6 == pytest.approx(89.0, abs=0.05)
    assert by_hand["gate, up, swiglu, quant"] / 1e9 == pytest.approx(7.62, abs=0.005)
    assert by_hand["down"] / 1e9 == pytest.approx(4.30, abs=0.005)
    assert sum(by_hand.values()) / 1e9 == pytest.approx(12.9, abs=0.05)
    passes = "canonicalise,expert-grouping,canonicalise,fp8-cast,permute-fusion"
    assert layer_bytes(passes, t) == pytest.approx(sum(by_hand.values()), rel=1e-9)


def test_fp8_halves_what_decoding_reads(found: dict[str, Any]) -> None:
    """All linear weights but the gates and the head are quantised; so are none of the cache's entries."""
    model = compared("deepseek-v3", H100, Uniform(), context=CONTEXT, batch=1, fp8=True)
    total, active, embedding, elements, _ = HAND["deepseek-v3"]
    assert (model["weights"], model["weights_active"]) == (total, active)
    kept = 2 * (58 * 256 * 7168 + 129280 * 7168)  # gates and head, bf16
    quantised = active - embedding - kept // 2
    least = kept + quantised + 2 * elements * CONTEXT
    assert least < model["decode"]["bytes"] < 1.1 * least
    assert model["flops_per_token"] == pytest.approx(found["deepseek-v3"]["flops_per_token"], rel=2e-3)


def test_the_table_and_the_json(cli: Cli) -> None:
    out = cli("compare", "deepseek-v3", "deepseek-v2", "--context", "4096").out
    lines = {" ".join(line.split()[:-2]): line.split()[-2:] for line in out.splitlines() if line.split()[2:]}
    assert lines["weights"] == ["671.0B", "235.7B"]
    assert lines["of these active"] == ["37.6B", "21.4B"]
    assert lines["cache elements a token"] == ["35,136", "34,560"]
    assert lines["cache elements a token and layer"] == ["576", "576"]
    data = cli("compare", PRESET, "--context", "32", "--batch", "2", "--dtype", "f32", "--json").json()
    assert (data["context"], data["batch"], data["device"]) == (32, 2, "sm_90a")
    assert data["models"][0]["cache_bytes"] == 32 * 4 * data["models"][0]["cache_elements_per_token"]


def test_a_package_is_compared_as_it_was_built(cli: Cli, built: Path) -> None:
    spec, package = (
        cli("compare", x, "--target", "cpu", "--context", "32", "--json").json()["models"][0]
        for x in (PRESET, built)
    )
    assert spec["weights"] == package["weights"]
    assert spec["decode"] == package["decode"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("deepsek-v3",), "did you mean"),
        ((PRESET, "--context", "0"), "context is 0"),
        ((PRESET, "--batch", "-1"), "batch is -1"),
        ((PRESET, "--context", "100000000"), "positions"),
        ((PRESET, "--target", "h100"), "no target is called"),
        ((PRESET, "--routing", "zipff:1"), "no routing is called"),
        ((PRESET, "--dtype", "f8"), "no model computes in"),
        ((PRESET, "--figures", "x=1"), "no figure is called"),
    ],
)
def test_what_can_t_be_compared(cli: Cli, args: tuple[str, ...], words: str) -> None:
    done = cli("compare", *args)
    assert (done.code, done.out) == (1, "")
    assert words in done.err and done.err.startswith("error[M0")


def test_a_layer_or_a_built_dtype_is_refused(cli: Cli, built: Path, tmp_path: Path) -> None:
    cli("compare", built, "--dtype", "bf16").refused("M0701", "is built")
    (tmp_path / "my.py").write_text(
        "from moec.models import *\nlayer = Layer(SwiGLU(intermediate=8), hidden=8)\n"
    )
    cli("compare", f"{tmp_path / 'my.py'}:layer").refused("M0701", "a part of a model")
    assert cli("compare").code == 2
