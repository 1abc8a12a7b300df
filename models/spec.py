"""What a user compiles: a whole Model, or one Layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moec.errors import BadOption, nearest
from moec.ir.types import DTYPES
from moec.models.blocks import Decoder
from moec.models.blocks.base import Block, Declared
from moec.models.quantization import BlockFP8

COMPUTE_DTYPES = ("f32", "bf16", "f16")


def compute_dtype(name: str) -> str:
    """The short name of a dtype that models compute in, by short or torch's name. Raises BadOption."""
    for dtype in COMPUTE_DTYPES:
        if name.removeprefix("torch.") in (dtype, DTYPES[dtype].torch_name):
            return dtype
    known = ", ".join(COMPUTE_DTYPES)
    raise BadOption(f"no model computes in {name!r}{nearest(name, COMPUTE_DTYPES)}; the dtypes are {known}")


def need_ids(model: Model) -> None:
    """``eos`` holds token ids of the vocabulary."""
    model.need(isinstance(model.eos, tuple), f"eos must be a token id or a tuple of them, not {model.eos!r}")
    for id in model.eos:
        fits = isinstance(id, int) and not isinstance(id, bool) and 0 <= id < model.vocab
        model.need(fits, f"eos names {id!r}, which is no id of a vocabulary of {model.vocab}")


def need_reasons(part: Model | Layer) -> None:
    """``ignored`` holds pairs of a regex and a text."""
    part.need(isinstance(part.ignored, tuple), f"ignored must be a tuple of pairs, not {part.ignored!r}")
    for pair in part.ignored:
        fits = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], str)
        part.need(fits, f"ignored must hold pairs (regex, reason), not {pair!r}")
        part.need_regex("ignored", pair[0])


@dataclass(frozen=True)
class Model(Declared):
    """A decoder-only transformer: embedding, ``layers``, final norm, head.

    tied            the head's weight is the embedding's
    eps             of the final norm
    dtype           of weights, activations and cache
    max_positions   tokens of the longest sequence
    page            tokens a page of the KV cache
    eos             ids that end a generated text; a single one may be given alone
    quantization    how the checkpoint stores its linear weights, None where it stores them plainly
    first_layer     the number of ``layers[0]`` in the checkpoint: not 0 where a part of a model is compiled
    ignored         (regex of tensor names, reason): what a checkpoint may hold and the model has no use for
    """

    vocab: int
    hidden: int
    layers: Sequence[Decoder]
    eps: float = 1e-6
    tied: bool = False
    dtype: str = "bf16"
    max_positions: int = 4096
    page: int = 64
    eos: tuple[int, ...] = ()
    name: str = "model"
    quantization: BlockFP8 | None = None
    first_layer: int = 0
    ignored: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.layers, Sequence):
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.eos, int):
            object.__setattr__(self, "eos", (self.eos,))
        self.as_tuple("eos", "ignored")

    def check(self) -> None:
        self.need_positive("vocab", "hidden", "max_positions", "page")
        self.need(isinstance(self.layers, tuple), f"layers must be a list of Decoders, not {self.layers!r}")
        self.need(len(self.layers) > 0, "layers is empty")
        for number, layer in enumerate(self.layers):
            self.need(isinstance(layer, Decoder), f"layers[{number}] must be a Decoder, not {layer!r}")
        self.need_number("eps", above=0)
        self.need_flag("tied")
        self.need_one_of("dtype", *COMPUTE_DTYPES)
        self.need_text("name")
        self.need_natural("first_layer")
        self.need(
            self.quantization is None or isinstance(self.quantization, BlockFP8),
            f"quantization must be a BlockFP8, not {self.quantization!r}",
        )
        need_ids(self)
        need_reasons(self)

    def with_dtype(self, dtype: str) -> Model:
        """The model computing in ``dtype``."""
        return replace(self, dtype=compute_dtype(dtype))

    def with_layers(self, which: int | str) -> Model:
        """The first ``which`` layers, or those of an inclusive range ``"3-5"``, under their own numbers."""
        first, last = _layer_range(str(which), len(self.layers))
        numbers = [n + self.first_layer for n in range(len(self.layers)) if not first <= n <= last]
        outside = "|".join(map(str, numbers))
        dropped = (rf"model\.layers\.({outside})\.", f"not among layers {first}-{last}")
        return replace(
            self,
            layers=self.layers[first : last + 1],
            first_layer=self.first_layer + first,
            ignored=(*self.ignored, dropped) if numbers else self.ignored,
        )

    def ignores(self, tensor: str) -> str | None:
        """Why a tensor of the checkpoint isn't used, None where it has no such excuse."""
        return next((why for pattern, why in self.ignored if re.match(pattern, tensor)), None)


def _layer_range(text: str, count: int) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise BadOption(f"layers {text!r} is neither a count, as 4, nor an inclusive range, as 3-5")
    first, last = (int(match[1]), int(match[2])) if match[2] else (0, int(match[1]) - 1)
    if not 0 <= first <= last < count:
        raise BadOption(f"layers {text} of a model of {count} layers, 0-{count - 1}")
    return first, last


@dataclass(frozen=True)
class Layer(Declared):
    """One block, compiled to ``forward(x [N, hidden])``.

    A block that uses the context (positions, the cache, ...) makes it an argument of ``forward``. ``number``
    is the layer of the cache that it reads and writes.
    """

    block: Block
    hidden: int
    dtype: str = "bf16"
    name: str = "layer"
    max_positions: int = 4096
    page: int = 64
    number: int = 0
    ignored: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self.as_tuple("ignored")

    def check(self) -> None:
        self.need_a("block", Block)
        self.need_positive("hidden", "max_positions", "page")
        self.need_natural("number")
        self.need_one_of("dtype", *COMPUTE_DTYPES)
        self.need_text("name")
        need_reasons(self)

    def with_dtype(self, dtype: str) -> Layer:
        """The layer computing in ``dtype``."""
        return replace(self, dtype=compute_dtype(dtype))

    def with_layers(self, which: int | str) -> Layer:
        raise BadOption("layers can't be picked from a spec of one layer")


Spec = Model | Layer
