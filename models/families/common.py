"""Fields of config.json that families share: sizes, RoPE in its two spellings, quantisation."""

from __future__ import annotations

from typing import Any

from moec.ir.types import DTYPES
from moec.models.blocks import GQA, LinearRoPE, Llama3RoPE, RoPE, YaRN
from moec.models.config import Config
from moec.models.quantization import BlockFP8
from moec.models.spec import COMPUTE_DTYPES

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Buffers that old checkpoints hold; RoPE is computed.
ROTARY_BUFFERS = (
    r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
    "rotary buffer: computed from the config",
)
TIED_HEAD = (r"lm_head\.weight$", "tied to the embedding")


def activation(c: Config) -> str:
    """``hidden_act`` by moec's name."""
    name = c.text("hidden_act", default="silu")
    if name not in _ACTIVATIONS:
        raise c.unsupported(f"hidden_act is {name!r}: moec has {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def layer_count(c: Config) -> int:
    count: int = c.integer("num_hidden_layers", most=10_000)
    return count


def norm_eps(c: Config, default: float = 1e-6) -> float:
    eps: float = c.number("rms_norm_eps", default=default)
    return eps


def model_fields(c: Config) -> dict[str, Any]:
    """What every Model takes from the config, beside its layers."""
    tied = c.flag("tie_word_embeddings", default=False)
    vocab = c.integer("vocab_size")
    return {
        "vocab": vocab,
        "hidden": c.integer("hidden_size"),
        "eps": norm_eps(c),
        "tied": tied,
        "dtype": _dtype(c),
        "max_positions": c.integer("max_position_embeddings"),
        "eos": c.ids("eos_token_id", vocab),
        "name": c.name,
        "quantization": _quantization(c),
        "ignored": (ROTARY_BUFFERS, *([TIED_HEAD] if tied else [])),
    }


def _dtype(c: Config) -> str:
    said = c.text("dtype", "torch_dtype", default="bfloat16")
    for short in COMPUTE_DTYPES:
        if said.removeprefix("torch.") in (short, DTYPES[short].torch_name):
            return short
    raise c.unsupported(f"dtype is {said!r}: moec computes in {', '.join(COMPUTE_DTYPES)}")


def _quantization(c: Config) -> BlockFP8 | None:
    q = c.section("quantization_config")
    if q is None:
        return None
    q.allow("quant_method", ["fp8"], "this quantisation of checkpoints")
    q.allow("fmt", ["e4m3"], "this format of fp8", default="e4m3")
    q.allow("activation_scheme", ["dynamic"], "a static scale of activations", default="dynamic")
    if not q.has("weight_block_size"):
        raise q.unsupported(
            f"{q.path('weight_block_size')} is missing: fp8 with one scale a tensor isn't supported"
        )
    block = q.items("weight_block_size", int)
    if len(block) != 2 or min(block) < 1:
        raise q.contradiction(
            f"{q.path('weight_block_size')} must be two positive integers, not {list(block)}"
        )
    said = q.allow("scale_fmt", [None, "float", "ue8m0"], "this format of scales")
    how = BlockFP8(
        (block[0], block[1]),
        keep=q.items("modules_to_not_convert", str),
        scale_fmt="ue8m0" if said == "ue8m0" else "fp32",
    )
    q.finish()
    return how


def grouped_query_attention(c: Config, rope: RoPE | None = None, **family: Any) -> GQA:
    """Attention of Llama's kind; ``family`` holds what differs."""
    heads = c.integer("num_attention_heads")
    kv_heads = c.integer("num_key_value_heads", default=heads)
    head_dim = c.integer("head_dim", default=None)
    if head_dim is None:
        hidden = c.integer("hidden_size")
        c.need(
            hidden % heads == 0, f"hidden_size is {hidden}, which {heads} num_attention_heads don't divide"
        )
        head_dim = hidden // heads
    c.need(
        heads % kv_heads == 0,
        f"num_attention_heads is {heads}, which num_key_value_heads {kv_heads} doesn't divide",
    )
    return GQA(heads, kv_heads, head_dim, rope=rope or rotary(c), eps=norm_eps(c), **family)


# RoPE: `rope_theta` beside `rope_scaling` until transformers 4, all in `rope_parameters` since 5.
def rotary(c: Config, layout: str = "half", theta: float = 10000.0) -> RoPE:
    """The rotary embedding; ``theta`` is the family's default. Refuses scalings unknown here."""
    _refuse_partial(c)
    s = c.section("rope_parameters")
    old = c.section("rope_scaling")
    if s is not None and old is not None:
        c.need(
            _without_type(s) == _without_type(old), "rope_parameters and rope_scaling contradict each other"
        )
    s = s or old
    outer = c.number("rope_theta", default=None, above=1.0)
    inner = s.number("rope_theta", default=None, above=1.0) if s else None
    if outer is not None and inner is not None:
        c.need(outer == inner, f"rope_theta is {outer:g}, but {inner:g} in {s.where if s else ''}")
    plain: dict[str, Any] = {"theta": inner or outer or theta, "layout": layout}
    return RoPE(**plain) if s is None else _scaled(c, s, plain)


def _without_type(s: Config) -> dict[str, Any]:
    """The fields in one spelling, the theta left out."""
    fields = {k: v for k, v in s.data.items() if k not in ("type", "rope_type", "rope_theta")}
    return fields | {"rope_type": s.get("rope_type", "type", default="default")}


def _refuse_partial(c: Config) -> None:
    part = c.number("partial_rotary_factor", default=1.0)
    if part != 1.0:
        raise c.unsupported(
            f"{c.path('partial_rotary_factor')} is {part:g}: RoPE over a part of each head isn't supported"
        )


def _scaled(c: Config, s: Config, plain: dict[str, Any]) -> RoPE:
    nested = [key for key, value in s.data.items() if isinstance(value, dict)]
    if nested:
        raise s.unsupported(
            f"{s.where} has parts for {', '.join(nested)}: one RoPE for each kind of layer isn't supported"
        )
    _refuse_partial(s)
    kind = s.text("rope_type", "type", default="default")
    readers = {"default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
    if kind not in readers:
        raise s.unsupported(f"{s.path('rope_type')} is {kind!r}: moec has {', '.join(readers)}")
    rope = readers[kind](c, s, plain)
    unread = [key for key, value in s.data.items() if key not in s.read and value is not None]
    if unread:
        raise s.unsupported(f"{s.path(unread[0])} means nothing to RoPE of type {kind!r}")
    return rope


def _plain(c: Config, s: Config, plain: dict[str, Any]) -> RoPE:
    return RoPE(**plain)


def _linear(c: Config, s: Config, plain: dict[str, Any]) -> RoPE:
    return LinearRoPE(**plain, factor=s.number("factor", least=1.0))


def _llama3(c: Config, s: Config, plain: dict[str, Any]) -> RoPE:
    low, high = s.number("low_freq_factor"), s.number("high_freq_factor")
    s.need(low < high, f"{s.path('low_freq_factor')} is {low:g}, not below high_freq_factor, {high:g}")
    return Llama3RoPE(
        **plain, factor=s.number("factor", least=1.0), original=_original(c, s), low=low, high=high
    )


def _yarn(c: Config, s: Config, plain: dict[str, Any]) -> RoPE:
    original = _original(c, s)
    fast, slow = s.number("beta_fast", default=32.0), s.number("beta_slow", default=1.0)
    s.need(fast >= slow, f"{s.path('beta_fast')} is {fast:g}, below beta_slow, {slow:g}")
    return YaRN(
        **plain,
        factor=s.number("factor", default=c.integer("max_position_embeddings") / original, least=1.0),
        original=original,
        beta_fast=fast,
        beta_slow=slow,
        mscale=s.number("mscale", default=0.0, least=0.0),
        mscale_all_dim=s.number("mscale_all_dim", default=0.0, least=0.0),
        attention_factor=s.number("attention_factor", default=None),
        truncate=s.flag("truncate", default=True),
    )


def _original(c: Config, s: Config) -> int:
    """Positions of the first training; a field outside the scaling's own goes first, as in transformers."""
    inner = s.integer("original_max_position_embeddings", default=c.integer("max_position_embeddings"))
    outer: int = c.integer("original_max_position_embeddings", default=inner)
    return outer
