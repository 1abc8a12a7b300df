"""config.json, read field by field: a getter checks what it reads, and objects by file and field."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from moec.errors import ConfigContradiction, ConfigUnreadable, SourceLoc, UnsupportedModel, nearest

_REQUIRED: Final = object()

# Fields that tell how a model was trained, made or saved, and change nothing of what it computes.
HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "aux_loss_alpha",
        "bos_token_id",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "ep_size",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "moe_router_bias_update_speed",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "seq_aux",
        "task_specific_params",
        "tokenizer_class",
        "transformers_version",
        "unsloth_version",
        "use_cache",
    ]
)
# Fields that change what a model computes, refused by a family that doesn't read them unless they are null,
# false, zero, empty or as NEUTRAL says.
REFUSED = {
    **dict.fromkeys(
        ["num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"],
        "a mixture of experts",
    ),
    **dict.fromkeys(["moe_intermediate_size", "mlp_only_layers"], "a mixture of experts"),
    **dict.fromkeys(["n_shared_experts", "shared_expert_intermediate_size"], "shared experts"),
    **dict.fromkeys(["n_group", "topk_group"], "a choice of experts within groups"),
    **dict.fromkeys(["scoring_func", "topk_method"], "another choice of experts"),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank"], "latent attention"),
    **dict.fromkeys(["sliding_window", "use_sliding_window"], "a sliding window"),
    **dict.fromkeys(["attention_bias", "qkv_bias", "mlp_bias", "use_bias"], "a bias of linear layers"),
    **dict.fromkeys(["qk_layernorm", "use_qk_norm"], "a norm of queries and keys"),
    **dict.fromkeys(["hc_mult", "hc_sinkhorn_iters"], "hyper-connections"),
    "rope_interleave": "RoPE over interleaved pairs",
    "routed_scaling_factor": "a scale of the experts' weights",
    "clip_qkv": "clamped queries, keys and values",
    "swiglu_limit": "a clamped SwiGLU",
    "swiglu_alpha": "a SwiGLU with a slope of its own",
    "num_hash_layers": "routing by a hash of the token",
    "compress_ratios": "compressed attention",
    "use_parallel_residual": "attention and MLP side by side",
    "attn_logit_softcapping": "soft capping of attention scores",
    "final_logit_softcapping": "soft capping of logits",
    "logits_soft_cap": "soft capping of logits",
    "logit_scale": "scaled logits",
    "logits_scaling": "scaled logits",
    "embedding_multiplier": "scaled embeddings",
    "residual_multiplier": "scaled residuals",
    "attention_multiplier": "a scale of attention scores",
    "alibi": "ALiBi position bias",
    "add_cross_attention": "cross attention",
    "index_topk": "sparse attention",
    "index_n_heads": "sparse attention",
    "attention_chunk_size": "chunked attention",
    "no_rope_layers": "layers without RoPE",
    "pruned_heads": "pruned heads",
    "adapter": "adapters",
}
# At these values they change nothing.
NEUTRAL = {
    **dict.fromkeys(["n_group", "topk_group", "routed_scaling_factor", "logit_scale", "logits_scaling"], 1),
    **dict.fromkeys(["embedding_multiplier", "residual_multiplier"], 1),
    "scoring_func": "softmax",
    "topk_method": "greedy",
}


class Config:
    """The fields of one JSON object, and which of them were read."""

    def __init__(
        self, data: Mapping[str, Any], file: str = "config.json", where: str = "", name: str = "model"
    ) -> None:
        self.data, self.file, self.where, self.name = data, file, where, name
        self.read: set[str] = set()

    # Errors.
    @property
    def loc(self) -> SourceLoc:
        return SourceLoc(self.file, 0)

    def contradiction(self, message: str) -> ConfigContradiction:
        return ConfigContradiction(message, loc=self.loc)

    def unsupported(self, message: str) -> UnsupportedModel:
        return UnsupportedModel(message, loc=self.loc)

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def need(self, holds: bool, message: str) -> None:
        if not holds:
            raise self.contradiction(message)

    def allow(self, key: str, allowed: Iterable[Any], feature: str, default: Any = None) -> Any:
        """The field, which moec supports only at these values. Raises UnsupportedModel."""
        value = self.get(key, default=default)
        if value not in tuple(allowed):
            raise self.unsupported(f"{self.path(key)} is {value!r}: {feature} isn't supported")
        return value

    # Reading. A field that is null counts as left out; several keys are spellings of one field.
    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def get(self, *keys: str, default: Any = _REQUIRED) -> Any:
        self.read.update(keys)
        found = {key: self.data[key] for key in keys if self.has(key)}
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            said = " but ".join(f"{self.path(key)} is {value!r}" for key, value in found.items())
            raise self.contradiction(f"{said}: they are two spellings of one field")
        if values:
            return values[0]
        if default is _REQUIRED:
            hint = nearest(keys[0], (k for k in self.data if k not in self.read))
            raise self.contradiction(f"{self.path(keys[0])} is missing{hint}")
        return default

    def integer(self, *keys: str, default: Any = _REQUIRED, least: int = 1, most: int = 2**40) -> Any:
        value = self.get(*keys, default=default)
        if value is default and not isinstance(value, int):
            return value  # an optional field, left out
        if not _is_int(value) or not least <= value <= most:
            raise self.contradiction(
                f"{self.path(keys[0])} must be an integer of {least} to {most}, not {value!r}"
            )
        return value

    def number(
        self, *keys: str, default: Any = _REQUIRED, above: float = 0.0, least: float | None = None
    ) -> Any:
        """A finite number greater than ``above``, or of ``least`` or more where that is given."""
        value = self.get(*keys, default=default)
        if value is default and value is None:
            return value
        fits = isinstance(value, int | float) and not isinstance(value, bool) and value < 1e30
        if not fits or not (value > above if least is None else value >= least):
            bound = f"above {above:g}" if least is None else f"of {least:g} or more"
            raise self.contradiction(f"{self.path(keys[0])} must be a number {bound}, not {value!r}")
        return float(value)

    def flag(self, *keys: str, default: Any = _REQUIRED) -> bool:
        value = self.get(*keys, default=default)
        if not isinstance(value, bool):
            raise self.contradiction(f"{self.path(keys[0])} must be true or false, not {value!r}")
        return value

    def text(self, *keys: str, default: Any = _REQUIRED) -> str:
        value = self.get(*keys, default=default)
        if not isinstance(value, str):
            raise self.contradiction(f"{self.path(keys[0])} must be a text, not {value!r}")
        return value

    def items(self, key: str, kind: type, default: Any = ()) -> tuple[Any, ...]:
        value = self.get(key, default=default)
        fits = isinstance(value, list | tuple) and all(
            isinstance(v, kind) and not isinstance(v, bool) for v in value
        )
        if not fits:
            raise self.contradiction(f"{self.path(key)} must be a list of {kind.__name__}, not {value!r}")
        return tuple(value)

    def ids(self, key: str, vocab: int) -> tuple[int, ...]:
        """A token id of a vocabulary, or several."""
        value = self.get(key, default=())
        found = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(_is_int(v) and v >= 0 for v in found):
            raise self.contradiction(f"{self.path(key)} must be a token id or a list of them, not {value!r}")
        for id in found:
            self.need(id < vocab, f"{self.path(key)} names {id}, but vocab_size is {vocab}")
        return found

    def section(self, key: str) -> Config | None:
        """A nested object, None where it is left out."""
        value = self.get(key, default=None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.contradiction(f"{self.path(key)} must be an object, not {value!r}")
        return Config(value, self.file, self.path(key), self.name)

    def skip(self, *keys: str) -> None:
        """These fields are known and mean nothing here."""
        self.read.update(keys)

    def finish(self) -> None:
        """Refuses what would change the result unread, and warns of what is unknown.

        In a section nothing is harmless: what is unknown there is refused too.
        """
        for key, value in self.data.items():
            if key in self.read or value in (None, False, 0, [], {}):
                continue
            if self.where:
                raise self.unsupported(f"{self.path(key)} is {value!r}, which means nothing to moec")
            if key in HARMLESS or value == NEUTRAL.get(key):
                continue
            if key in REFUSED:
                kind = self.data.get("model_type")
                raise self.unsupported(
                    f"{key} is {value!r}: {REFUSED[key]} isn't supported in a {kind} model"
                )
            warnings.warn(f"{self.file}: {key} is unknown to moec and was ignored", stacklevel=2)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, with or without a byte order mark. Raises ConfigUnreadable."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ConfigUnreadable(f"{name} is given twice", loc=SourceLoc(str(file), 0))
            found[name] = value
        return found

    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except OSError as error:
        raise ConfigUnreadable(
            f"can't read it: {error.strerror or error}", loc=SourceLoc(str(file), 0)
        ) from None
    except UnicodeDecodeError:
        raise ConfigUnreadable("it is no UTF-8 text", loc=SourceLoc(str(file), 0)) from None
    except json.JSONDecodeError as error:
        raise ConfigUnreadable(
            f"it is no JSON: {error.msg}", loc=SourceLoc(str(file), error.lineno)
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ConfigUnreadable(f"it is no JSON: {error}", loc=SourceLoc(str(file), 0)) from None
    if not isinstance(data, dict):
        raise ConfigUnreadable(
            f"it holds a {type(data).__name__}, not an object", loc=SourceLoc(str(file), 1)
        )
    return data
