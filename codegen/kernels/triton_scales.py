"""How a product of fp8 values applies the scales that travel with them.

Hopper's matrix unit keeps about 14 bits of a sum of fp8 products: a step along K is a product of its own, and
the steps are added up in fp32. Where scales change along K, a step is one block of them, and its product is
multiplied by the scales as it is added; scales that hold for all of K are applied after the last step.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.types import TensorType, format_block

K_BLOCK = 128  # what a step along K covers, and so what shares a scale along K unless all of it does
QUANT_BLOCK = (1, K_BLOCK)  # of results, so that the next product's steps fit
WEIGHT_BLOCK = (128, K_BLOCK)  # of a checkpoint's weights, as DeepSeek-V3 has them


@dataclass(frozen=True)
class Part:
    """A sum and the scales of its weights: ``index`` is the place of the first one, in blocks of rows."""

    name: str
    sum: str
    index: str


@dataclass(frozen=True)
class Scales:
    """What the template asks. ``steps``: scales change along K; ``rows``: each row of x has its own.

    ``w_uniform``: a tile of w has one scale a step, not one a column. The shapes are text, for readers.
    """

    x_shape: str
    w_shape: str
    k_blocks: int
    x_rows: bool
    x_steps: bool
    w_steps: bool
    w_uniform: bool
    parts: tuple[Part, ...]


def scales(x: TensorType, w: TensorType, swiglu: bool, rows_of_x: str, widest: int) -> Scales | None:
    """For tiles of at most ``widest`` columns, a power of two; None where x and w have no scales.

    ``rows_of_x`` names their number.
    """
    if x.scale is None or w.scale is None:
        return None
    (x_rows, x_depth), (w_rows, w_depth) = x.scale, w.scale
    rows, depth = w.shape[-2:]
    blocks = -(-rows // w_rows) if w_rows else 1
    firsts = {"gate": 0, "up": rows // 2} if swiglu else {"w": 0}
    uniform = w_rows == 0 or (w_rows % widest == 0 and all(first % w_rows == 0 for first in firsts.values()))
    along_k = -(-depth // K_BLOCK)
    return Scales(
        x_shape=f"{rows_of_x}, {along_k if x_depth else 1}" if x_rows else "1, 1",
        w_shape=", ".join(map(str, (*w.shape[:-2], blocks, along_k if w_depth else 1))),
        k_blocks=along_k,
        x_rows=x_rows == 1,
        x_steps=x_depth > 0,
        w_steps=w_depth > 0,
        w_uniform=uniform,
        parts=tuple(
            Part(name, name if swiglu else "total", _index(blocks, w_rows, first, uniform, w.rank == 3))
            for name, first in firsts.items()
        ),
    )


def _index(blocks: int, size: int, first: int, uniform: bool, experts: bool) -> str:
    """Python text: the number of the block that holds a tile's first row of w, or of each row's block."""
    if size == 0:
        return "expert" if experts else "0"
    if uniform:
        number = f"{f'{first // size} + ' if first else ''}n * BLOCK_N // {size}"
    else:
        number = f"({first} + cols)" if first else "cols"
        number += f" // {size}" if size > 1 else ""
    return f"({f'expert * {blocks} + ' if experts else ''}{number})"


def reasons_against_scales(x: TensorType, w: TensorType) -> list[str]:
    """Why the kernels can't multiply what has these scales; none means that they can."""
    if x.scale is None or w.scale is None:
        return ["x and w have no scales"]
    found = []
    if other := [t for t in (x, w) if t.dtype.name != "f8e4m3"]:
        found.append(f"{other[0].dtype} is not f8e4m3")
    if x.scale not in (QUANT_BLOCK, (1, 0), (0, 0)):
        found.append(f"x has scales of {format_block(x.scale)}: the kernels take 1x{K_BLOCK}, 1x* and *x*")
    if w.scale[1] not in (0, K_BLOCK):
        found.append(f"w has scales of {format_block(w.scale)}: the kernels take {K_BLOCK} columns, or all")
    return found
