"""What the families of NVIDIA devices hold, as far as a kernel that was compiled for one must know it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moec.errors import UnknownTarget, nearest


@dataclass(frozen=True)
class Family:
    """The devices that one cubin can run on."""

    arch: str  # as ptxas spells it; an a at the end: this very capability and no later one
    shared: int  # bytes of shared memory that one block may have, those that it must ask for included
    tensor_memory: int = 0  # columns of tensor memory, 4 bytes * 128 lanes each
    maxnreg: int | None = None  # registers a thread at most, where a kernel doesn't say

    @property
    def number(self) -> int:
        """90 for sm_90a, as Triton's GPUTarget takes it."""
        return int(re.sub(r"\D", "", self.arch))

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a device of compute capability (major, minor) runs this family's cubins."""
        major, minor = divmod(self.number, 10)
        if self.arch.endswith("a"):
            return capability == (major, minor)
        return capability[0] == major and capability[1] >= minor


# CUDA C++ Programming Guide, technical specifications by compute capability.
FAMILIES = {
    f.arch: f
    for f in [
        Family("sm_80", 166_912),
        Family("sm_89", 101_376),
        Family("sm_90a", 232_448),
        Family("sm_100a", 232_448, tensor_memory=512),
        # Untold, ptxas keeps to fewer registers here and spills a few of them.
        Family("sm_120a", 101_376, maxnreg=255),
    ]
}


def family(arch: str) -> Family:
    """The family of that name. Raises UnknownTarget."""
    if arch not in FAMILIES:
        raise UnknownTarget(f"no kernels are compiled for {arch!r}{nearest(arch, FAMILIES)}")
    return FAMILIES[arch]
