"""What moec compiles for."""

from __future__ import annotations

from dataclasses import dataclass

from moec.errors import UnknownTarget, nearest
from moec.ir.devices import GPUS


@dataclass(frozen=True)
class Target:
    """A device family by the name that ``--target`` takes."""

    name: str
    device: str
    describes: str


TARGETS = {
    t.name: t
    for t in [
        Target("cpu", "cpu", "PyTorch on the CPU, experts as contiguous segments"),
        *(Target(d.name, "cuda", f"Triton, scheduled for the {d.stands_for}") for d in GPUS.values()),
    ]
}


def target(name: str) -> Target:
    """The target of that name. Raises UnknownTarget."""
    if name not in TARGETS:
        raise UnknownTarget(
            f"no target is called {name!r}; there is {', '.join(TARGETS)}{nearest(name, TARGETS)}"
        )
    return TARGETS[name]
