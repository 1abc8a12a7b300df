"""Tiny checkpoints as Hugging Face lays them out, and what transformers itself makes of them.

A ``Case`` says everything: the configuration, how its ``config.json`` is written, the prompts and the seed of
the weights. ``reference(case, folder)`` writes the checkpoint, loads it back with transformers and runs it in
fp32 with eager attention and eager experts.

Every tensor is drawn at a scale where it matters: norm weights are far from 1, the router's bias changes what
is chosen, attention scores are wide enough that softmax, its scale and RoPE all show. Where a router or the
greedy choice stands near a tie, a draw says nothing about a compiler: ``reference`` takes the next seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP, DeepseekV2Moe

from moec.ir import Interpreter, Module

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-4  # of logits, relative to the largest
Prompts = Sequence[Sequence[int]]
Outputs = tuple[list[torch.Tensor], list[list[int]]]  # logits [T_i, vocab] and new tokens of each prompt

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

# Fields that only transformers writes, so that older checkpoints lack them.
_NEW_FIELDS = {
    "deepseek_v2": ("head_dim", "qk_head_dim"),
    "deepseek_v3": ("head_dim", "qk_head_dim"),
    "qwen2_moe": ("layer_types",),
}
# What the published checkpoints say beside what transformers reads.
_OLD_FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"scoring_func": "softmax", "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1},
}


@dataclass(frozen=True)
class Case:
    """One checkpoint and what to run on it.

    ``config`` holds the fields of the family's configuration class; ``old`` writes ``config.json`` as
    published checkpoints have it (``rope_scaling``); ``shard`` is the largest shard, as ``"20KB"``.
    """

    family: str
    config: dict[str, Any]
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int = 4
    seed: int = 0
    old: bool = False
    shard: str | None = None


@dataclass
class Reference:
    """What transformers says: ``logits[i]`` [T_i, vocab] for each prompt, and the tokens it goes on with."""

    folder: Path
    logits: list[torch.Tensor]
    tokens: list[list[int]]


def reference(case: Case, folder: Path, seeds: int = 6) -> Reference | None:
    """Writes the checkpoint into ``folder`` and runs it; None where ``seeds`` draws all stood near a tie."""
    for seed in range(case.seed, case.seed + seeds):
        target = folder / f"seed{seed}"
        found = run(write(case, target, seed), target, case.prompts, case.new_tokens)
        if found is not None:
            return found
    return None


def build(case: Case, seed: int) -> nn.Module:
    """transformers' model of ``case`` with weights of ``seed``."""
    if case.family == "deepseek":
        model = deepseek_v1(case.config)
    else:
        config = AutoConfig.for_model(case.family, **case.config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER)
    randomise(model, seed)
    return model.eval()


def write(case: Case, folder: Path, seed: int) -> nn.Module:
    """Saves the checkpoint, one tensor an expert, and returns what transformers loads from it (V1: saves)."""
    model = build(case, seed)
    if case.family == "deepseek":
        save_v1(model, case.config, folder)
        return model
    model.save_pretrained(folder, **({"max_shard_size": case.shard} if case.shard else {}))
    if case.old:
        _age(folder / "config.json", case.config)
    return load(folder)


def load(folder: Path) -> nn.Module:
    """What transformers makes of a folder, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER)
    return model.eval()


def _age(path: Path, given: dict[str, Any]) -> None:
    """Rewrites ``config.json`` as published checkpoints have it."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    family = config["model_type"]
    for name in _NEW_FIELDS.get(family, ()):
        if name not in given:
            config.pop(name, None)
    path.write_text(json.dumps(config | _OLD_FIELDS.get(family, {}), indent=2))


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draws every parameter and every saved buffer anew."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        tensor.copy_(_draw(name, tensor, generator))  # a tied head, which comes last, is drawn as a head


def _draw(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(like.shape, generator=generator)
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf.endswith("norm"):
        return 0.4 + 1.4 * torch.rand(like.shape, generator=generator)
    if leaf in ("q_proj", "k_proj", "q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa"):
        gain = 1.5  # scores with a deviation of about 2
    elif leaf in ("gate", "shared_expert_gate"):
        gain = 2.0
    elif leaf == "down_proj":
        gain = 3.0  # act(gate) · up is small
    else:
        gain = 1.0
    if leaf == "bias":
        return 0.5 * normal
    if leaf == "e_score_correction_bias":
        return 0.3 * normal  # as wide as the scores, whose sigmoids it is added to
    if leaf == "embed_tokens":
        return normal
    return normal * gain / like.shape[-1] ** 0.5


# DeepSeek V1 has no class in transformers: Llama's attention with V2's MoE.
_LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "tie_word_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
)
_MOE_FIELDS = (
    "hidden_size",
    "hidden_act",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


def deepseek_v1(config: dict[str, Any]) -> nn.Module:
    """Llama with V2's greedy MoE after ``first_k_dense_replace`` layers; ``norm_topk_prob`` is V1's own."""
    llama = LlamaConfig(**{name: config[name] for name in _LLAMA_FIELDS if name in config})
    moe = DeepseekV2Config(
        **{name: config[name] for name in _MOE_FIELDS if name in config},
        num_attention_heads=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    )
    moe._experts_implementation = "eager"
    llama._attn_implementation = "eager"
    model = LlamaForCausalLM(llama)
    for number, layer in enumerate(model.model.layers):
        if number < config["first_k_dense_replace"]:
            layer.mlp = DeepseekV2MLP(moe, intermediate_size=config["intermediate_size"])
            continue
        layer.mlp = DeepseekV2Moe(moe)
        if config.get("norm_topk_prob") and config["num_experts_per_tok"] > 1:
            layer.mlp.gate.register_forward_hook(
                lambda _module, _args, out: (out[0], out[1] / (out[1].sum(-1, keepdim=True) + 1e-20), out[2])
            )
    return model.eval()


def save_v1(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """A V1 checkpoint under its own names and with its own fields."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        head, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                tensors[f"{head}.{e}.gate_proj.weight"], tensors[f"{head}.{e}.up_proj.weight"] = gate, up
        elif leaf == "down_proj":
            tensors |= {f"{head}.{e}.down_proj.weight": down for e, down in enumerate(tensor)}
        elif not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            tensors[name] = tensor
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors")
    written = dict(config)
    rope = dict(written.pop("rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0})
    kind, written["rope_theta"] = rope.pop("rope_type"), rope.pop("rope_theta")
    written |= {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "pretraining_tp": 1,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2))


# Running it.
@torch.no_grad()
def run(model: nn.Module, folder: Path, prompts: Prompts, new_tokens: int) -> Reference | None:
    """Each prompt by itself, greedily, with a cache and without.

    None where a choice stood near a tie, or where fp32 itself is off by a tenth of the tolerance.
    """
    logits, tokens = [], []
    for prompt in prompts:
        going_on = greedy(model, prompt, new_tokens)
        ids = torch.tensor([[*prompt, *going_on]])
        with _watched(model) as near_ties:
            everything = model(ids, use_cache=False).logits[0]
        exact = model.double()(ids, use_cache=False).logits[0].float()
        model.float()
        steps = everything[len(prompt) - 1 :][:new_tokens]
        best = steps.topk(2).values
        close = (best[:, 0] - best[:, 1]).min() < 2e-3 * everything.abs().max()
        if near_ties or close or difference(everything, exact) > TOLERANCE / 10:
            return None
        if steps.argmax(-1).tolist() != going_on:
            raise AssertionError("transformers with a cache and without one disagree")
        logits.append(everything[: len(prompt)])
        tokens.append(going_on)
    return Reference(folder, logits, tokens)


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The most likely continuation, one token after the other, through transformers' KV cache."""
    ids, cache, out = torch.tensor([list(prompt)]), None, []
    for _ in range(new_tokens):
        step = model(ids, past_key_values=cache, use_cache=True)
        cache, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
        out.append(int(ids))
    return out


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Fills the list with the routers whose choice changes when their input moves by a few 1e-5."""
    generator = torch.Generator().manual_seed(0)
    near: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor], out: tuple[torch.Tensor, ...]) -> None:
            chosen = out[2].sort(-1).values
            for _ in range(2):
                step = 3e-5 * args[0].std() * torch.randn(args[0].shape, generator=generator)
                for moved in (args[0] + step, args[0] - step):
                    if not torch.equal(type(module).forward(module, moved)[2].sort(-1).values, chosen):
                        near.append(name)

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("router")
    ]
    try:
        yield near
    finally:
        for hook in hooks:
            hook.remove()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max|a - b| / max|b|; infinite where ours isn't finite."""
    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max())


# FP8 checkpoints.
def quantise(folder: Path, fp8: Path, plain: Path, block: int = 128) -> None:
    """Writes ``folder``'s checkpoint twice: as DeepSeek-V3 is published, linear weights in e4m3 blocks beside
    ``weight_scale_inv``, and with what these stand for in fp32.

    Edge blocks are partial, as in DeepSeek's own conversion; transformers' needs whole blocks.
    """
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, w in tensors(folder).items():
        stored[name] = meant[name] = w
        if not name.endswith("_proj.weight") and not name.endswith("_proj_with_mqa.weight"):
            continue
        rows, columns = w.shape
        padded = nn.functional.pad(w, (0, -columns % block, 0, -rows % block))
        tiles = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2)
        scale = tiles.abs().amax((2, 3)) / 448
        q = (tiles / scale[..., None, None]).to(torch.float8_e4m3fn)
        stored[name], meant[name] = (
            t.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
            for t in (q, q.float() * scale[..., None, None])
        )
        stored[f"{name}_scale_inv"] = scale
    config = json.loads((folder / "config.json").read_text())
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    how |= {"weight_block_size": [block, block]}
    for target, weights, extra in ((fp8, stored, {"quantization_config": how}), (plain, meant, {})):
        target.mkdir()
        save_file(weights, target / "model.safetensors")
        (target / "config.json").write_text(json.dumps(config | extra))


# Running moec's IR.
Weights = Mapping[str, torch.Tensor]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whatever its shards."""
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def interpret(module: Module, weights: Weights, prompts: Prompts, new_tokens: int) -> Outputs:
    """``@step`` and ``@head`` in the reference interpreter, greedily, all prompts in one ragged batch.

    The pages of a sequence lie scattered over the cache.
    """
    interpreter = Interpreter(module, weights)
    kinds = [arg.type for arg in module["step"].args[6:]]
    page = kinds[0].page
    pages = -(-max(len(p) + new_tokens for p in prompts) // page)
    table = torch.arange(pages * len(prompts)).view(pages, len(prompts)).t().flip(0, 1)  # [B, pages]
    caches = [interpreter.new_cache(kind, layers=8, pages=table.numel()) for kind in kinds]

    sequences, fresh = [list(p) for p in prompts], [list(p) for p in prompts]
    logits: list[torch.Tensor] = []
    for _ in range(new_tokens):
        h, *caches = interpreter.run("step", *_batch(sequences, fresh, table.to(torch.int32), page), *caches)
        ends = list(accumulate(len(new) for new in fresh))
        if not logits:
            (every,) = interpreter.run("head", h)
            logits = [every[end - len(new) : end] for end, new in zip(ends, fresh, strict=True)]
        (last,) = interpreter.run("head", h[[end - 1 for end in ends]])
        fresh = [[int(token)] for token in last.argmax(-1)]
        sequences = [old + new for old, new in zip(sequences, fresh, strict=True)]
    return logits, [whole[len(p) :] for whole, p in zip(sequences, prompts, strict=True)]


def _batch(
    sequences: Sequence[list[int]], fresh: Sequence[list[int]], table: torch.Tensor, page: int
) -> tuple[torch.Tensor, ...]:
    """What ``@step`` takes for the last tokens, ``fresh``, of each sequence."""
    positions = [list(range(len(s) - len(new), len(s))) for s, new in zip(sequences, fresh, strict=True)]
    slots = [[int(table[b, p // page]) * page + p % page for p in at] for b, at in enumerate(positions)]
    return (
        torch.tensor([id for new in fresh for id in new]),
        torch.tensor([p for at in positions for p in at]),
        torch.tensor([0, *accumulate(len(new) for new in fresh)], dtype=torch.int32),
        torch.tensor([len(s) for s in sequences], dtype=torch.int32),
        table,
        torch.tensor([s for of in slots for s in of]),
    )


def one_thread() -> Iterator[None]:
    """A fixture's body. With matrices of 16 rows, threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
