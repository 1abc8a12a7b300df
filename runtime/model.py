"""The model that a package gives: logits, steps over a paged cache, generated text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from moec.errors import BadInput, DeviceUnavailable, NotAPackage
from moec.runtime.batch import Batch, describe, next_batch
from moec.runtime.cache import CachedSequence, CacheSpec, KVCache
from moec.runtime.checkpoint import open_checkpoint
from moec.runtime.dtypes import DTYPES
from moec.runtime.generate import Generation, Prompts
from moec.runtime.launch import preload
from moec.runtime.package import Package
from moec.runtime.routing import RoutingTrace, recording
from moec.runtime.sampling import Sampling
from moec.runtime.triton_mode import require_interpreter
from moec.runtime.values import whole
from moec.runtime.weights import Progress, Weights, load_weights


class Loaded:
    """A package with its weights: what language models and single layers have in common."""

    def __init__(self, package: Package, weights: Weights, device: str) -> None:
        self.package, self.weights, self.device = package, weights, device
        self.manifest = package.manifest
        self.name: str = self.manifest["name"]
        self.cache_specs = tuple(CacheSpec.of(c) for c in self.manifest["caches"])
        self._code = package.module("model")
        # Where tensors live: the interpreter runs a GPU's kernels on the CPU's.
        self.memory = "cuda" if device == "cuda" else "cpu"
        if device == "cuda":
            preload(self._code.__name__.rpartition(".")[0], torch.cuda.current_device())

    def new_cache(self, tokens: int) -> KVCache:
        """A cache with room for ``tokens`` tokens of one sequence, or as many pages shared by several."""
        return KVCache(self.cache_specs, max(1, -(-tokens // self.page)), self.memory)

    def _fitting(self, batch: Any, cache: Any) -> None:
        """Raises BadInput for what is no batch, no cache, or a cache that holds another model's entries."""
        if not isinstance(batch, Batch):
            raise BadInput(f"batch must be a moec.Batch, not {type(batch).__name__}")
        if not isinstance(cache, KVCache):
            raise BadInput(f"cache must be one that new_cache made, not {type(cache).__name__}")
        if cache.specs != self.cache_specs:
            raise BadInput(f"the cache is another model's: {self.name} keeps other entries, or other layers'")

    def record_routing(self) -> AbstractContextManager[RoutingTrace]:
        """Keeps what the routers choose: ``with model.record_routing() as trace: model.generate(...)``.

        ``trace.steps`` has each step's weights and ids, a layer at a time; ``trace.save(file)`` writes them.
        Raises BadInput where no layer routes.
        """
        return recording(self._code, self.manifest["routed_layers"])

    @property
    def page(self) -> int:
        """Tokens to a page of the cache."""
        return self.cache_specs[0].page if self.cache_specs else 1

    def __repr__(self) -> str:
        target, size = self.manifest["target"], self.weights.nbytes
        return f"<{type(self).__name__} {self.name} for {target}, {size:,} bytes>"


class LayerModel(Loaded):
    """A single compiled layer or block."""

    def forward(
        self, x: torch.Tensor, batch: Batch | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """x [N, hidden] in the layer's dtype -> the same.

        ``batch`` and ``cache`` are for a block that asks for its context (attention: positions, offsets,
        pages); the batch's ids play no part. Raises BadInput for what doesn't fit, or is lacking.
        """
        hidden, dtype = self.manifest["hidden"], self.manifest["dtype"]
        if not isinstance(x, torch.Tensor):
            raise BadInput(f"x must be a tensor, not {type(x).__name__}")
        if x.dim() != 2 or x.shape[1] != hidden or x.dtype != DTYPES[dtype]:
            raise BadInput(f"x must be {dtype} [N, {hidden}], not {describe(x)}")
        context = self._context(len(x), batch, cache)
        with torch.inference_mode():
            y: torch.Tensor = self._code.forward(x, *context, self.weights)
        return y

    __call__ = forward

    def _context(self, tokens: int, batch: Batch | None, cache: KVCache | None) -> list[Any]:
        """What ``@forward`` takes after x, in its order."""
        names = [name for name, _ in self.manifest["entries"]["forward"]["args"]][1:]
        caches = [spec.name for spec in self.cache_specs]
        inputs = [name for name in names if name not in caches]
        if inputs and batch is None:
            raise BadInput(f"{self.name} uses {', '.join(inputs)}: forward needs a batch")
        if caches and cache is None:
            raise BadInput(f"{self.name} keeps a KV cache: forward needs one, as new_cache makes it")
        if batch is not None and not isinstance(batch, Batch):
            raise BadInput(f"batch must be a moec.Batch, not {type(batch).__name__}")
        if batch is not None and cache is not None:
            self._fitting(batch, cache)
        if batch is not None:
            if len(batch.ids) != tokens:
                raise BadInput(f"x has {tokens} rows, the batch {len(batch.ids)} tokens")
            pages, page = (cache.pages, cache.page) if cache is not None else (None, None)
            batch.check(None, self.manifest["max_positions"], pages, page)
        return [
            cache.tensors[name]
            if cache is not None and name in caches
            else getattr(batch, name).to(self.memory)
            for name in names
        ]


class LanguageModel(Loaded):
    """A compiled decoder: ``model(ids)``, ``model.step(batch, cache)``, ``model.generate(ids)``."""

    def __init__(self, package: Package, weights: Weights, device: str) -> None:
        super().__init__(package, weights, device)
        self.vocab: int = self.manifest["vocab"]
        self.max_positions: int = self.manifest["max_positions"]
        # New tokens of each sequence that @decode takes: none where there is no such entry.
        self._few: int = self.manifest["entries"].get("decode", {}).get("max_new", 0)

    def entry(self, batch: Batch) -> str:
        """The package's entry that runs a batch: ``decode`` where it's known to take it, else ``step``."""
        return "decode" if self._few and batch.adds_at_most(self._few) else "step"

    def hidden(self, batch: Batch, cache: KVCache, entry: str | None = None) -> torch.Tensor:
        """One step's final hidden states [N, hidden]; the batch's entries are in the cache afterwards.

        ``entry`` asks for ``step``, or for ``decode`` where the package has it; both compute the same.
        Raises BadInput, also where the host knows that a batch is too much for ``decode``.
        """
        self._fitting(batch, cache)
        if entry is not None:
            self._enterable(entry, batch)
        if batch.ids.device.type == "cpu":  # its values; to read back a GPU's would stall it
            batch.check(self.vocab, self.max_positions, cache.pages, cache.page)
        pages = [cache.tensors[spec.name] for spec in self.cache_specs]
        with torch.inference_mode():
            inputs = [t.to(self.memory, non_blocking=True) for t in batch.tensors()]
            run = getattr(self._code, entry or self.entry(batch))
            h: torch.Tensor = run(*inputs, *pages, self.weights)
        return h

    def _enterable(self, entry: str, batch: Batch) -> None:
        """Raises BadInput for an entry that isn't there, or takes fewer new tokens than the batch has."""
        known = ["step", "decode"] if self._few else ["step"]
        if entry not in known:
            raise BadInput(f"{self.name} has no entry {entry!r} for a batch; it has {' and '.join(known)}")
        if entry == "decode" and batch.max_new is not None and batch.max_new > self._few:
            raise BadInput(
                f"decode takes {self._few} new tokens of a sequence; the batch's max_new is {batch.max_new}"
            )

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab] of hidden states [rows, hidden]."""
        with torch.inference_mode():
            logits: torch.Tensor = self._code.head(h, self.weights)
        return logits

    def step(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Logits [B, vocab] of each sequence's last token; the new tokens' entries go into ``cache``.

        A sequence without a new token, as engines pad a batch to a fixed size, gets a row that means nothing.
        Raises BadInput, also for ids, pages or slots out of range, and where no sequence has a new token.
        """
        h = self.hidden(batch, cache)
        ends = batch.cu_seqlens
        new = int(ends[-1]) if ends.device.type == "cpu" else len(h)  # to read back a GPU's would stall it
        if len(batch.seq_lens) and not new:
            raise BadInput("no sequence of the batch has a new token")
        last = (batch.cu_seqlens[1:].long() - 1).clamp(min=0)
        return self.head(h[last.to(self.memory, non_blocking=True)])

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, vocab] of ids [B, T] int64; no cache is kept. Raises BadInput."""
        prompts = Prompts.of(input_ids, self.vocab, self.max_positions, new_tokens=0)
        if not prompts.rectangular:
            raise BadInput("model(ids) takes one tensor [B, T]; ragged prompts go to generate")
        rows, length = len(prompts.ids), len(prompts.ids[0])
        cache = self.new_cache(rows * (length + self.page))
        sequences = [CachedSequence(cache) for _ in prompts.ids]
        logits = self.head(self.hidden(next_batch(sequences, prompts.ids), cache))
        return logits.view(rows, length, self.vocab)

    def generate(
        self,
        input_ids: torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[int]],
        max_new_tokens: int = 32,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Continues prompts: greedily, or by sampling where temperature > 0.

        A tensor [B, T] gives one [B, T + N], rows that ended early filled up with their end token. A list of
        prompts of different lengths gives a list of 1-D tensors, each up to its end token. ``seed`` and a
        prompt's place in the list decide what is drawn for it, whatever else is there. Without eos_token_id
        nothing ends early; the manifest's ``eos`` has the model's own. Raises BadInput.
        """
        generation = self._generation(
            input_ids, max_new_tokens, temperature, top_k, top_p, seed, eos_token_id
        )
        for _ in generation:
            pass
        return generation.result()

    def stream(
        self,
        input_ids: torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[int]],
        max_new_tokens: int = 32,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Iterator[list[int | None]]:
        """As ``generate``, token by token: an item holds each prompt's next token, None after its end."""
        return iter(
            self._generation(input_ids, max_new_tokens, temperature, top_k, top_p, seed, eos_token_id)
        )

    def _generation(
        self,
        input_ids: Any,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        eos_token_id: int | Sequence[int] | None,
    ) -> Generation:
        max_new_tokens = whole("max_new_tokens", max_new_tokens)
        if max_new_tokens < 0:
            raise BadInput(f"max_new_tokens is {max_new_tokens}; it must be a number, 0 or more")
        prompts = Prompts.of(input_ids, self.vocab, self.max_positions, max_new_tokens)
        tokens = sum(len(ids) + max_new_tokens + self.page for ids in prompts.ids)
        sampling = Sampling(temperature, top_k, top_p)
        return Generation(self, prompts, max_new_tokens, sampling, seed, eos_token_id, self.new_cache(tokens))


def load(
    package: str | PathLike[str],
    weights: Any,
    device: str | torch.device | None = None,
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> LanguageModel | LayerModel:
    """The model of a built package with its weights.

    weights   a folder of safetensors, a mapping of names to tensors, or ``"random:SEED"``
    device    ``"cpu"`` or ``"cuda"``, as the package was built for, by default; ``"interpret"`` runs a GPU's
              package on the CPU, in Triton's interpreter (TRITON_INTERPRET=1 from the process's start)
    verify    checks every file's hash before any is run; turn it off for a package that you edited
    progress  called with (parameters done, parameters in all) as they are loaded

    Loading runs the package's Python code. A tensor of a mapping that has the model's dtype already, and that
    the package uses as it is, is shared, not copied: changing it in place changes the model. Raises BadInput,
    NotAPackage, PackageTampered, DeviceUnavailable, and the errors of ``load_weights``.
    """
    if not isinstance(package, str | PathLike):
        raise BadInput(f"package is a folder or what build returned, not {type(package).__name__}")
    if isinstance(device, torch.device):
        device = device.type
    elif not isinstance(device, str | None):
        raise BadInput(f"device is {device!r}; it must be a name, as 'cpu'")
    opened = Package(Path(package), verify)
    target = opened.manifest["target"]
    device = device or opened.manifest["device"]
    check_device(device, target, opened.manifest["device"], opened.manifest["dtype"])
    checkpoint = open_checkpoint(weights, opened.manifest["checkpoint"])
    memory = "cuda" if device == "cuda" else "cpu"
    loaded = load_weights(checkpoint, opened.manifest, opened.module("weights"), progress, memory)
    entries = opened.manifest["entries"]
    if "step" in entries:
        return LanguageModel(opened, loaded, device)
    if "forward" in entries:
        return LayerModel(opened, loaded, device)
    raise NotAPackage(f"{package} has no entry that this moec can run")


def check_device(device: str, target: str, built_for: str, dtype: str) -> None:
    """Raises DeviceUnavailable where a package for ``target`` can't run on ``device`` in this process, or
    InterpreterOff where Triton's interpreter isn't on.
    """
    if device == "interpret" and built_for == "cuda":
        require_interpreter(f"a package for {target}", dtype)
    elif device != built_for:
        raise DeviceUnavailable(f"the package was built for {target} and can't run on {device!r}")
    elif device == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable(
            f"a package for {target} needs an NVIDIA GPU, and PyTorch finds none",
            notes=[
                "moec.load(..., device='interpret') runs it on the CPU, slowly, in a process started with "
                "TRITON_INTERPRET=1"
            ],
        )
