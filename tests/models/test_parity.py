"""moec against transformers' own modelling code: the same checkpoint, fp32, logits and greedy tokens."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import moec
from moec.check import verify_package
from moec.errors import ConfigContradiction
from moec.models import from_hf, lower
from moec.passes.pipelines import DEFAULT_LEVEL, LEVELS
from tests import hf
from tests.strategies import CONFIGS, hf_cases

# Hypothesis profiles say how many examples a test gets; a whole model counts for several.
PACKAGE_EXAMPLES = max(1, settings.default.max_examples // 2)
INTERPRETER_EXAMPLES = max(1, settings.default.max_examples // 5)
LEVEL_EXAMPLES = max(1, settings.default.max_examples // 12)

Execute = Callable[[Path, hf.Prompts, int], hf.Outputs]


_one_thread = pytest.fixture(autouse=True, scope="module")(hf.one_thread)


def execute_interpreter(folder: Path, prompts: hf.Prompts, new_tokens: int) -> hf.Outputs:
    """The naive IR, op by op, with pages so short that every sequence has several."""
    spec = dataclasses.replace(from_hf(folder), page=4)
    return hf.interpret(lower(spec), hf.tensors(folder), prompts, new_tokens)


def execute_package(
    folder: Path, prompts: hf.Prompts, new_tokens: int, level: int = DEFAULT_LEVEL
) -> hf.Outputs:
    """A package built for the CPU at an -O level, as a user would run it."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "package"
        moec.build(folder, target="cpu", out=out, dtype="f32", options=moec.BuildOptions(opt_level=level))
        model = moec.load(out, weights=folder)
        ids = [torch.tensor(p) for p in prompts]
        if len({len(p) for p in prompts}) == 1:
            logits = list(model(torch.stack(ids)))
        else:
            logits = [model(row[None])[0] for row in ids]
        whole = model.generate(ids, max_new_tokens=new_tokens)
        return logits, [row[len(p) :].tolist() for row, p in zip(whole, prompts, strict=True)]


def check(case: hf.Case, execute: Execute) -> None:
    """Logits within the tolerance and the same tokens; another draw where a choice stands near a tie."""
    with tempfile.TemporaryDirectory() as folder:
        expected = hf.reference(case, Path(folder))
        assume(expected is not None)
        logits, tokens = execute(expected.folder, case.prompts, case.new_tokens)
        for ours, theirs in zip(logits, expected.logits, strict=True):
            assert hf.difference(ours, theirs) < hf.TOLERANCE
        assert tokens == expected.tokens


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=INTERPRETER_EXAMPLES)
@given(data=st.data())
def test_naive_ir(family: str, data: st.DataObject) -> None:
    check(data.draw(hf_cases(family)), execute_interpreter)


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=PACKAGE_EXAMPLES)
@given(data=st.data())
def test_cpu_package(family: str, data: st.DataObject) -> None:
    check(data.draw(hf_cases(family)), execute_package)


@pytest.mark.parametrize("level", [level for level in LEVELS if level != DEFAULT_LEVEL])
@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=LEVEL_EXAMPLES)
@given(data=st.data())
def test_cpu_package_of_another_level(family: str, level: int, data: st.DataObject) -> None:
    check(data.draw(hf_cases(family)), partial(execute_package, level=level))


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "deepseek"])
@settings(max_examples=2)
@given(data=st.data())
def test_checkpoints_are_transformers_own(family: str, data: st.DataObject) -> None:
    """What the tests write is one tensor an expert, and transformers reads back every bit of it."""
    case = data.draw(hf_cases(family))
    with tempfile.TemporaryDirectory() as folder:
        read = hf.write(case, Path(folder), case.seed).state_dict()
        built = hf.build(case, case.seed).state_dict()
        assert all(torch.equal(read[name], tensor) for name, tensor in built.items())
        assert max(t.dim() for t in hf.tensors(Path(folder)).values()) == 2


# Checkpoints in FP8 blocks.
_FP8 = hf.Case(
    "deepseek_v3",
    {
        "vocab_size": 97,
        "hidden_size": 192,  # one whole block of 128 and a part of one
        "intermediate_size": 136,
        "moe_intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": None,
        "first_k_dense_replace": 1,
        "n_routed_experts": 6,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 3,
        "q_lora_rank": 160,
        "kv_lora_rank": 144,
        "qk_nope_head_dim": 40,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "max_position_embeddings": 64,
        "eos_token_id": None,
        "bos_token_id": None,
    },
    prompts=((5, 17, 80, 3, 44), (9, 9, 61)),
    old=True,
)


@pytest.mark.parametrize("block", [128, 32])
@pytest.mark.parametrize("execute", [execute_interpreter, execute_package])
def test_fp8_checkpoint(tmp_path: Path, execute: Execute, block: int) -> None:
    """As transformers on the same values: ``weight_scale_inv`` multiplies, edge blocks are partial."""
    expected = None
    for seed in range(6):
        place = tmp_path / str(seed)
        hf.write(_FP8, place, seed)
        hf.quantise(place, place / "fp8", place / "plain", block)
        expected = hf.run(hf.load(place / "plain"), place / "fp8", _FP8.prompts, _FP8.new_tokens)
        if expected is not None:
            break
    assert expected is not None
    logits, tokens = execute(expected.folder, _FP8.prompts, _FP8.new_tokens)
    assert max(map(hf.difference, logits, expected.logits)) < hf.TOLERANCE
    assert tokens == expected.tokens


@pytest.mark.parametrize("level", [0, 2, 3])
def test_fp8_checkpoint_in_fp8(tmp_path: Path, level: int) -> None:
    """Its bytes are multiplied as they are: verified against the naive IR, which dequantises them."""
    hf.write(_FP8, tmp_path, 0)
    hf.quantise(tmp_path, tmp_path / "fp8", tmp_path / "plain", 128)
    options = moec.BuildOptions(opt_level=level, fp8=True)
    package = moec.build(str(tmp_path / "fp8"), "cpu", tmp_path / "p", dtype="f32", options=options)
    verdict = verify_package(package.path, str(tmp_path / "fp8"), tokens=20, decode=2)
    assert verdict.ok and not verdict.exact and verdict.wrong == 0


# What transformers leaves undefined.
@pytest.mark.parametrize(
    "change",
    [{"n_group": 6}, {"num_experts_per_tok": 4}],
    ids=["one expert a group", "more choices than the groups hold"],
)
def test_undefined_routing_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    """transformers raises, or picks experts that it ruled out; moec says which fields contradict."""
    hf.write(dataclasses.replace(_FP8, config=_FP8.config | change), tmp_path, seed=0)
    with pytest.raises(ConfigContradiction, match=next(iter(change))):
        from_hf(tmp_path)
