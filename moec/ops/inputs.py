"""What the operators take; whatever doesn't fit is refused by the argument's name.

First that each is of its kind: PyTorch's own error for another would name no argument. The other checks read
shapes, dtypes and devices, so that an operator's fake makes them as well: ``torch.compile``
reports what the call would. Only ``check_offsets`` reads values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moec.errors import BadInput
from moec.ir.ops.route import SCORES

E4M3 = torch.float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.int32, torch.int64)
# An activation's name outside, and that of the IR's swiglu.
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
LARGEST = 2**31 - 1  # slots and offsets are int32
LEAST, MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def describe(tensor: Tensor) -> str:
    """``float32 [4, 64]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def shown(value: object) -> str:
    """What was given, in an error: never the values of a tensor, never thousands of digits."""
    if isinstance(value, Tensor):
        return describe(value)
    if isinstance(value, int) and value.bit_length() > 63:
        return f"an integer of {value.bit_length()} bits"
    return (
        repr(value) if value is None or isinstance(value, int | float | str) else f"a {type(value).__name__}"
    )


def need_tensors(**given: object) -> None:
    """Raises BadInput for what is no tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise BadInput(f"{name} is {shown(value)}; it must be a tensor")


def need_tensors_or_none(**given: object) -> None:
    """Raises BadInput for what is there and no tensor."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise BadInput(f"{name} is {shown(value)}; it must be a tensor, or left out")


def need_integers(**given: object) -> None:
    """Raises BadInput for what is no integer of 64 bits."""
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadInput(f"{name} is {shown(value)}; it must be an integer")
        if not -(2**63) < value < 2**63:
            raise BadInput(f"{name} is {shown(value)}; it must be one of 64")


def need_words(**given: object) -> None:
    """Raises BadInput for what is no text."""
    for name, value in given.items():
        if not isinstance(value, str):
            raise BadInput(f"{name} is {shown(value)}; it must be a word")


def need_flags(**given: object) -> None:
    """Raises BadInput for what is neither True nor False."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise BadInput(f"{name} is {shown(value)}; it must be True or False")


def need_scale(scale: object) -> None:
    """Raises BadInput unless routing weights can be multiplied by it."""
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not -MOST <= scale <= MOST:
        raise BadInput(f"scale is {shown(scale)}; it must be a finite number in float32")


def need_limit(limit: object) -> None:
    """Raises BadInput for a limit that isn't positive."""
    if limit is None:
        return
    if not isinstance(limit, int | float) or isinstance(limit, bool) or not LEAST <= limit <= MOST:
        raise BadInput(f"limit is {shown(limit)}; it must be a positive number in float32")


def want(name: str, tensor: Tensor, shape: Sequence[Any], meaning: str, *dtypes: torch.dtype) -> None:
    """Raises BadInput unless ``tensor`` has this shape, None being any size, and one of ``dtypes``."""
    fits = tensor.dim() == len(shape) and all(
        size is None or size == found for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        raise BadInput(f"{name} must be {names} {meaning} = [{sizes}], not {describe(tensor)}")


def check_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    contiguous: bool,
    name: str = "x",
    floats: Sequence[torch.dtype] = FLOATS,
    dtype: torch.dtype | None = None,
) -> None:
    """x [*, H], w13 [E, 2·I, H] and w2 [E, H, I] of ``dtype``, by default x's own. Raises BadInput."""
    dtype = dtype or x.dtype
    want(name, x, (None, None), "[T, H]" if name == "x" else "[R, H]", *floats)
    hidden = x.shape[1]
    if hidden < 1:
        raise BadInput(f"{name} has no columns: {describe(x)}")
    want("w13", w13, (None, None, hidden), "[E, 2·I, H]", dtype)
    experts, width = w13.shape[0], w13.shape[1]
    if experts < 1 or width < 2 or width % 2:
        raise BadInput(f"w13 must hold as many up rows as gate rows, of one expert or more: {describe(w13)}")
    want("w2", w2, (experts, hidden, width // 2), "[E, H, I]", dtype)
    check_layout("w13", w13, contiguous)
    check_layout("w2", w2, contiguous)


def check_layout(name: str, w: Tensor, contiguous: bool) -> None:
    """Raises BadInput for strides that kernels can't read: a copy at each call would hide its cost."""
    if contiguous and not w.is_contiguous():
        raise BadInput(f"{name} must be contiguous here, but {describe(w)} has strides {list(w.stride())}")


def check_routing(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, dtype: torch.dtype | None = None
) -> None:
    """topk_weights (float32 or ``dtype``, by default x's) and topk_ids [T, k]. Raises BadInput."""
    want("topk_ids", topk_ids, (x.shape[0], None), "[T, k]", *INTEGERS)
    if topk_ids.shape[1] < 1:
        raise BadInput(f"topk_ids must name an expert a token or more, not {describe(topk_ids)}")
    want(
        "topk_weights",
        topk_weights,
        topk_ids.shape,
        "[T, k]",
        *dict.fromkeys((torch.float32, dtype or x.dtype)),
    )


def check_router(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    score: str,
    groups: int,
    topk_groups: int,
    group_score: str,
    masked: str,
    renorm: bool,
    scale: float,
) -> None:
    """logits [T, E], bias [E], and a router that is defined for E experts. Raises BadInput."""
    want("logits", logits, (None, None), "[T, E]", *FLOATS)
    experts = logits.shape[1]
    if bias is not None:
        want("bias", bias, (experts,), "[E]", *dict.fromkeys((torch.float32, logits.dtype)))
    for name, word, words in (
        ("score", score, SCORES),
        ("group_score", group_score, ("max", "top2sum")),
        ("masked", masked, ("zero", "neginf")),
    ):
        if word not in words:
            raise BadInput(f"{name} is {word!r}; it must be one of {', '.join(words)}")
    if not 0 < k <= experts:
        raise BadInput(
            f"k is {k}; it must be 1 to {experts}, the number of experts: logits is {describe(logits)}"
        )
    if groups < 1 or experts % groups:
        raise BadInput(f"groups is {groups}; {experts} experts can't be parted into so many equal groups")
    if not 0 < topk_groups <= groups:
        raise BadInput(f"topk_groups is {topk_groups}; it must be 1 to {groups}, the number of groups")
    size = experts // groups
    if groups > 1 and size < 2 and group_score == "top2sum":
        raise BadInput(f"group_score is top2sum, but {groups} groups of {experts} experts have one each")
    if groups > 1 and masked == "neginf" and k > size * topk_groups:
        raise BadInput(f"k is {k}, but {topk_groups} groups of {size} experts allow {size * topk_groups}")
    need_scale(scale)


def check_hash_router(logits: Tensor, table: Tensor, tokens: Tensor, score: str, scale: float) -> None:
    """logits [T, E], table [vocab, k], tokens [T]. Raises BadInput."""
    want("logits", logits, (None, None), "[T, E]", *FLOATS)
    want("table", table, (None, None), "[vocab, k]", *INTEGERS)
    want("tokens", tokens, (logits.shape[0],), "[T]", *INTEGERS)
    if min(logits.shape[1], *table.shape) < 1:
        raise BadInput(f"there is nothing to choose: logits is {describe(logits)}, table {describe(table)}")
    if score not in SCORES[1:]:
        raise BadInput(f"score is {score!r}; it must be one of {', '.join(SCORES[1:])}")
    need_scale(scale)


def check_activation(activation: str, limit: float | None) -> None:
    """Raises BadInput for a name that isn't known, or a limit that isn't positive."""
    if activation not in ACTIVATIONS:
        raise BadInput(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    need_limit(limit)


def check_like(name: str, tensor: Tensor | None, x: Tensor, *dtypes: torch.dtype) -> None:
    """``tensor``, where there is one, has x's shape, and x's dtype or one of ``dtypes``. Raises BadInput."""
    if tensor is not None:
        want(name, tensor, x.shape, "like x", *dict.fromkeys((*dtypes, x.dtype)))


def check_devices(**tensors: Tensor | None) -> None:
    """Raises BadInput unless all are on the first one's device."""
    given = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    first, device = given[0]
    for name, other in given:
        if other != device:
            raise BadInput(f"{first} is on {device}, but {name} on {other}")


def check_offsets(off: Tensor, rows: int) -> None:
    """0 = off[0] ≤ … ≤ off[E] ≤ rows, where that can be read without waiting. Raises BadInput."""
    if off.device.type != "cpu":
        return
    values = off.tolist()
    if values[0] != 0 or values[-1] > rows or any(a > b for a, b in pairwise(values)):
        raise BadInput(f"off must rise from 0 to at most {rows}, the number of rows, not {values}")


def check_count(rows: int) -> None:
    """Raises BadInput for more rows than int32 counts."""
    if rows > LARGEST:
        raise BadInput(f"{rows} rows through the experts: at most {LARGEST} in one call")
