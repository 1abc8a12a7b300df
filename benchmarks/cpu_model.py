"""How fast is a whole model on the CPU, beside transformers and beside bare matrix products?

A DeepSeek-V3-shaped model (hidden 512, 2 layers, 32 experts of 256, top-4) in fp32 with random weights. Each
round runs, one after the other so that they share the machine's mood:

    moec          the package built for cpu
    eager         transformers, one product an expert
    grouped_mm    transformers, torch's grouped product
    F.linear      nothing but the linear products of moec's prefill, in its shapes, on its weights

prefill of 512 tokens, then 32 decode steps. Medians over the rounds; every peer's logits and tokens are
checked against moec's. transformers' batched_mm gathers gigabytes of weights and slows all that shares a
process with it: it gets one of its own. Run with ``make bench``, or with --quick for a first look.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import moec
from moec.runtime.batch import next_batch
from moec.runtime.cache import CachedSequence

RESULTS = Path(__file__).parent / "results"
PREFILL, DECODE = 512, 32
CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 0,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}


def checkpoint(folder: Path) -> None:
    """transformers' model of CONFIG with random weights, saved as a checkpoint."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG)).float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=0.05)
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.02)
    model.save_pretrained(folder)


class Transformers:
    """A peer: transformers with one of its experts implementations."""

    def __init__(self, folder: Path, experts: str) -> None:
        from transformers import DeepseekV3ForCausalLM

        self.model = DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation=experts
        ).eval()

    @torch.inference_mode()
    def run(self, ids: torch.Tensor) -> Timing:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        start = time.perf_counter()
        logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        prefill = time.perf_counter() - start
        return decode(prefill, logits, lambda t: self.model(t[None], past_key_values=cache).logits[:, -1])


class Moec:
    """The package built for cpu, through the calls that an engine makes."""

    def __init__(self, folder: Path, out: Path) -> None:
        built = moec.build(str(folder), target="cpu", out=out, dtype="f32")
        self.model: Any = moec.load(built, weights=folder)

    def run(self, ids: torch.Tensor) -> Timing:
        cache = self.model.new_cache(PREFILL + DECODE)
        sequence = CachedSequence(cache)
        start = time.perf_counter()
        logits = self.model.step(next_batch([sequence], ids.tolist()), cache)
        prefill = time.perf_counter() - start
        return decode(prefill, logits, lambda t: self.model.step(next_batch([sequence], [t.tolist()]), cache))


class Timing:
    """Seconds of one prefill and of all decode steps, with what came out."""

    def __init__(self, prefill: float, decode: float, logits: torch.Tensor, tokens: list[int]) -> None:
        self.prefill, self.decode, self.logits, self.tokens = prefill, decode, logits, tokens


def decode(prefill: float, logits: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor]) -> Timing:
    """Greedy steps from the prefill's logits [1, vocab]."""
    first, tokens = logits, []
    start = time.perf_counter()
    for _ in range(DECODE):
        token = logits.argmax(-1)
        tokens.append(int(token))
        logits = step(token)
    return Timing(prefill, time.perf_counter() - start, first, tokens)


class Products:
    """The linear products of one prefill, by themselves: every dense one and every expert's segment."""

    def __init__(self, peer: Moec, ids: torch.Tensor) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        package = peer.model._code.__name__.rpartition(".")[0]
        modules = [
            peer.model._code,
            *(m for n, m in sys.modules.items() if n.startswith(f"{package}.kernels")),
        ]
        users = [m for m in modules if callable(getattr(m, "linear", None))]
        linear = users[0].linear

        def record(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            self.calls.append((x, w))
            out: torch.Tensor = linear(x, w, bias)
            return out

        for module in users:
            module.linear = record  # type: ignore[attr-defined]
        cache = peer.model.new_cache(PREFILL)
        peer.model.step(next_batch([CachedSequence(cache)], ids.tolist()), cache)
        for module in users:
            module.linear = linear  # type: ignore[attr-defined]

    @property
    def flops(self) -> int:
        return sum(2 * x.numel() * w.shape[0] for x, w in self.calls)

    @torch.inference_mode()
    def run(self) -> float:
        start = time.perf_counter()
        for x, w in self.calls:
            F.linear(x, w)
        return time.perf_counter() - start


def same(name: str, got: Timing, want: Timing) -> float:
    """The relative difference of the first logits; exits where it or a token is off."""
    difference = float((got.logits - want.logits).abs().max() / want.logits.abs().max())
    if difference > 1e-4 or got.tokens != want.tokens:
        sys.exit(
            f"{name} disagrees with moec: logits by {difference:.1e}, tokens {got.tokens} and {want.tokens}"
        )
    return difference


def prompt(number: int) -> torch.Tensor:
    """The ids of one round, [1, PREFILL]."""
    return torch.randint(CONFIG["vocab_size"], (1, PREFILL), generator=torch.Generator().manual_seed(number))


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    checkpoint(folder / "checkpoint")
    ours = Moec(folder / "checkpoint", folder / "package")
    peers = {name: Transformers(folder / "checkpoint", name) for name in ("eager", "grouped_mm")}
    times: dict[str, list[Timing]] = {name: [] for name in ("moec", *peers)}
    linear: list[float] = []
    differences = {}
    for number in range(rounds + 1):
        ids = prompt(number)  # another one each round: other experts, other segments
        products = Products(ours, prompt(number + rounds + 1))
        found = {"moec": ours.run(ids)} | {name: peer.run(ids) for name, peer in peers.items()}
        alone = products.run()
        for name in peers:
            differences[name] = same(name, found[name], found["moec"])
        if number:  # the first round warms up
            linear.append(alone)
            for name, timing in found.items():
                times[name].append(timing)
        print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {
        "medians": {
            name: {
                "prefill_s": statistics.median(t.prefill for t in runs),
                "decode_s": statistics.median(t.decode for t in runs),
            }
            for name, runs in times.items()
        },
        "linear_s": statistics.median(linear),
        "linear_flops": products.flops,
        "logits_difference": differences,
    }


def batched_mm(rounds: int, folder: Path) -> dict[str, float]:
    """Medians of transformers' batched_mm; meant for a process of its own."""
    peer = Transformers(folder / "checkpoint", "batched_mm")
    runs = [peer.run(prompt(number)) for number in range(rounds + 1)][1:]
    return {
        "prefill_s": statistics.median(t.prefill for t in runs),
        "decode_s": statistics.median(t.decode for t in runs),
    }


def summary(result: dict[str, Any]) -> list[str]:
    medians = result["medians"]
    best = {
        phase: min(medians[p][phase] for p in ("eager", "grouped_mm")) for phase in ("prefill_s", "decode_s")
    }
    ours = medians["moec"]
    rate = result["linear_flops"] / result["linear_s"]
    result["ratios"] = {
        "decode_against_best_peer": best["decode_s"] / ours["decode_s"],
        "prefill_against_best_peer": best["prefill_s"] / ours["prefill_s"],
        "prefill_against_linear": result["linear_s"] / ours["prefill_s"],
    }
    lines = [f"{'':<12}{'prefill of ' + str(PREFILL):>16}{str(DECODE) + ' decode steps':>18}"]
    for name, found in medians.items():
        lines.append(f"{name:<12}{found['prefill_s'] * 1e3:>13.1f} ms{found['decode_s'] * 1e3:>15.1f} ms")
    lines.append(f"{'F.linear':<12}{result['linear_s'] * 1e3:>13.1f} ms   {rate / 1e9:.0f} GFLOP/s")
    lines += [
        f"decode   {result['ratios']['decode_against_best_peer']:.2f} × the better of eager and grouped_mm",
        f"prefill  {result['ratios']['prefill_against_best_peer']:.2f} × the better of eager and grouped_mm",
        f"prefill  at {result['ratios']['prefill_against_linear']:.0%} of the rate of F.linear alone",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="3 rounds, nothing written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="the JSON's file; by default results/cpu_model.json")
    parser.add_argument("--batched-mm", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds = 3 if args.quick else args.rounds
    if args.batched_mm is not None:
        print(json.dumps(batched_mm(rounds, args.batched_mm)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(rounds, Path(folder))
        alone = [
            sys.executable,
            __file__,
            "--batched-mm",
            folder,
            "--threads",
            str(args.threads),
            "--rounds",
            str(rounds),
        ]
        result["medians"]["batched_mm"] = json.loads(
            subprocess.run(alone, check=True, stdout=subprocess.PIPE).stdout
        )
    import transformers

    result |= {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads",
        "versions": {
            "moec": moec.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "config": CONFIG,
        "prefill": PREFILL,
        "decode": DECODE,
        "rounds": rounds,
    }
    print("\n".join(summary(result)))
    if not args.quick:
        out = args.out or RESULTS / "cpu_model.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {out}")


if __name__ == "__main__":
    main()
