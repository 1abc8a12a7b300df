"""benchmarks/gpu's routers and its tuning of peers, with stand-ins for the peers' modules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import moec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VLLM = "vllm.model_executor.layers.fused_moe"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """The modules of benchmarks/gpu by name, as its scripts import them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield lambda name: import_module(f"gpu.{name}")
    for name in [n for n in sys.modules if n == "gpu" or n.startswith("gpu.")]:
        del sys.modules[name]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module that has these attributes, and the packages above it, where imports find it."""

    def put(name: str, **attributes: Any) -> None:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            above = ".".join(parts[:end])
            if above not in sys.modules:
                monkeypatch.setitem(sys.modules, above, ModuleType(above))
        for key, value in attributes.items():
            setattr(sys.modules[name], key, value)

    return put


def v3(gpu: Callable[[str], Any]) -> Any:
    return gpu("shapes").SHAPES["deepseek-v3"]


def drawn(gpu: Callable[[str], Any], shape: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    (given, _) = gpu("problem").draw_inputs(shape, tokens, torch.bfloat16, "cpu", 0, 1)
    return given.logits, gpu("problem").draw_bias(shape, "cpu")


@pytest.mark.parametrize("name", ["deepseek-v3", "v2-lite", "qwen3-next", "tiny-top6"])
def test_the_definition_is_moec_s(name: str, gpu: Callable[[str], Any]) -> None:
    shapes, routers = gpu("shapes"), gpu("routers")
    shape = (shapes.SHAPES | shapes.SELF_TEST_SHAPES)[name]
    logits, bias = drawn(gpu, shape, 65)
    weights, ids = routers.choose(shape, logits.double(), bias)
    theirs, chosen = moec.ops.route(logits, bias, **routers.asked(shape))
    assert torch.equal(ids, chosen) and ids.dtype == torch.int32
    torch.testing.assert_close(weights.float(), theirs)


def test_v3_routes_as_its_model_does(gpu: Callable[[str], Any]) -> None:
    """Against a loop over tokens: 4 of 8 groups by their two best, the bias choosing and not weighing."""
    shape = v3(gpu)
    logits, bias = drawn(gpu, shape, 40)
    assert bias is not None and float(bias.abs().max()) > 1e-3
    weights, ids = gpu("routers").choose(shape, logits.double(), bias)
    changed = 0
    for t, row in enumerate(logits.double().sigmoid().tolist()):
        ranked = [s + b for s, b in zip(row, bias.tolist(), strict=True)]
        groups = sorted(range(8), key=lambda g: -sum(sorted(ranked[32 * g : 32 * g + 32])[-2:]))[:4]
        best = sorted((e for e in range(256) if e // 32 in groups), key=lambda e: -ranked[e])[:8]
        assert ids[t].tolist() == best
        total = sum(row[e] for e in best)
        wanted = torch.tensor([2.5 * row[e] / total for e in best], dtype=torch.float64)
        torch.testing.assert_close(weights[t], wanted, rtol=1e-6, atol=0)
        changed += best != sorted(range(256), key=lambda e: -ranked[e])[:8]
    assert changed  # groups matter


def test_near_ties_are_seen(gpu: Callable[[str], Any]) -> None:
    shapes, routers = gpu("shapes"), gpu("routers")
    plain = shapes.Shape("plain", 4, 8, 8, 2)
    logits = torch.tensor([[3.0, 2.0, 2.0, 0.0], [3.0, 2.0, 1.0, 1.0], [3.0, 3.0, 1.0, 0.0]])
    assert routers.clear(plain, logits, None).tolist() == [False, True, True]
    grouped = shapes.Shape("g", 4, 8, 8, 1, shapes.Router("sigmoid", groups=2, topk_groups=1, biased=True))
    logits = torch.tensor([[3.0, 1.0, 1.0, 3.0], [3.0, 1.0, 2.0, 0.0]])
    assert routers.clear(grouped, logits, torch.zeros(4)).tolist() == [False, True]


def test_vllm_and_sglang_are_asked_for_v3_s_choice(gpu: Callable[[str], Any], install: Any) -> None:
    shape, routers = v3(gpu), gpu("routers")
    logits, bias = drawn(gpu, shape, 3)
    wanted = routers.choose(shape, logits, bias)

    def grouped(**given: Any) -> Any:
        assert given["gating_output"] is logits and given["e_score_correction_bias"] is bias
        del given["hidden_states"], given["gating_output"], given["e_score_correction_bias"]
        assert list(given.values()) == [8, True, 8, 4, "sigmoid", 2.5]
        return wanted

    def gate(
        input: Any,
        bias_: Any,
        num_expert_group: int,
        topk_group: int,
        topk: int,
        routed_scaling_factor: float,
        apply_routed_scaling_factor_on_output: bool,
    ) -> Any:
        assert (num_expert_group, topk_group, topk, routed_scaling_factor) == (8, 4, 8, 2.5)
        assert input is logits and bias_ is bias and apply_routed_scaling_factor_on_output
        return wanted

    install(f"{VLLM}.router.grouped_topk_router", fused_grouped_topk=grouped)
    install("sgl_kernel", moe_fused_gate=gate)
    for name in ("vLLM", "triton_kernels", "SGLang", "DeepGEMM"):
        assert routers.ROUTERS[name](shape, bias)(logits, logits) is wanted

    def before(input: Any, bias_: Any, **how: Any) -> Any:  # its kernel didn't scale yet
        return wanted[0] / 2.5, wanted[1]

    install("sgl_kernel", moe_fused_gate=before)
    torch.testing.assert_close(routers.sglang_router(shape, bias)(logits, logits)[0], wanted[0])


def test_without_either_deep_gemm_has_moec_s_router(gpu: Callable[[str], Any]) -> None:
    shape, routers = v3(gpu), gpu("routers")
    logits, bias = drawn(gpu, shape, 3)
    found = routers.fastest_router(shape, bias)(logits, logits)
    assert torch.equal(found[1], routers.choose(shape, logits, bias)[1])


def test_plain_routers_renormalise_where_the_shape_says(gpu: Callable[[str], Any], install: Any) -> None:
    shapes, routers = gpu("shapes"), gpu("routers")
    asked: list[bool] = []
    install(VLLM, fused_topk=lambda x, logits, k, renorm: asked.append(renorm) or (x, logits, None))
    plain = lambda hidden_states, gating_output, topk, renormalize: asked.append(renormalize) or (1, 2)  # noqa: E731
    install("sglang.srt.layers.moe.topk", fused_topk=plain)
    for name in ("v2-lite", "qwen3-30b"):
        for router in (routers.vllm_router, routers.sglang_router):
            assert len(router(shapes.SHAPES[name], None)(torch.ones(1), torch.ones(1))) == 2
    assert asked == [False, False, True, True]


def test_configurations_reach_a_peer_and_its_files_are_found(gpu: Callable[[str], Any], install: Any) -> None:
    tuning, shape = gpu("tuning"), v3(gpu)
    told: list[Any] = []

    @contextmanager
    def override(config: Any) -> Iterator[None]:
        told.append(config)
        yield

    searched: list[Any] = []

    def search(*given: Any) -> Any:
        searched.append(given)
        return {1: {}} if "fp8_w8a8" in given else None

    install(VLLM, override_config=override)
    install(f"{VLLM}.fused_moe", get_moe_configs=search)
    # SGLang's newer place
    install("sglang.srt.layers.moe.moe_runner.triton_utils", override_config=override)
    install("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config", get_moe_configs=search)
    for peer in tuning.TUNABLE.values():
        assert peer.configured(shape, torch.float8_e4m3fn) and not peer.configured(shape, torch.bfloat16)
        with peer.override({"num_warps": 4}):
            pass
    assert told == [{"num_warps": 4}] * 2
    assert searched[:2] == [(256, 2048, "fp8_w8a8", 128, 128), (256, 2048, None)]


def test_the_grid_follows_the_rows_of_an_expert(gpu: Callable[[str], Any]) -> None:
    tuning, shape = gpu("tuning"), v3(gpu)
    few, many = (list(tuning.grid(shape, m, torch.float8_e4m3fn)) for m in (1, 16384))
    assert {c["BLOCK_SIZE_M"] for c in few} == {16, 32} and {c["BLOCK_SIZE_M"] for c in many} == {64, 128}
    assert {c["BLOCK_SIZE_K"] for c in few + many} == {128}  # a block of scales
    assert len({tuple(c.values()) for c in many}) == len(many) == 16
    assert {c["BLOCK_SIZE_K"] for c in tuning.grid(shape, 1, torch.bfloat16)} == {64, 128}


def test_tuning_ends_in_time_and_without_a_candidate(gpu: Callable[[str], Any]) -> None:
    """No seconds: the peer's own alone. Its own failing as well: its calls as they are, to fail by name."""
    tuning, clock = gpu("tuning"), gpu("timing").Clock("cpu", budget=1e-4)
    never = tuning.Tunable(lambda config: pytest.fail("it was told"), lambda shape, dtype: False)
    calls = [lambda: None]
    found, about = tuning.tuned(never, iter([{"num_warps": 4}]), calls, lambda calls: True, clock, -1.0)
    assert found is calls and about["tried"] == 1 and about["config"] is None

    def failing() -> None:
        raise RuntimeError("no")

    found, about = tuning.tuned(never, iter([]), [failing], lambda calls: True, clock, 1.0)
    assert found == [failing] and about["own_us"] is None and len(about["failed"]) == 1


def test_a_peer_with_a_file_is_tuned_only_when_asked(
    gpu: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("shapes")
    layer, tuning = import_module("moe_layer"), gpu("tuning")
    shape = gpu("shapes").SELF_TEST_SHAPES["tiny"]

    @contextmanager
    def override(config: Any) -> Iterator[None]:
        yield

    def moved(shape: Any, dtype: Any) -> bool:
        raise AttributeError("get_moe_configs")

    def about(seconds: float | None, configured: Any = lambda shape, dtype: True) -> Any:
        clock = gpu("timing").Clock("cpu", budget=1e-4)
        peers = {"p": tuning.Tunable(override, configured)}
        run = layer.Run(torch.bfloat16, clock, None, 0, {}, True, peers, seconds)
        return run.tuned("p", shape, 1, [lambda: None], lambda calls: 0.0)[1]

    assert about(None) == {"untuned": "it brings a configuration for this shape and device"}
    assert about(0) is None
    assert about(0.01)["configured"] is True and about(0.01)["tried"] >= 1
    assert about(None, moved) == {"untuned": "AttributeError: get_moe_configs"}
    del sys.modules["moe_layer"]


INT, FLOAT = "*i32", "*fp32"


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernels_round_deep_gemm_compile_for_hopper(
    quantise: bool, masked: bool, gpu: Callable[[str], Any]
) -> None:
    """The interpreter is more lenient than Triton's compiler."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    glue, wide = gpu("glue"), "*bf16"
    small = "*fp8e4nv" if quantise else wide
    how = {"wide": 8, "quantise": quantise}
    size = dict.fromkeys(["tokens", "experts", "hidden", "width", "groups", "ROWS"], "i32")
    kernels = [
        (glue.rank, [wide, small, FLOAT, INT, INT, INT], {"top_k": 8, "choices": 8, **how}),
        (
            glue.scatter,
            [small, FLOAT, INT, INT, INT, small, FLOAT, INT, INT],
            {"top_k": 6, "lanes": 256, "ALIGN": 128, "masked": masked, **how, "wide": 64},
        ),
        (glue.swiglu, [wide, INT, small, FLOAT], how),
        (glue.combine, [wide, INT, FLOAT, wide], {"top_k": 6, "block": 1024}),
    ]
    for kernel, pointers, constants in kernels:
        names = kernel.arg_names
        types = dict(zip(names, pointers, strict=False)) | {n: size[n] for n in names if n in size}
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, {n: types[n] for n in names}, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert "wgmma" not in compiled.asm["ptx"] and ".entry" in compiled.asm["ptx"]
