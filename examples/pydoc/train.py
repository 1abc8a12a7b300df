"""Train the example checkpoint: a byte-level DeepSeek-V3 of 3.7 million parameters that writes Python's help.

The text is what `help("for")` and its like print: `pydoc_data.topics`, 0.47 MB, part of every Python. The
model is transformers' `DeepseekV3ForCausalLM`, small but with every part of the large one: latent attention
with a compressed query, interleaved rotary embedding, a dense first layer, then 16 routed experts in 4
groups beside a shared one, chosen by sigmoid scores plus a bias. No gradient reaches that bias: after each
step it is lowered for the experts that got more than their share of tokens and raised for the others, which
balances the load without an auxiliary loss (Wang et al., 2024, arXiv:2408.15664).

    python examples/pydoc/train.py --steps 4500 --out checkpoint

A step takes a third of a second on two idle CPU cores: 4500 take half an hour, and one minute more goes into
evaluating and sampling. Needs torch, transformers and, unless --eager is given, a C++ compiler, which makes
a step 1.7 times as fast.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

WINDOW, BATCH = 512, 6  # bytes a sequence, sequences a step
WARMUP, WEIGHT_DECAY, DROPOUT = 100, 0.1, 0.1
BIAS_STEP, BIAS_UNTIL = 1e-3, 0.8  # the step of the router bias, and the share of the run after which it is 0
END = b"\0"  # begins and ends every topic; the config's bos and eos
PROMPTS = ("The for statement", "Lists are", "A class definition")

CONFIG = DeepseekV3Config(
    vocab_size=256,
    hidden_size=192,
    intermediate_size=512,
    moe_intermediate_size=96,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=6,
    num_key_value_heads=6,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    max_position_embeddings=WINDOW,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    bos_token_id=0,
    eos_token_id=0,
    num_mtp_layers=0,
)


def load_text(block: int = 2048, every: int = 20) -> tuple[Tensor, Tensor]:
    """The topics as bytes [N] int64, for training and held out: every 20th block of 2 KiB is held out."""
    text = END + END.join(topics[name].encode() for name in sorted(topics)) + END
    blocks = torch.tensor(list(text)).split(block)
    return (
        torch.cat([b for i, b in enumerate(blocks) if i % every != every - 1]),
        torch.cat([b for i, b in enumerate(blocks) if i % every == every - 1]),
    )


def prepare(model: nn.Module) -> list[DeepseekV3TopkRouter]:
    """Hook in what training adds: dropout of what joins the residual stream, counts of the routed tokens."""

    def drop(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, DROPOUT, module.training)

    def count(gate: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        gate.load += F.one_hot(output[2], gate.num_experts).sum((0, 1))  # output[2]: the choices [T, k]

    routers = []
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "mlp")):
            module.register_forward_hook(drop)
        if isinstance(module, DeepseekV3TopkRouter):
            module.register_buffer("load", torch.zeros(module.num_experts), persistent=False)
            module.register_forward_hook(count)
            routers.append(module)
    return routers


def max_over_mean(router: DeepseekV3TopkRouter) -> float:
    """The fullest expert's tokens over the mean: 1 is perfect balance, E / k the worst."""
    return round((router.load.max() / router.load.mean()).item(), 2)


@torch.no_grad()
def held_out_nats(model: nn.Module, text: Tensor) -> float:
    """Mean negative log-likelihood, in nats a byte, over windows that do not overlap."""
    model.eval()
    windows = text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = [F.cross_entropy(model(w[None]).logits[0, :-1].float(), w[1:]).item() for w in windows]
    model.train()
    return sum(losses) / len(losses)


def sample(model: DeepseekV3ForCausalLM, prompt: str, seed: int, length: int = 300) -> str:
    """The prompt and up to `length` bytes after it, drawn at temperature 0.6."""
    torch.manual_seed(seed)
    ids = torch.tensor([list(prompt.encode())])
    out = model.generate(ids, max_new_tokens=length, do_sample=True, temperature=0.6, top_k=0)
    return bytes(out[0].tolist()).decode(errors="replace")


def save_bf16(model: DeepseekV3ForCausalLM, out: Path) -> None:
    """Save in Hugging Face's layout, in bf16 all but the router bias, which is a buffer and stays in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4500, help="steps to train for (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="continue from this checkpoint (give another seed)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="do not compile the training step")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_text, held_out = load_text()
    model, past_steps = DeepseekV3ForCausalLM(CONFIG), 0
    if args.start:
        model = DeepseekV3ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        past_steps = json.loads((args.start / "training.json").read_text())["steps"]
    model.train().set_experts_implementation("grouped_mm")
    routers = prepare(model)
    forward = model if args.eager else torch.compile(model)
    norms = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}, norms]
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)

    train_loss, start = math.log(256), time.monotonic()
    for step in range(1, args.steps + 1):
        done = step / args.steps
        cosine = 0.5 + 0.5 * math.cos(math.pi * done)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / WARMUP) * (0.02 + 0.98 * cosine)

        for router in routers:
            router.load.zero_()
        starts = torch.randint(len(train_text) - WINDOW, (BATCH, 1))
        ids = train_text[starts + torch.arange(WINDOW + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        load = [max_over_mean(router) for router in routers]
        if done < BIAS_UNTIL:
            for router in routers:
                router.e_score_correction_bias -= BIAS_STEP * (router.load - router.load.mean()).sign()

        train_loss += (loss.item() - train_loss) * max(0.01, 1 / step)
        if step % 250 == 0 or step == args.steps:
            nats = f"nats/byte: train {train_loss:.3f}, held out {held_out_nats(model, held_out):.3f}"
            pace = f"{(time.monotonic() - start) / step:.2f} s a step"
            print(f"step {step}  {nats}  max/mean load {load}  {pace}", file=sys.stderr, flush=True)

    nats_fp32 = held_out_nats(model, held_out)
    save_bf16(model, args.out)
    saved = DeepseekV3ForCausalLM.from_pretrained(args.out)
    routers, nats_bf16 = prepare(saved), held_out_nats(saved, held_out)
    record = {
        "parameters": sum(p.numel() for p in saved.parameters()),
        "steps": past_steps + args.steps,
        "seed": args.seed,
        "train_nats_per_byte": round(train_loss, 4),
        "held_out_nats_per_byte": {"fp32": round(nats_fp32, 4), "bf16": round(nats_bf16, 4)},
        "held_out_max_over_mean_load": [max_over_mean(router) for router in routers],
        "router_bias_std": [round(router.e_score_correction_bias.std().item(), 4) for router in routers],
        "samples": [sample(saved.eval(), prompt, args.seed + i) for i, prompt in enumerate(PROMPTS)],
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
