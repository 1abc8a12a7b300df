"""moec compiles Mixture-of-Experts transformers to readable Triton, CUDA and PyTorch.

>>> package = moec.build("deepseek-v3-tiny", out="build/tiny")
>>> model = moec.load(package, weights="random:0")
>>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moec.config import BuildOptions as BuildOptions
    from moec.driver import Built as Built
    from moec.driver import build as build
    from moec.errors import MoecError as MoecError
    from moec.runtime import Batch as Batch
    from moec.runtime import KVCache as KVCache
    from moec.runtime import LanguageModel as LanguageModel
    from moec.runtime import LayerModel as LayerModel
    from moec.runtime import load as load

# Loaded at first use: `import moec` alone costs no torch, no compiler.
_FACE = {
    "BuildOptions": "moec.config",
    "Built": "moec.driver",
    "build": "moec.driver",
    "MoecError": "moec.errors",
    "Batch": "moec.runtime",
    "KVCache": "moec.runtime",
    "LanguageModel": "moec.runtime",
    "LayerModel": "moec.runtime",
    "load": "moec.runtime",
}
__all__ = [
    "Batch",
    "BuildOptions",
    "Built",
    "KVCache",
    "LanguageModel",
    "LayerModel",
    "MoecError",
    "__version__",
    "build",
    "load",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "ops":
        return import_module("moec.ops")
    if name not in _FACE:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_FACE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACE})
