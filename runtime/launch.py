'''Launching compiled kernels: what a package's kernel file says, and what happens then.

A package holds ``kernels/NAME.py``, such as::

    """scale_rows: y[t, w] = x[t, w] * s[t]."""

    import torch

    from moec.runtime.launch import Kernel, Variant, tl, triton


    @triton.jit
    def scale_rows(x, s, y, tokens, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
        col = tl.arange(0, BLOCK)
        for i in range(ROWS):
            row = tl.program_id(0) * ROWS + i
            inside = (col < WIDTH) & (row < tokens)
            v = tl.load(x + row * stride + col, mask=inside)
            f = tl.load(s + row, mask=row < tokens)
            tl.store(y + row * stride + col, (v.to(tl.float32) * f).to(tl.bfloat16), mask=inside)


    SCALE_ROWS = Kernel(
        scale_rows,
        signature={
            "x": "*bf16", "s": "*fp32", "y": "*bf16", "tokens": "i32", "stride": "i32",
            "WIDTH": "constexpr", "BLOCK": "constexpr", "ROWS": "constexpr",
        },
        arbitrary=("tokens",),
        variants={
            "rows1w4s2": Variant({"WIDTH": 1000, "BLOCK": 1024, "ROWS": 1}, 4, 2, unaligned=True),
            "rows4w4s2": Variant({"WIDTH": 1000, "BLOCK": 1024, "ROWS": 4}, warps=4, stages=2),
        },
    )


    def scale(x, s):
        """x [tokens, 1000] bf16, s [tokens] fp32 -> [tokens, 1000] bf16."""
        y = torch.empty_like(x)
        tokens = x.shape[0]
        variant, rows = ("rows4w4s2", 4) if tokens > 64 else ("rows1w4s2", 1)
        SCALE_ROWS[variant, (triton.cdiv(tokens, rows),)](x, s, y, tokens, x.stride(0))
        return y

``signature`` has every parameter in order, in Triton's names (``*bf16``, ``*fp8e4nv``, ``i32``, ``fp32``,
``constexpr``). ``tensordesc<bf16[1, BLOCK_N, BLOCK_K]>`` is a tensor descriptor; its box may name
constexprs, and its argument is the tensor itself: shape, strides and base are the tensor's own.
``arbitrary`` names integers and pointers of any value. Every other one is compiled as a multiple of 16
(pointers: in bytes), which wide loads and asynchronous copies need, and a launch checks that it is. Where
it isn't, the variant's twin without promises runs, if ``unaligned`` asked for one; else the launch raises
Misaligned.

The same file serves three ends. ``SCALE_ROWS.requests("sm_90a")`` is what ``runtime/compile.py`` compiles
ahead of time. Tensors on a GPU run the cubin ``cubin/scale_rows.rows1w4s2.sm_90a.cubin`` beside
``kernels/``: on torch's current stream, without synchronising, so a CUDA graph can record it once
``preload`` has run. Tensors on the CPU run the function in Triton's interpreter, which TRITON_INTERPRET=1
must have switched on before the process started. Triton compiles nothing at run time: ``triton`` and ``tl``
above stand in for it and import it only where it's needed.

A kernel file must not say ``from __future__ import annotations``: the interpreter wants ``tl.constexpr``
itself.
'''

from __future__ import annotations

import inspect
import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from moec.errors import BadArgument, DeviceUnavailable, Misaligned, NotCompiled, nearest
from moec.runtime import counters, driver
from moec.runtime.arguments import Arguments
from moec.runtime.compile import Compilable, Constant, Request
from moec.runtime.devices import family
from moec.runtime.triton_mode import language, require_interpreter, triton_module

UNALIGNED = "unaligned"
# Programs that the interpreter is taken to hold at once: few, so that each of a persistent kernel's takes
# many tiles.
INTERPRETED_AT_ONCE = 3
Grid = Sequence[int]


def __getattr__(name: str) -> Any:
    """``triton`` and ``tl``: Triton itself in a process that interprets, stand-ins in any other."""
    if name == "triton":
        return triton_module()
    if name == "tl":
        return language()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel: a value for every constexpr, and Triton's options.

    ``phases``: how many the kernel has between which its programs wait for each other. It is launched
    cooperatively, with no more programs than ``at_once`` says. Its constexpr PHASE, 0 for all of them, picks
    one: Triton's interpreter runs one program after the other, so there each phase is a launch of its own.
    """

    constants: Mapping[str, Constant]
    warps: int
    stages: int
    maxnreg: int | None = None
    unaligned: bool = False  # also compiled without promises
    fp_fusion: bool = True
    phases: int = 1


class Launchable(ABC):
    """What can be launched, whatever it's written in: ``KERNEL[variant, grid](*args)``.

    ``args`` are positional, without what a variant fixes: tensors (None: a null pointer), ints and floats.
    ``grid`` is 1 to 3 numbers of blocks; where one is 0, nothing runs.
    """

    remedies: ClassVar[tuple[str, ...]] = ()  # where an argument breaks a promise

    def __init__(self, name: str, file: Path, divisible: tuple[str, ...]) -> None:
        self.name, self.file, self.divisible = name, file, divisible
        self._arguments: dict[str, Arguments] = {}
        self._loaded: dict[tuple[str, int], _Compiled] = {}

    @abstractmethod
    def requests(self, arch: str) -> Sequence[Compilable]:
        """What to compile for a family of devices."""

    @abstractmethod
    def twins(self) -> dict[str, bool]:
        """Each variant's name, and whether there is a twin that was compiled without promises."""

    @abstractmethod
    def _kinds(self, variant: str) -> list[tuple[str, str]]:
        """Name and type of each argument."""

    @abstractmethod
    def _on_cpu(
        self, variant: str, blocks: tuple[int, int, int], arguments: Arguments, args: Sequence[Any]
    ) -> None:
        """What a launch with tensors of the CPU does."""

    def __getitem__(self, key: tuple[str, Grid]) -> Callable[..., None]:
        """A function of the arguments.

        It raises NotCompiled, BadArgument, Misaligned, InterpreterOff, DeviceUnavailable or LaunchFailed.
        """
        return partial(self._launch, *key)

    def _launch(self, variant: str, grid: Grid, *args: Any) -> None:
        arguments = self._checker(variant)
        broken = arguments.check(args)
        if broken and not self.twins()[variant]:
            raise Misaligned(
                f"{self.name} {variant}: {broken}, but was promised to be one when it was compiled",
                notes=list(self.remedies),
            )
        blocks = _three(self.name, grid)
        if 0 in blocks:
            return
        device = _device(self.name, arguments, args)
        if device.type == "cpu":
            self._on_cpu(variant, blocks, arguments, args)
            return
        compiled = self.load(f"{variant}-{UNALIGNED}" if broken else variant, device.index)
        parameters = arguments.pack(args, compiled.descriptors, compiled.flags)
        scratch = [
            torch.empty(size * math.prod(blocks), dtype=torch.uint8, device=device) if size else None
            for size in compiled.scratch
        ]
        parameters += [np.uint64(0 if s is None else s.data_ptr()) for s in scratch]
        driver.launch(compiled.loaded, blocks, parameters)

    def _checker(self, variant: str) -> Arguments:
        if variant not in self._arguments:
            if variant not in self.twins():
                raise NotCompiled(f"{self.name} has no variant {variant!r}{nearest(variant, self.twins())}")
            self._arguments[variant] = Arguments(self.name, self._kinds(variant), self.divisible)
        return self._arguments[variant]

    def load(self, variant: str, device: int) -> _Compiled:
        """The cubin of a variant (or of its twin, VARIANT-unaligned) on a device; kept.

        Raises NotCompiled where the package holds none, DeviceUnavailable where it holds only other devices'.
        """
        if (variant, device) not in self._loaded:
            self._loaded[variant, device] = _load(self, variant, device)
        return self._loaded[variant, device]

    def at_once(self, variant: str, device: torch.device) -> int:
        """How many programs of a variant the device holds at once: the grid of a persistent kernel.

        The driver knows, without synchronising. Raises as ``load`` does.
        """
        if device.type == "cpu":
            return INTERPRETED_AT_ONCE
        index = torch.cuda.current_device() if device.index is None else device.index
        return driver.at_once(self.load(variant, index).loaded)

    def preload(self, device: int) -> None:
        """Loads every variant. Raises as ``load`` does."""
        for name, twin in self.twins().items():
            self.load(name, device)
            if twin:
                self.load(f"{name}-{UNALIGNED}", device)


class Kernel(Launchable):
    """A Triton function, its signature and its variants: ``KERNEL[variant, grid](*args)`` launches it."""

    remedies = ("a variant with unaligned=True takes any",)

    def __init__(
        self,
        function: Callable[..., Any],
        signature: Mapping[str, str],
        variants: Mapping[str, Variant],
        arbitrary: Sequence[str] = (),
    ) -> None:
        python = getattr(function, "fn", function)  # Triton keeps the function that it wraps
        self.function, self.signature, self.variants = function, dict(signature), dict(variants)
        if unknown := set(arbitrary) - set(signature):
            raise BadArgument(f"{python.__name__} has no parameter {', '.join(sorted(unknown))}")
        divisible = tuple(
            name
            for name, kind in signature.items()
            if kind.startswith(("*", "i", "u")) and kind not in ("i1", "u1") and name not in arbitrary
        )
        super().__init__(python.__name__, Path(inspect.getfile(python)), divisible)

    def requests(self, arch: str) -> list[Request]:
        """What to compile for a family of devices: every variant, and the twins without promises."""
        source = self.file.read_text(encoding="utf-8")
        made = []
        for name, variant in self.variants.items():
            promises = [("", self.divisible), *([(f"-{UNALIGNED}", ())] if variant.unaligned else [])]
            made += [self._request(name + suffix, variant, arch, source, d) for suffix, d in promises]
        return made

    def _request(
        self, name: str, variant: Variant, arch: str, source: str, divisible: tuple[str, ...]
    ) -> Request:
        return Request(
            kernel=self.name,
            variant=name,
            source=source,
            function=self.name,
            signature=self.signature,
            constants=dict(variant.constants),
            divisible=divisible,
            warps=variant.warps,
            stages=variant.stages,
            arch=arch,
            maxnreg=variant.maxnreg,
            fp_fusion=variant.fp_fusion,
            cooperative=variant.phases > 1,
        )

    def twins(self) -> dict[str, bool]:
        return {name: variant.unaligned for name, variant in self.variants.items()}

    def _kinds(self, variant: str) -> list[tuple[str, str]]:
        request = self._request(variant, self.variants[variant], "", "", self.divisible)
        return [(n, k) for n, k in request.resolved().items() if k != "constexpr"]

    def _on_cpu(
        self, variant: str, blocks: tuple[int, int, int], arguments: Arguments, args: Sequence[Any]
    ) -> None:
        fp8 = any("fp8" in kind for kind in arguments.kinds)
        require_interpreter(self.name, "f8e4m3" if fp8 else "")
        from triton.tools.tensor_descriptor import TensorDescriptor

        values = {
            name: value if box is None else TensorDescriptor.from_tensor(value, list(box[1]))
            for name, box, value in zip(arguments.names, arguments.boxes, args, strict=True)
        }
        made = self.variants[variant]
        for phase in range(1, made.phases + 1):
            of_phase = {"PHASE": phase} if made.phases > 1 else {}
            self.function[blocks](**values, **{**made.constants, **of_phase})  # type: ignore[index]


@dataclass(frozen=True)
class _Compiled:
    """A loaded cubin and what its launches add to the arguments."""

    loaded: driver.Loaded
    descriptors: tuple[dict[str, Any], ...]
    flags: int
    scratch: tuple[int, ...]  # bytes per block, for each hidden pointer


def preload(package: str, device: int) -> None:
    """Loads every kernel of the imported modules below the package of that name, so that no launch has to.

    Raises NotCompiled, DeviceUnavailable, LaunchFailed.
    """
    modules = [m for name, m in sys.modules.items() if name.startswith(f"{package}.")]
    counters.prepare(device)
    for kernel in {id(v): v for m in modules for v in vars(m).values() if isinstance(v, Launchable)}.values():
        kernel.preload(device)


def _load(kernel: Launchable, variant: str, device: int) -> _Compiled:
    folder = kernel.file.parents[1] / "cubin"
    label = f"{kernel.name} {variant}"
    built = {f.name.split(".")[-2]: f for f in folder.glob(f"{kernel.name}.{variant}.*.json")}
    if not built:
        raise NotCompiled(f"{folder} holds no cubin of {label}: build the package again")
    capability = driver.capability(device)
    for arch, file in built.items():
        if family(arch).runs_on(capability):
            about = json.loads(file.read_text(encoding="utf-8"))
            cubin = file.with_suffix(".cubin").read_bytes()
            together = about.get("cooperative", False)
            loaded = driver.load(
                label, cubin, about["symbol"], about["warps"], about["shared"], device, together
            )
            scratch = tuple(hidden["size"] for hidden in about["hidden"].values())
            return _Compiled(loaded, tuple(about["descriptors"]), about["flags"], scratch)
    raise DeviceUnavailable(
        f"{label} is compiled for {', '.join(sorted(built))}; this device has compute capability "
        f"{capability[0]}.{capability[1]}"
    )


def _three(name: str, grid: Grid) -> tuple[int, int, int]:
    """A grid filled up with ones."""
    if not 1 <= len(grid) <= 3 or any(n < 0 for n in grid):
        raise BadArgument(f"{name}: a grid is 1 to 3 numbers of blocks, not {tuple(grid)}")
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def _device(name: str, arguments: Arguments, args: Sequence[Any]) -> torch.device:
    """The device of all tensors."""
    tensors = [
        (n, a.device) for n, a in zip(arguments.names, args, strict=True) if isinstance(a, torch.Tensor)
    ]
    if not tensors:
        raise BadArgument(f"{name}: no argument is a tensor, so there is no device to run on")
    first, device = tensors[0]
    for other, found in tensors:
        if found != device:
            raise BadArgument(f"{name}: {first} is on {device}, but {other} is on {found}")
    return device
