"""What fp8-cast puts into fp8, and how: recipes by name, and the patterns of parameters that they skip."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from moec.errors import BadOption, ParseError, nearest
from moec.ir import Function, Module, Op, Value
from moec.ir.devices import GPUS
from moec.ir.op import OpResult, Param
from moec.ir.ops.control import Loop
from moec.ir.ops.scaled import SCALE_FORMAT
from moec.ir.ops.weights import Stack
from moec.ir.types import parse_block
from moec.ir.weights import WEIGHTS, bindings

# What a recipe's ``ops`` may name.
CASTABLE = ("linear", "grouped_linear", "head_linear")
# What it names where it says nothing.
USUAL = ("linear", "grouped_linear")
# What its ``scale`` may be, where it isn't one of the IR's formats: as a native checkpoint says.
STORED = "stored"
# What its ``kv`` may be.
KV = ("off", "per-tensor", "packed")


@dataclass(frozen=True)
class Recipe:
    """ops          linear, grouped_linear (the experts' products, fused with their gather too); head_linear,
                 W_UK and W_UV of absorbed attention, only where it is named: its weights alone are cast
    activations  what of x shares a scale: 1x128 a row's tile, 1x* a row, *x* all
    weights      what of a weight shares a scale; native fp8 checkpoints keep their blocks
    scale        of what is quantised here: fp32, or ue8m0, powers of two; stored: as a native fp8 checkpoint
                 says of its own (config.json's ``scale_fmt``), fp32 where there is none
    plain        weights that a native fp8 checkpoint stores plainly: keep them so, or cast them too
    skip         patterns of parameter names that stay as they are
    kv           the KV cache: off, per-tensor (e4m3 times ``kv_scale``), or packed (latents in e4m3 with a
                 scale for each 128 elements, what turns with the position in bf16: V3's 656 bytes)
    kv_scale     of kv=per-tensor; entries beyond 448 times it saturate
    """

    ops: tuple[str, ...] = USUAL
    activations: str = "1x128"
    weights: str = "128x128"
    scale: str = STORED
    plain: str = "keep"
    skip: tuple[str, ...] = ()
    kv: str = "off"
    kv_scale: float = 1.0


RECIPES = {
    "deepseek-v3": Recipe(),
    "deepseek-v3.1": Recipe(scale="ue8m0"),
    "per-row": Recipe(activations="1x*", weights="1x*"),
    "per-tensor": Recipe(activations="*x*", weights="*x*"),
}


def without_fp8(target: str, recipe: Recipe) -> str:
    """What happens instead where ``target`` can't multiply the fp8 that ``recipe`` asks for; "" elsewhere."""
    gpu = GPUS.get(target)
    if gpu is None or gpu.fp8 or not recipe.ops:
        return ""
    return (
        f"{gpu.name} ({gpu.stands_for}) has no fp8 units: products stay in the model's dtype, and weights "
        "that a checkpoint stores in fp8 are dequantised when they are loaded"
        + ("; the KV cache is kept in 8 bits all the same" if recipe.kv != "off" else "")
    )


@dataclass(frozen=True)
class Options:
    """A named recipe; each field that is given takes the place of its own. ``block=64`` is short for
    ``activations=1x64,weights=64x64``."""

    recipe: str = "deepseek-v3"
    ops: tuple[str, ...] | None = None
    activations: str | None = None
    weights: str | None = None
    scale: str | None = None
    plain: str | None = None
    skip: tuple[str, ...] | None = None
    kv: str | None = None
    kv_scale: float | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            hint = nearest(self.recipe, RECIPES) or f"; there are {', '.join(RECIPES)}"
            raise ValueError(f"no recipe is called {self.recipe!r}{hint}")
        if self.block is not None and self.block < 1:
            raise ValueError(f"block is {self.block}; it must be 1 or more")
        chosen = self.chosen
        if chosen.kv not in KV:
            hint = nearest(chosen.kv, KV) or f"; there are {', '.join(KV)}"
            raise ValueError(f"kv={chosen.kv}: no cache is kept so{hint}")
        if not 0 < chosen.kv_scale < math.inf:
            raise ValueError(f"kv_scale is {chosen.kv_scale}; it must be a positive number")
        if self.kv_scale is not None and chosen.kv != "per-tensor":
            raise ValueError(f"kv_scale is of kv=per-tensor, not of kv={chosen.kv}")
        if not chosen.ops and chosen.kv == "off":
            raise ValueError(f"the recipe names no op: ops are some of {', '.join(CASTABLE)}")
        for op in chosen.ops:
            if op not in CASTABLE:
                hint = nearest(op, CASTABLE) or f"; there are {', '.join(CASTABLE)}"
                raise ValueError(f"ops: {op!r} can't be cast{hint}")
        rows, _ = _block("activations", chosen.activations)
        if rows > 1:
            raise ValueError(f"activations={chosen.activations}: a block is of one row or of all")
        _block("weights", chosen.weights)
        if chosen.scale != STORED and not SCALE_FORMAT.check(chosen.scale):
            raise ValueError(
                f"scale={chosen.scale}: it is {STORED}, {SCALE_FORMAT.name.replace('|', ' or ')}"
            )
        if chosen.plain not in ("keep", "cast"):
            raise ValueError(f"plain={chosen.plain}: it is keep or cast")
        if "" in chosen.skip:
            raise ValueError("skip holds an empty pattern")

    @property
    def chosen(self) -> Recipe:
        """The recipe with what was given in its place."""
        given = {f.name: getattr(self, f.name) for f in fields(Recipe) if getattr(self, f.name) is not None}
        if self.block is not None:
            given = {"activations": f"1x{self.block}", "weights": f"{self.block}x{self.block}"} | given
        return replace(RECIPES[self.recipe], **given)


def _block(name: str, text: str) -> tuple[int, int]:
    try:
        rows, columns = parse_block(text)
    except (ParseError, ValueError):
        raise ValueError(f"{name}={text}: a block is rows x columns, as 1x128, 128x128, 1x* or *x*") from None
    return rows, columns


class Skips:
    """Which parameters the patterns of ``skip`` cover: by their full names, and by those of the checkpoint's
    tensors that they are made of.

    A pattern is a name, or consecutive parts of one between its dots; ``*`` stands for anything.
    """

    def __init__(self, module: Module, patterns: tuple[str, ...]) -> None:
        self.module, self.patterns = module, patterns
        self._regexes = [_regex(p) for p in patterns]
        self._prefixes = _prefixes(module) if patterns else {}

    def covers(self, holder: Function, param: Param, loaded: Value | None) -> str:
        """The first pattern that covers ``param``, made as ``loaded`` says; "" where none does.

        Raises BadOption where one covers it in some of the layers (or experts) only.
        """
        sources = [[param.name]] if loaded is None else [[param.name], *_sources(loaded)]
        for pattern, regex in zip(self.patterns, self._regexes, strict=True):
            for family in sources:
                names = [p + name for p in self._prefixes[holder.name] for name in family]
                met = {name for name in names if regex.fullmatch(name)}
                if met and len(met) < len(set(names)):
                    rest = next(name for name in names if name not in met)
                    raise BadOption(
                        f"fp8-cast: skip={pattern} covers {min(met)}, but not {rest}, which shares its code; "
                        "cover both or neither"
                    )
                if met:
                    return pattern
        return ""

    def check(self) -> None:
        """Raises BadOption for a pattern that covers no parameter at all."""
        if not self.patterns:
            return
        names = [p + n for f in self.module for n in _names(f) for p in self._prefixes[_body(f.name)]]
        for pattern, regex in zip(self.patterns, self._regexes, strict=True):
            if not any(map(regex.fullmatch, names)):
                known = {part for name in names for part in name.split(".")}
                raise BadOption(f"fp8-cast: skip={pattern} covers no parameter{nearest(pattern, known)}")


def _regex(pattern: str) -> re.Pattern[str]:
    inside = ".*".join(map(re.escape, pattern.removeprefix("$").split("*")))
    return re.compile(rf"(?:.*\.)?{inside}(?:\..*)?")


def _body(name: str) -> str:
    """The function whose parameters a load-time function makes; of ``@weights`` itself, any entry."""
    return name.removeprefix(f"{WEIGHTS}.")


def _names(function: Function) -> Iterator[str]:
    yield from function.params
    for stack in function.ops_named("stack"):
        yield from _members(stack)
    if function.name.split(".")[0] == WEIGHTS:
        yield from bindings(function)


def _sources(value: Value) -> list[list[str]]:
    """The names of the checkpoint's tensors that ``value`` is made of; those of a stack together."""
    found: list[list[str]] = []
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, Param):
            found.append([each.name])
        elif isinstance(each, OpResult) and isinstance(each.op, Stack):
            found.append(_members(each.op))
        elif isinstance(each, OpResult):
            todo += [v for v in each.op.operands if v is not None]
    return found


def _members(stack: Op) -> list[str]:
    """The names of the tensors that are stacked."""
    family = stack.operands[0]
    if not isinstance(family, Param):
        raise TypeError(f"{family} is no family of parameters")
    return [family.name.replace("*", str(n)) for n in stack.attrs["experts"]]


def _prefixes(module: Module) -> dict[str, list[str]]:
    """What stands before the names of each function's parameters, for every layer and expert that runs it."""
    found: dict[str, list[str]] = {f.name: [] for f in module}

    def walk(name: str, prefixes: list[str]) -> None:
        found[name] += prefixes
        for loop in module[name].loops():
            walk(loop.callee, [p + loop.prefix(n) for p in prefixes for n in loop.range])

    called = {loop.callee for f in module for loop in f.loops() if isinstance(loop, Loop)}
    for function in module:
        if function.name not in called:
            walk(function.name, [""])
    return {name: list(dict.fromkeys(prefixes)) for name, prefixes in found.items()} | {WEIGHTS: [""]}
