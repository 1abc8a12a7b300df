"""All options of a build in one place, and the only reader of ``MOEC_*`` environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moec.errors import BadOption

_TORCH_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def _option(default: Any, doc: str, variable: str = "") -> Any:
    return field(default=default, metadata={"doc": doc, "variable": variable})


@dataclass(frozen=True)
class BuildOptions:
    """What ``moec build`` can be told beside the spec; a field's documentation is in its metadata."""

    target: str = _option("cpu", "what to compile for", "MOEC_TARGET")
    dtype: str | None = _option(
        None, "dtype of weights and activations; the model's own by default", "MOEC_DTYPE"
    )
    opt_level: int = _option(
        2, "0: naive, 1: cleaned up, 2: optimised, 3: also what costs build time", "MOEC_OPT"
    )
    passes: str | None = _option(
        None, "this pipeline in place of the level's, as 'a,b{option=1}'", "MOEC_PASSES"
    )
    fp8: bool | str = _option(
        False,
        "products in fp8: true, or a recipe with options, as 'per-row' or 'deepseek-v3{skip=[down_proj]}'",
        "MOEC_FP8",
    )
    layers: str | None = _option(None, "only the first N layers, or layers A-B")
    stop_after: str | None = _option(None, "end the pipeline after this pass, by name (the last) or number")
    resume: str | None = _option(None, "an IR dump to go on from, edited or not, in place of the spec's IR")
    force: bool = _option(False, "replace an existing package")
    cache: str | None = _option(
        None, "folder of compiled kernels, kept between builds; ~/.cache/moec by default", "MOEC_CACHE"
    )
    tuning: str | None = _option(
        None,
        "a file of moec tune's; by default this device's in the cache's folder or moec's own; none: no file",
        "MOEC_TUNING",
    )
    kernels: str | None = _option(
        None,
        "the family whose kernels go first, wherever one can: cuda, gluon, triton or torch",
        "MOEC_KERNELS",
    )
    batch_invariant: bool = _option(
        False,
        "one schedule whatever the number of tokens: a token's bits don't depend on what is beside it",
        "MOEC_BATCH_INVARIANT",
    )
    interpret: bool = _option(
        False,
        "moec.ops: run GPU kernels on CPU tensors, in Triton's interpreter (with TRITON_INTERPRET=1)",
        "MOEC_INTERPRET",
    )

    def __post_init__(self) -> None:
        """Raises BadOption for a value out of range. A dtype may have PyTorch's name."""
        spelled = str(self.dtype).removeprefix("torch.")
        object.__setattr__(self, "dtype", _TORCH_NAMES.get(spelled, self.dtype))
        if isinstance(self.cache, os.PathLike):
            object.__setattr__(self, "cache", os.fspath(self.cache))
        for name, value in (
            ("target", self.target),
            ("passes", self.passes),
            ("layers", self.layers),
            ("stop_after", self.stop_after),
            ("resume", self.resume),
            ("tuning", self.tuning),
            ("kernels", self.kernels),
            ("cache", self.cache),
        ):
            if not isinstance(value, str) and not (value is None and name != "target"):
                raise BadOption(f"{name} is {value!r}; it must be text")
            if value == "" and name in ("tuning", "cache"):
                raise BadOption(f"{name} is empty; it must name a {'file' if name == 'tuning' else 'folder'}")
        if not isinstance(self.batch_invariant, bool):
            raise BadOption(f"batch_invariant is {self.batch_invariant!r}; it must be true or false")
        if type(self.opt_level) is not int or self.opt_level not in (0, 1, 2, 3):
            raise BadOption(f"opt_level is {self.opt_level!r}; it must be 0, 1, 2 or 3")
        if not isinstance(self.fp8, bool | str):
            raise BadOption(f"fp8 is {self.fp8!r}; it must be true, false or a recipe")
        if self.fp8 and self.passes is not None:
            raise BadOption(
                "fp8 adds fp8-cast to a level's passes; in a pipeline of your own write it yourself"
            )
        if self.dtype not in (None, "f32", "bf16", "f16"):
            raise BadOption(f"dtype is {self.dtype!r}; it must be f32, bf16 or f16")

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None, **given: Any) -> BuildOptions:
        """``given`` where not None, else the environment's ``MOEC_*``, else the default. Raises BadOption."""
        environment = os.environ if environment is None else environment
        values = {key: value for key, value in given.items() if value is not None}
        for option in fields(BuildOptions):
            variable = option.metadata["variable"]
            if option.name not in values and variable and environment.get(variable):
                text = environment[variable]
                plain = option.name == "fp8" and text not in ("0", "1")
                values[option.name] = text if plain else _read(variable, text, option.default)
        return BuildOptions(**values)

    def as_manifest(self) -> dict[str, Any]:
        """What influenced the result; where it was written, or read again from, did not."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("force", "cache", "interpret", "resume")
        }


def _read(variable: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"0": False, "1": True}[text]
        return int(text) if isinstance(default, int) else text
    except (ValueError, KeyError):
        raise BadOption(
            f"{variable}={text!r} is no {'0 or 1' if isinstance(default, bool) else 'number'}"
        ) from None
