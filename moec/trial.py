"""Random inputs and weights for any module: what an oracle runs it on when nobody gives better ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from moec.codegen.parameters import manifest_tensors
from moec.errors import BadInput
from moec.ir import CacheType, Function, Interpreter, Module, TensorType
from moec.ir.graph import ENTRIES
from moec.ir.op import Argument
from moec.ir.ops.control import Call
from moec.ir.weights import WEIGHTS
from moec.runtime.checkpoint import Checkpoint, open_checkpoint

LENGTHS = (5, 3)  # new tokens of each sequence, from its start
PAGES = 4  # of a cache, a sequence


class Tensors(Mapping[str, torch.Tensor]):
    """A checkpoint as the mapping that the interpreter takes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._names = checkpoint, set(checkpoint.names())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._checkpoint.tensor(name)

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def weights_for(module: Module, weights: Any = "random:0") -> Tensors:
    """The tensors that ``module`` takes, from a folder, a mapping or ``random:SEED``."""
    return Tensors(open_checkpoint(weights, manifest_tensors(module)["checkpoint"]))


def inputs_for(module: Module, seed: int = 0) -> dict[str, tuple[Any, ...]]:
    """Arguments of each entry: two new sequences, random tokens and activations, empty caches.

    Raises BadInput for a module with an argument whose meaning its name doesn't tell.
    """
    generator = torch.Generator().manual_seed(seed)
    run = {op.attrs["callee"] for f in module for op in f.ops if "callee" in op.attrs}
    names = [n for n in ENTRIES if n in module and n != WEIGHTS]
    names = names or [n for n in module.functions if n not in run and n.split(".")[0] != WEIGHTS]
    return {
        name: tuple(_argument(module, module[name], arg, generator) for arg in module[name].args)
        for name in names
    }


def caches_for(module: Module, inputs: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """The same inputs with new caches, of the entries that ``module`` keeps."""
    generator = torch.Generator()
    found = {}
    for name, args in inputs.items():
        function = module[name]
        found[name] = tuple(
            _argument(module, function, arg, generator) if isinstance(arg.type, CacheType) else given
            for arg, given in zip(function.args, args, strict=True)
        )
    return found


def _argument(module: Module, function: Function, arg: Argument, generator: torch.Generator) -> Any:
    if isinstance(arg.type, CacheType):
        layers = [op.range.last + 1 for op in function.ops if isinstance(op, Call)]
        pages = PAGES * len(LENGTHS)
        return Interpreter(Module("none"), {}).new_cache(arg.type, max(layers, default=1), pages)
    if not isinstance(arg.type, TensorType):
        return 0  # a loop's number
    known = _batch(_page(function)).get(arg.name)
    if known is not None:
        return known
    if arg.name == "ids":
        tables = [op.operands[1] for op in function.ops if op.name == "embedding"]
        rows = [t.type.shape[0] for t in tables if t is not None and isinstance(t.type, TensorType)]
        vocabulary = int(rows[0]) if rows else 2
        return torch.randint(vocabulary, (sum(LENGTHS),), generator=generator)
    if not arg.type.dtype.is_float:
        raise BadInput(f"@{function.name}: can't think of values for {arg.text}, which is {arg.type}")
    return torch.randn(_shape(arg.type), generator=generator).to(arg.type.dtype.torch)


def _shape(type: TensorType) -> list[int]:
    sizes = {"N": sum(LENGTHS), "T": sum(LENGTHS), "B": len(LENGTHS), "P": PAGES}
    found = []
    for dim in map(sympy.sympify, type.shape):
        found.append(int(dim.subs({s: sizes.get(str(s), sum(LENGTHS)) for s in dim.free_symbols})))
    return found


def _page(function: Function) -> int:
    return next((a.type.page for a in function.args if isinstance(a.type, CacheType)), 64)


def _batch(page: int) -> dict[str, torch.Tensor]:
    """What a step is told of its sequences: the first has the first pages, and so on."""
    positions = [p for length in LENGTHS for p in range(length)]
    slots = [b * PAGES * page + p for b, length in enumerate(LENGTHS) for p in range(length)]
    bounds = [sum(LENGTHS[:b]) for b in range(len(LENGTHS) + 1)]
    return {
        "positions": torch.tensor(positions),
        "slot_mapping": torch.tensor(slots),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "seq_lens": torch.tensor(LENGTHS, dtype=torch.int32),
        "block_table": torch.arange(PAGES * len(LENGTHS), dtype=torch.int32).view(-1, PAGES),
    }
