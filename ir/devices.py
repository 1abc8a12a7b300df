"""What the analytic models know of each target: one representative device each.

Unless a line says otherwise a GPU's figure is NVIDIA's, for dense arithmetic, from the device's data sheet,
its architecture's white paper or the CUDA programming guide's table of compute capabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moec.errors import BadOption, nearest

KIB, MIB = 1 << 10, 1 << 20
RATES = ("f32", "bf16", "f16", "f8e4m3")  # dtypes that devices have rates of


@dataclass(frozen=True, kw_only=True)
class Device:
    """``bandwidth`` in bytes/s, ``matmul_flops`` in FLOP/s by dtype, ``launch_s`` in s.

    ``matmul_flops`` has f32 at least; its figure is that of all arithmetic but matrix products too.
    """

    name: str
    stands_for: str
    bandwidth: float
    matmul_flops: dict[str, float]
    # From one kernel's end to the next one's start on a stream: an assumption, the same for every schedule.
    launch_s: float = 3e-6

    def flops_of(self, dtype: str) -> float:
        """FLOP/s of products of ``dtype``; of bf16 ones (else f32) where the device has no unit for it."""
        rates = self.matmul_flops
        return rates.get(dtype) or rates.get("bf16") or rates["f32"]


@dataclass(frozen=True, kw_only=True)
class GPU(Device):
    """Memories in bytes."""

    capability: tuple[int, int]
    arch: str
    sms: int
    smem_per_block: int
    smem_per_sm: int
    l2_bytes: int
    registers_per_sm: int = 65536
    threads_per_sm: int = 2048

    @property
    def tma(self) -> bool:
        """Copies whole tiles by tensor descriptor."""
        return self.capability >= (9, 0)

    @property
    def warpgroup_mma(self) -> bool:
        """The matrix unit takes tiles of 64 rows or more at full rate (wgmma, tcgen05); mma.sync takes 16."""
        return self.capability[0] in (9, 10)

    @property
    def fp8(self) -> bool:
        """The matrix unit multiplies e4m3."""
        return "f8e4m3" in self.matmul_flops

    @property
    def l2_bandwidth(self) -> float:
        """L2 to SMs, bytes/s. Mostly unpublished: taken as three times that of DRAM, an assumption."""
        return 3 * self.bandwidth


GPUS = {
    d.name: d
    for d in [
        GPU(
            name="sm_80",
            stands_for="A100 80GB SXM",
            capability=(8, 0),
            arch="sm_80",
            sms=108,
            smem_per_block=163 * KIB,
            smem_per_sm=164 * KIB,
            l2_bytes=40 * MIB,
            bandwidth=2.039e12,
            matmul_flops={"bf16": 312e12, "f16": 312e12, "f32": 19.5e12},
        ),
        GPU(
            name="sm_89",
            stands_for="L40S",
            capability=(8, 9),
            arch="sm_89",
            sms=142,
            smem_per_block=99 * KIB,
            smem_per_sm=100 * KIB,
            l2_bytes=96 * MIB,
            bandwidth=0.864e12,
            matmul_flops={"f8e4m3": 733e12, "bf16": 362e12, "f16": 362e12, "f32": 91.6e12},
            threads_per_sm=1536,
        ),
        GPU(
            name="sm_90a",
            stands_for="H100 SXM",
            capability=(9, 0),
            arch="sm_90a",
            sms=132,
            smem_per_block=227 * KIB,
            smem_per_sm=228 * KIB,
            l2_bytes=50 * MIB,
            # Reached on an H100, bf16; the data sheet says 3.35e12 B/s and 989e12 FLOP/s. f16: as bf16.
            # f8e4m3: the data sheet's, not reached by anyone yet.
            bandwidth=3.0e12,
            matmul_flops={"f8e4m3": 1979e12, "bf16": 798e12, "f16": 798e12, "f32": 67e12},
        ),
        GPU(
            name="sm_100a",
            stands_for="B200",
            capability=(10, 0),
            arch="sm_100a",
            sms=148,
            smem_per_block=227 * KIB,
            smem_per_sm=228 * KIB,
            l2_bytes=126 * MIB,
            bandwidth=8.0e12,
            matmul_flops={"f8e4m3": 4500e12, "bf16": 2250e12, "f16": 2250e12, "f32": 75e12},
        ),
        GPU(
            name="sm_120a",
            stands_for="GeForce RTX 5090",
            capability=(12, 0),
            arch="sm_120a",
            sms=170,
            smem_per_block=99 * KIB,
            smem_per_sm=100 * KIB,
            l2_bytes=96 * MIB,
            bandwidth=1.792e12,
            matmul_flops={"f8e4m3": 419e12, "bf16": 209.5e12, "f16": 209.5e12, "f32": 104.8e12},
            threads_per_sm=1536,
        ),
    ]
}

# No CPU in particular, and nothing measured: eight cores that do 32 FLOP a cycle (two AVX2 multiply-adds of
# eight f32) at 3 GHz, on 50 GB/s of memory; 16-bit products at the rate of f32 ones; 2 µs a call.
CPU = Device(
    name="cpu",
    stands_for="8 AVX2 cores at 3 GHz (assumed)",
    bandwidth=50e9,
    matmul_flops={"f32": 768e9, "bf16": 768e9, "f16": 768e9},
    launch_s=2e-6,
)

# By the target's name.
DEVICES: dict[str, Device] = {CPU.name: CPU, **GPUS}


def with_figures(device: Device, text: str) -> Device:
    """``device`` with other figures: ``bandwidth=3.35e12,bf16=989e12,launch=2e-6``. Raises BadOption."""
    rates = dict(device.matmul_flops)
    figures = {"bandwidth": device.bandwidth, "launch": device.launch_s}
    names = [*figures, *RATES]
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = (p.strip() for p in part.partition("="))
        if name not in names:
            raise BadOption(
                f"no figure is called {name!r}{nearest(name, names)}; there is {', '.join(names)}"
            )
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise BadOption(f"{part!r}: a figure is a positive number, as bandwidth=3.35e12")
        (figures if name in figures else rates)[name] = number
    return replace(device, bandwidth=figures["bandwidth"], launch_s=figures["launch"], matmul_flops=rates)
