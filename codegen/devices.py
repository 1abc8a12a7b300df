"""What the analytic models know of each GPU target: one representative device each.

Unless a line says otherwise a figure is NVIDIA's, for dense arithmetic, from the device's data sheet, its
architecture's white paper or the CUDA programming guide's table of compute capabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Device:
    """``bandwidth`` in bytes/s, ``matmul_flops`` in FLOP/s by dtype, memories in bytes, ``launch_s`` in s."""

    name: str
    stands_for: str
    capability: tuple[int, int]
    arch: str
    sms: int
    smem_per_block: int
    smem_per_sm: int
    l2_bytes: int
    bandwidth: float
    matmul_flops: dict[str, float]
    registers_per_sm: int = 65536
    threads_per_sm: int = 2048
    # From one kernel's end to the next one's start on a stream: an assumption, the same for every schedule.
    launch_s: float = 3e-6

    @property
    def triton_arch(self) -> int:
        """What ``GPUTarget("cuda", ...)`` takes."""
        return self.capability[0] * 10 + self.capability[1]

    @property
    def tma(self) -> bool:
        """Copies whole tiles by tensor descriptor."""
        return self.capability >= (9, 0)

    @property
    def warpgroup_mma(self) -> bool:
        """The matrix unit takes tiles of 64 rows or more at full rate (wgmma, tcgen05); mma.sync takes 16."""
        return self.capability[0] in (9, 10)

    @property
    def l2_bandwidth(self) -> float:
        """L2 to SMs, bytes/s. Mostly unpublished: taken as three times that of DRAM, an assumption."""
        return 3 * self.bandwidth


DEVICES = {
    d.name: d
    for d in [
        Device(
            "sm_80",
            "A100 80GB SXM",
            (8, 0),
            "sm_80",
            sms=108,
            smem_per_block=163 * KIB,
            smem_per_sm=164 * KIB,
            l2_bytes=40 * MIB,
            bandwidth=2.039e12,
            matmul_flops={"bf16": 312e12, "f16": 312e12, "f32": 19.5e12},
        ),
        Device(
            "sm_89",
            "L40S",
            (8, 9),
            "sm_89",
            sms=142,
            smem_per_block=99 * KIB,
            smem_per_sm=100 * KIB,
            l2_bytes=96 * MIB,
            bandwidth=0.864e12,
            matmul_flops={"bf16": 362e12, "f16": 362e12, "f32": 91.6e12},
            threads_per_sm=1536,
        ),
        Device(
            "sm_90a",
            "H100 SXM",
            (9, 0),
            "sm_90a",
            sms=132,
            smem_per_block=227 * KIB,
            smem_per_sm=228 * KIB,
            l2_bytes=50 * MIB,
            # Reached on an H100, bf16; the data sheet says 3.35e12 B/s and 989e12 FLOP/s. f16: as bf16.
            bandwidth=3.0e12,
            matmul_flops={"bf16": 798e12, "f16": 798e12, "f32": 67e12},
        ),
        Device(
            "sm_100a",
            "B200",
            (10, 0),
            "sm_100a",
            sms=148,
            smem_per_block=227 * KIB,
            smem_per_sm=228 * KIB,
            l2_bytes=126 * MIB,
            bandwidth=8.0e12,
            matmul_flops={"bf16": 2250e12, "f16": 2250e12, "f32": 75e12},
        ),
        Device(
            "sm_120a",
            "GeForce RTX 5090",
            (12, 0),
            "sm_120a",
            sms=170,
            smem_per_block=99 * KIB,
            smem_per_sm=100 * KIB,
            l2_bytes=96 * MIB,
            bandwidth=1.792e12,
            matmul_flops={"bf16": 209.5e12, "f16": 209.5e12, "f32": 104.8e12},
            threads_per_sm=1536,
        ),
    ]
}
