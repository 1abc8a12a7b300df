"""Kernels in Gluon, Triton's language of layouts, barriers and warps with tasks of their own.

They are compiled, kept and launched as ``launch.Kernel`` is. No interpreter runs them: on the CPU a Triton
kernel that takes the same arguments runs in their place, in Triton's interpreter.

A kernel file says ``gl`` for Gluon's language, ``gluon`` for its decorator and ``hopper`` for what only
Hopper has. Here others stand in for them: a worker compiles from the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moec.runtime.arguments import Arguments
from moec.runtime.compile import Request
from moec.runtime.launch import Kernel, Variant


class GluonKernel(Kernel):
    """A function in Gluon, its signature and its variants: ``KERNEL[variant, grid](*args)`` launches it.

    A variant's ``warps`` are those of the function's first partition; the others' are in the source.
    ``twin``: the Triton function that runs on the CPU, of the same parameters, but for constexprs that only
    Gluon's has; ``twin_warps``: its warps.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        signature: Mapping[str, str],
        variants: Mapping[str, Variant],
        twin: Callable[..., Any],
        twin_warps: int,
        arbitrary: Sequence[str] = (),
    ) -> None:
        super().__init__(function, signature, variants, arbitrary)
        takes = getattr(twin, "arg_names", None) or twin.__code__.co_varnames[: twin.__code__.co_argcount]
        self.twin = Kernel(
            twin,
            {name: kind for name, kind in signature.items() if name in takes},
            {
                name: replace(
                    variant,
                    constants={c: value for c, value in variant.constants.items() if c in takes},
                    warps=twin_warps,
                )
                for name, variant in variants.items()
            },
            arbitrary,
        )

    def _request(
        self, name: str, variant: Variant, arch: str, source: str, divisible: tuple[str, ...]
    ) -> Request:
        return replace(super()._request(name, variant, arch, source, divisible), language="gluon")

    def _on_cpu(
        self, variant: str, blocks: tuple[int, int, int], arguments: Arguments, args: Sequence[Any]
    ) -> None:
        self.twin[variant, blocks](*args)


class _Gluon:
    @staticmethod
    def jit(function: Any) -> Any:
        """Leaves the function as it is: a worker compiles it from its source, ahead of time."""
        return function


class _Language:
    """What signatures in a kernel file say of ``gl``."""

    class constexpr:
        """Marks a parameter."""


gluon, gl, hopper = _Gluon(), _Language(), object()
