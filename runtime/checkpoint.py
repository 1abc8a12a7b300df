"""Where weights come from: a folder of safetensors, a mapping, or a seed. Nothing here ever unpickles."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from moec.errors import BadInput, PickleRefused, WeightsUnreadable
from moec.runtime.dtypes import DTYPES, SAFETENSORS

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def expand(entry: dict[str, Any]) -> Iterator[str]:
    """The names that a manifest entry stands for: ``*`` through its ranges."""
    parts = entry["name"].split("*")
    for numbers in product(*(range(first, last + 1) for first, last in entry["ranges"])):
        yield parts[0] + "".join(f"{n}{part}" for n, part in zip(numbers, parts[1:], strict=True))


class Checkpoint(Protocol):
    """Tensors by name."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype | str: ...
    def tensor(self, name: str) -> torch.Tensor: ...
    def where(self, name: str) -> str: ...


class Folder:
    """``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists, or every file
    ``*.safetensors``: the first of these that is there, memory-mapped.

    Raises WeightsUnreadable for what can't be read, PickleRefused where there are pickled weights only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._listed: dict[str, str] = {}  # by an index
        for file in self._files():
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118  no mapping
                if name in self._file_of:
                    raise WeightsUnreadable(f"{name} is in both {self._file_of[name]} and {file} of {folder}")
                self._file_of[name] = file
        for name, file in self._listed.items():
            if self._file_of.get(name) != file:
                raise WeightsUnreadable(f"the index of {folder} says that {name} is in {file}, but it isn't")

    def _files(self) -> list[str]:
        if not self.folder.is_dir():
            raise WeightsUnreadable(f"{self.folder} is no folder")
        index = self.folder / "model.safetensors.index.json"
        single = "model.safetensors"
        alone = os.path.lexists(self.folder / single)
        if index.is_file():
            listed = _read_index(index)
            if not alone or single in listed.values():
                return self._indexed(index, listed)
        if alone:  # whatever lies beside it: an adapter, the index of shards that are gone
            return [single]
        files = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if files:
            return files
        pickled = sorted(p.name for pattern in PICKLES for p in self.folder.glob(pattern))
        if pickled:
            raise PickleRefused(
                f"{self.folder} holds pickled weights only ({', '.join(pickled[:3])}): "
                "reading them would run code",
                notes=["convert them to safetensors first"],
            )
        raise WeightsUnreadable(f"no *.safetensors in {self.folder}")

    def _indexed(self, index: Path, listed: dict[str, str]) -> list[str]:
        files = sorted(set(listed.values()))
        for file in files:
            if Path(file).name != file or not os.path.lexists(self.folder / file):
                raise WeightsUnreadable(f"{index} lists {file}, which isn't there")
        self._listed = listed
        return files

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.folder / file
            if not path.is_file():
                kind = "a folder" if path.is_dir() else "a link to nothing"
                raise WeightsUnreadable(f"{path} is {kind}, no safetensors file")
            try:
                self._handles[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WeightsUnreadable(
                    f"{self.folder / file} is truncated or no safetensors file: {error}"
                ) from None
        return self._handles[file]

    def names(self) -> Iterable[str]:
        return self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | str:
        """From the file's header; the header's word where PyTorch has no such dtype."""
        found: str = self._open(self._file_of[name]).get_slice(name).get_dtype()
        return SAFETENSORS.get(found, found)

    def tensor(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._open(self._file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise WeightsUnreadable(f"{self.where(name)}: {error}") from None
        return tensor

    def where(self, name: str) -> str:
        return str(self.folder / self._file_of.get(name, ""))


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises WeightsUnreadable."""
    try:
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(file, str) for file in listed.values()):
            return listed
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    raise WeightsUnreadable(f"{index} is no index of shards")


class InMemory:
    """Tensors of the caller's."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise BadInput(f"weights map names to tensors, not {name!r} to {type(tensor).__name__}")
            if tensor.is_meta or tensor.layout != torch.strided:
                what = "is on the meta device: it holds no values" if tensor.is_meta else "is not dense"
                raise BadInput(f"weights: {name} {what}")
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | str:
        return self._tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def where(self, name: str) -> str:
        return "the mapping given as weights"


class Random:
    """Weights that a seed and their own names determine: each the same whatever else there is.

    Matrices are normal with deviation 1/sqrt(columns), norms near 1, biases small, fp8 scales positive; a
    table of experts names some that are there.
    """

    def __init__(self, seed: int, entries: Iterable[dict[str, Any]]) -> None:
        self._seed = seed
        self._entries = {name: entry for entry in entries for name in expand(entry)}

    def names(self) -> Iterable[str]:
        return self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype | str:
        return DTYPES[self._entries[name]["dtype"]]

    def tensor(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        # PyTorch's generator on the CPU heeds the low 32 bits of a seed only.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if entry["kind"] == "experts":  # k in a row: they differ
            first = torch.randint(entry["below"], (entry["shape"][0], 1), generator=generator)
            chosen = (first + torch.arange(entry["shape"][1])) % entry["below"]
            return chosen.to(DTYPES[entry["dtype"]])
        normal = torch.randn(entry["shape"], generator=generator)
        if entry["kind"] == "norm":
            normal = 1 + normal * 0.1
        elif entry["kind"] == "bias":
            normal = normal * 0.1
        elif entry["kind"] == "scale":
            normal = (normal * 0.25).exp() * 1e-2
        elif entry["dtype"] not in ("f8e4m3", "f8e5m2"):
            normal = normal * entry["shape"][-1] ** -0.5
        return normal.to(DTYPES[entry["dtype"]])

    def where(self, name: str) -> str:
        return f"random weights of seed {self._seed}"


def open_checkpoint(weights: Any, entries: Iterable[dict[str, Any]]) -> Checkpoint:
    """``weights`` as ``moec.load`` takes it: a folder, a mapping, or ``random:SEED``."""
    if isinstance(weights, str) and weights == "random" and not Path(weights).is_dir():
        raise BadInput("weights='random': random weights have a seed, as in 'random:0'")
    if isinstance(weights, str) and weights.startswith("random:"):
        seed = weights.removeprefix("random:")
        if not seed.isdecimal() or int(seed) >= 2**31:
            raise BadInput(f"weights={weights!r}: the seed is a number below 2**31, as in 'random:0'")
        return Random(int(seed), entries)
    if isinstance(weights, Mapping):
        return InMemory(weights)
    if isinstance(weights, str | os.PathLike):
        path = Path(weights)
        if path.is_file() and any(path.match(p) for p in PICKLES):
            raise PickleRefused(
                f"{path} is pickled: reading it would run code", notes=["convert it to safetensors"]
            )
        return Folder(path)
    raise BadInput(f"weights is a folder, a mapping or 'random:SEED', not {type(weights).__name__}")
