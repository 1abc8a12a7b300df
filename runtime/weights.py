"""Loading: the checkpoint checked against the manifest, then made into the parameters that kernels use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from moec.errors import NotAPackage, WeightsBroken, WeightsExtra, WeightsMisshapen, WeightsMissing
from moec.runtime.checkpoint import Checkpoint, expand
from moec.runtime.dtypes import DTYPES
from moec.runtime.values import Scaled

Progress = Callable[[int, int], None]
_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class Weights(dict[str, torch.Tensor | Scaled]):
    """Parameters by name; ``at(scope)`` is those below a scope, by their names within it."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor | Scaled]] = ()) -> None:
        super().__init__(tensors)
        self._scopes: dict[str, Weights] = {}

    def at(self, scope: str) -> Weights:
        found = self._scopes.get(scope)
        if found is None:
            size = len(scope)
            found = Weights((name[size:], t) for name, t in self.items() if name.startswith(scope))
            self._scopes[scope] = found
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, scales included; what has several names, in part or whole, counts once."""
        tensors = [t for value in self.values() for t in (value if isinstance(value, Scaled) else (value,))]
        total = end = 0
        for first, size in sorted((t.data_ptr(), _extent(t)) for t in tensors):
            total += max(0, first + size - max(end, first))
            end = max(end, first + size)
        return total


class Take:
    """The checkpoint as the load program sees it: ``take(name)`` within a scope.

    Raises WeightsBroken for a scale that isn't finite: all values of its block would be what it makes them.
    """

    def __init__(self, checkpoint: Checkpoint, entries: dict[str, dict[str, Any]], scope: str = "") -> None:
        self._checkpoint, self._entries, self._scope = checkpoint, entries, scope

    def at(self, scope: str) -> Take:
        return Take(self._checkpoint, self._entries, self._scope + scope)

    def __call__(self, name: str) -> torch.Tensor:
        full = self._scope + name
        entry = self._entries.get(full)
        if entry is None:
            raise _disagree(full)
        tensor = self._checkpoint.tensor(full).to(DTYPES[entry["dtype"]])
        if entry["kind"] == "scale" and not bool(tensor.isfinite().all()):
            index = (~tensor.isfinite()).nonzero()[0].tolist()
            where = self._checkpoint.where(full)
            raise WeightsBroken(
                f"{full}{index} is {float(tensor[tuple(index)])} in {where}: a scale is finite"
            )
        return tensor


def _disagree(name: str) -> NotAPackage:
    return NotAPackage(f"the package's load program and its manifest disagree: only one has {name}")


class Bind:
    """Collects what the load program makes: ``bind(name, tensor)`` gives the parameter that it has become."""

    def __init__(
        self, done: Callable[[str, torch.Tensor | Scaled], torch.Tensor | Scaled], scope: str = ""
    ) -> None:
        self._done, self._scope = done, scope

    def at(self, scope: str) -> Bind:
        return Bind(self._done, self._scope + scope)

    def __call__(self, name: str, tensor: torch.Tensor | Scaled) -> torch.Tensor | Scaled:
        return self._done(self._scope + name, tensor)


def load_weights(
    checkpoint: Checkpoint,
    manifest: dict[str, Any],
    program: Any,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Weights:
    """Every parameter of the manifest, from ``checkpoint`` through the package's load ``program``.

    Raises WeightsMissing, WeightsExtra or WeightsMisshapen, before anything is read, naming the tensors;
    WeightsBroken, naming the value.
    """
    wanted = {name: entry for entry in manifest["checkpoint"] for name in expand(entry)}
    check(checkpoint, wanted, manifest["ignored"])
    parameters = {name: entry for entry in manifest["parameters"] for name in expand(entry)}
    weights = Weights()
    memory = _Memory(device)

    def done(name: str, value: torch.Tensor | Scaled) -> torch.Tensor | Scaled:
        entry = parameters.get(name)
        if entry is None:
            raise _disagree(name)
        weights[name] = placed = _placed(name, value, entry, memory)
        if progress is not None:
            progress(len(weights), len(parameters))
        return placed

    take = Take(checkpoint, wanted)
    program.weights(take, Bind(done))
    for name, entry in parameters.items():
        if not entry["bound"]:
            done(name, take(name))
    return weights


def _placed(
    name: str, value: torch.Tensor | Scaled, entry: dict[str, Any], memory: _Memory
) -> torch.Tensor | Scaled:
    """A parameter as kernels want it. Raises WeightsMisshapen where it isn't what the manifest says."""
    tensor, scales = value if isinstance(value, Scaled) else (value, None)
    made, wanted = str(list(tensor.shape)), str(entry["shape"])
    if scales is not None or "scale" in entry:
        made += f" with scales {None if scales is None else list(scales.shape)}"
        wanted += f" with scales {entry.get('scale')}"
    if made != wanted:
        raise WeightsMisshapen(f"{name} became {made}, not {wanted}")
    tensor = memory.put(tensor, DTYPES[entry["dtype"]])
    return tensor if scales is None else Scaled(tensor, memory.put(scales, torch.float32))


class _Memory:
    """Puts parameters on a device: each in one piece, but for parts of one that is there already."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._whole: dict[int, torch.Tensor] = {}  # the last one in each piece of memory

    def put(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tensor = tensor.to(self.device, dtype)
        whole = self._whole.get(tensor.untyped_storage().data_ptr())
        if whole is not None and _within(tensor, whole):
            return tensor
        tensor = tensor.contiguous()
        self._whole[tensor.untyped_storage().data_ptr()] = tensor
        return tensor


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _within(part: torch.Tensor, whole: torch.Tensor) -> bool:
    first, start = part.data_ptr(), whole.data_ptr()
    return start <= first and first + _extent(part) <= start + whole.nbytes


def check(checkpoint: Checkpoint, wanted: dict[str, dict[str, Any]], ignored: list[list[str]]) -> None:
    """The checkpoint holds each wanted tensor in its shape and a dtype that can become the model's, otherwise
    only what is ignored for a reason. Only names, shapes and dtypes are read.
    """
    have = set(checkpoint.names())
    missing = [name for name in wanted if name not in have]
    if missing:
        raise WeightsMissing(
            f"{_some(missing)} missing in {checkpoint.where('')}", notes=_stray(have, wanted, ignored)
        )
    extra = unknown(have, wanted, ignored)
    if extra:
        raise WeightsExtra(f"{_some(extra)} in {checkpoint.where(extra[0])}, but not of this model")
    for name, entry in wanted.items():
        shape = checkpoint.shape(name)
        if list(shape) != entry["shape"]:
            raise WeightsMisshapen(
                f"{name} is {list(shape)} in {checkpoint.where(name)}, the model's is {entry['shape']}"
            )
        found, dtype = checkpoint.dtype(name), DTYPES[entry["dtype"]]
        if not convertible(found, dtype):
            raise WeightsMisshapen(
                f"{name} is {str(found).removeprefix('torch.')} in {checkpoint.where(name)}, "
                f"which can't become the model's {entry['dtype']}"
            )


def unknown(have: Iterable[str], wanted: Iterable[str], ignored: list[list[str]]) -> list[str]:
    """Names that the model neither uses nor ignores, in order."""
    patterns = [re.compile(pattern) for pattern, _ in ignored]
    return sorted(n for n in set(have) - set(wanted) if not any(p.match(n) for p in patterns))


def _stray(have: set[str], wanted: dict[str, Any], ignored: list[list[str]]) -> list[str]:
    extra = unknown(have, wanted, ignored)
    return [f"there, but not of this model: {_some(extra)}"] if extra else []


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def convertible(found: torch.dtype | str, dtype: torch.dtype) -> bool:
    """Only between floats, and never into or out of fp8: its scales would be lost."""
    return found == dtype or {found, dtype} <= _FLOATS
