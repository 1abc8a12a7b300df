"""Build options of the operators' functions: the environment's, or those of a ``with`` around the calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from functools import cache
from typing import Any

from moec.codegen.kernels import check_family
from moec.config import BuildOptions
from moec.errors import BadOption, nearest

# What is left of BuildOptions: what else there is, tensors say, or it is of packages on disk.
OPTIONS = ("batch_invariant", "cache", "kernels", "opt_level", "passes", "tuning")

_given: ContextVar[dict[str, Any]] = ContextVar("building", default={})  # noqa: B039  # nobody writes to it


@contextmanager
def building(**options: Any) -> Iterator[BuildOptions]:
    """Operators that are called within run functions built with these options, the environment's else.

    >>> with moec.ops.building(tuning="h100.json"):
    ...     tuned = moec.ops.fused_experts(x, w13, w2, weights, ids)

    tuning           a file of ``moec tune``'s, or "none": by the analytic model
    kernels          the family whose kernels go first wherever one can emit an op: "cuda", "gluon", "triton"
                     or "torch"; a build in which none can warns
    batch_invariant  as the operators' argument, for all calls
    opt_level, passes, cache  as ``moec.BuildOptions`` has them

    Each set of options has functions of its own, built at their first call (a tuning file is read then) and
    kept for the process: going back and forth costs nothing. One ``with`` in another adds to its options.
    They hold for the thread, or asyncio task, that entered; around a function of ``torch.compile``, not
    inside of one. A CUDA graph keeps what was recorded.

    Raises BadOption for an option that isn't one of these or has another type, UnknownKernel for a family
    that there isn't; calls within raise BadTuning for a file that can't be read.
    """
    for name in options:
        if name not in OPTIONS:
            known = {f.name for f in fields(BuildOptions)}
            why = "isn't an operator's" if name in known else "is none"
            raise BadOption(f"building: {name} {why}{nearest(name, OPTIONS) or f'; there is {_listed()}'}")
    given = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in options.items()}
    made = replace(_environment(), **(_given.get() | given))
    if made.kernels is not None:
        check_family(made.kernels)
    token = _given.set(_given.get() | given)
    try:
        yield made
    finally:
        _given.reset(token)


def _listed() -> str:
    return ", ".join(OPTIONS)


def options() -> BuildOptions:
    """Those of this call."""
    given = _given.get()
    return replace(_environment(), **given) if given else _environment()


@cache
def _environment() -> BuildOptions:
    """The environment's, as it was at the first call of an operator."""
    return BuildOptions.from_environment()
