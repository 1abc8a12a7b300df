"""Numbers for the symbols of a module: ``--at T=4096,S=8192``, and what is taken where nothing is said.

N (or T) new tokens of a step, B sequences, S cached entries of all sequences together with the new tokens',
P pages a sequence. ``context`` is S of one sequence: S = B · context.
"""

from __future__ import annotations

import re
from typing import Any

from moec.errors import BadOption, nearest
from moec.ir.attrs import SYMBOL
from moec.ir.graph import ENTRIES, Module
from moec.ir.ops.moe import ExpertSlots
from moec.ir.types import CacheType, TensorType, symbol
from moec.ir.weights import WEIGHTS

CONTEXT = "context"


def symbols(module: Module) -> list[str]:
    """The symbols that a module's costs speak of, but those that it finds itself: an expert's rows, the parts
    of a batch that is parted.
    """
    found: dict[str, None] = {}
    own: set[str] = set()
    types: dict[Any, None] = {}
    for function in module:
        if function.name.split(".")[0] == WEIGHTS:
            continue
        types |= {arg.type: None for arg in function.args}
        for op in function.ops:
            types |= {result.type: None for result in op.results}
            defined = [op.attrs[name] for name, spec in op.attr_specs.items() if spec.kind is SYMBOL]
            if isinstance(op, ExpertSlots) or hasattr(op, "shares"):
                own.update(defined)
            found |= dict.fromkeys(defined)
            if hasattr(op, "shares"):  # the parts' entries are of the batch's
                found["S"] = None
    for type in types:
        found |= dict.fromkeys(_free(type))
    return sorted((name for name in found if name not in own), key=_rank)


def _rank(name: str) -> int:
    usual = ("N", "B", "S", "P")
    return usual.index(name) if name in usual else len(usual)


def _free(type: Any) -> list[str]:
    """The symbols in a type. A cache has entries: S of them are read."""
    if isinstance(type, CacheType):
        return ["S"]
    if not isinstance(type, TensorType):
        return []
    return sorted({s.name for dim in type.shape if not isinstance(dim, int) for s in dim.free_symbols})


def parse_sizes(text: str, module: Module) -> dict[str, int]:
    """``T=4096,S=8192`` by the module's own symbols. Raises BadOption, with the nearest names."""
    known = symbols(module)
    names = known + (["T"] if "N" in known and "T" not in known else []) + ([CONTEXT] if "S" in known else [])
    found: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = (p.strip() for p in part.partition("="))
        if not re.fullmatch(r"\d{1,12}", value):
            raise BadOption(
                f"--at {part!r}: it takes names with numbers, as {names[0] if names else 'T'}=4096"
            )
        if name not in names:
            there = ", ".join(names) or "none"
            raise BadOption(f"--at {name}: no size is called that{nearest(name, names)}; there is {there}")
        symbol = "N" if name == "T" and "T" not in known else name
        if symbol in found:
            raise BadOption(f"--at gives {symbol} twice")
        found[symbol] = int(value)
    if CONTEXT in found and "S" in found:
        raise BadOption("--at gives both S and context, which is S of one sequence")
    return found


def complete(given: dict[str, int], module: Module) -> dict[str, int]:
    """``given`` and, where it is silent: one sequence, one new token for each, no more context than these.

    Raises BadOption for a context that is shorter than the new tokens.
    """
    sizes = dict(given)
    sequences = sizes.setdefault("B", 1)
    tokens = sizes.setdefault("N", sequences)
    if tokens and not sequences and "B" in symbols(module):
        raise BadOption(f"B=0 sequences can't have {tokens} new tokens")
    context = sizes.pop(CONTEXT, None)
    if context is not None:
        sizes["S"] = sequences * context
    elif "S" not in sizes:
        sizes["S"] = tokens
    if sizes["S"] < tokens and "S" in symbols(module):
        raise BadOption(f"S={sizes['S']} cached entries: they include the {tokens} new tokens'")
    if "P" not in sizes:
        sizes["P"] = -(-sizes["S"] // (max(sequences, 1) * _page(module)))
    known = symbols(module)
    found = {name: sizes[name] for name in known if name in sizes}
    for function in module:
        for op in function.ops:
            if (shares := getattr(op, "shares", None)) is not None:  # of an op that parts a batch
                parts = shares({symbol(name): size for name, size in sizes.items()})
                found |= {s.name: int(size) for s, size in parts.items()}
    return found


def _page(module: Module) -> int:
    args = [a for name in ENTRIES if name in module for a in module[name].args]
    return next((a.type.page for a in args if isinstance(a.type, CacheType)), 1)
