"""Which passes run at each ``-O`` level, in order.

O0   nothing: the naive model stays as its blocks wrote it
O1   clean-ups that change no result; kernels and buffers chosen
O2   the default: everything that pays on the target
O3   as O2, and what pays only sometimes
"""

from __future__ import annotations

from moec.errors import BadOption
from moec.passes.manager import Pass, parse_pipeline

LEVELS = (0, 1, 2, 3)
# What no level runs, since nobody has measured what it gains: it is there by name.
BY_NAME_ONLY = ("one-launch",)
DEFAULT_LEVEL = 2


def pipeline(level: int = DEFAULT_LEVEL, target: str = "cpu", fp8: bool | str = False) -> list[Pass]:
    """The passes of a level for a target (``cpu``, ``sm_90a``, ...), with ``fp8`` fp8-cast among them.

    ``fp8`` is True, or a recipe and its options: ``per-row``, ``deepseek-v3{skip=[down_proj]}``,
    ``block=64``. Raises BadOption for another level, or for what fp8-cast doesn't take.
    """
    if level not in LEVELS:
        raise BadOption(f"-O {level}: the levels are {', '.join(map(str, LEVELS))}")
    return [p for text in _pipeline(level, target, fp8_pass(fp8)) for p in parse_pipeline(text)]


def fp8_pass(fp8: bool | str) -> list[str]:
    """fp8-cast as text, where ``fp8`` asks for it."""
    if isinstance(fp8, bool):
        return ["fp8-cast"] * fp8
    recipe, brace, options = fp8.strip().partition("{")
    if brace:
        if not options.endswith("}"):
            raise BadOption(f"fp8: {fp8!r} has no closing brace")
        options = options.removesuffix("}")
    elif "=" in recipe:
        recipe, options = "", recipe
    return [f"fp8-cast{{{','.join(filter(None, (recipe and f'recipe={recipe}', options)))}}}"]


def _pipeline(level: int, target: str, fp8: list[str]) -> list[str]:
    if level == 0:
        return fp8
    # Last: which kernel and which buffer.
    last = ["select", "plan"]
    if level == 1:
        return ["canonicalise", *fp8, *last]
    return [
        # Shapes as the rules below expect them.
        "canonicalise",
        # What is computed, on every target.
        "expert-grouping{fold_shared=true}" if level == 3 else "expert-grouping",
        "mla-absorb",
        "paged-attention",
        *(["merge-projections"] if target != "cpu" else []),
        "canonicalise",
        # In which precision.
        *fp8,
        # What is computed together: on GPUs, which pay for every trip to memory.
        *(["permute-fusion{route_sort=true,combine=true}", "norm-fusion"] if target != "cpu" else []),
        *(["sort-quant-fusion", "rope-cache-fusion"] if target != "cpu" else []),
        # A further entry: what @step is for few new tokens.
        "decode-entry",
        *last,
    ]
