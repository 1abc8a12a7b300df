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
DEFAULT_LEVEL = 2


def pipeline(level: int = DEFAULT_LEVEL, target: str = "cpu") -> list[Pass]:
    """The passes of a level for a target (``cpu``, ``sm_90a``, ...). Raises BadOption for another level."""
    if level not in LEVELS:
        raise BadOption(f"-O {level}: the levels are {', '.join(map(str, LEVELS))}")
    return [p for text in _pipeline(level, target) for p in parse_pipeline(text)]


def _pipeline(level: int, target: str) -> list[str]:
    if level == 0:
        return []
    # Last: which kernel and which buffer.
    last = ["select", "plan"]
    if level == 1:
        return ["canonicalise", *last]
    return [
        # Shapes as the rules below expect them.
        "canonicalise",
        # What is computed, on every target.
        "expert-grouping{fold_shared=true}" if level == 3 else "expert-grouping",
        "mla-absorb",
        *(["merge-projections"] if target != "cpu" else []),
        "canonicalise",
        # In which precision: fp8-cast from sm_89 on, where a recipe or the checkpoint asks for it.
        # fp8-cast
        # What is computed together: on GPUs, which pay for every trip to memory.
        *(["permute-fusion", "norm-fusion"] if target != "cpu" else []),
        *(["rope-cache-fusion"] if target != "cpu" else []),
        *last,
    ]
