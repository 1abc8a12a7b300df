"""Which kernel runs an op, and by which schedules: annotations that code generation obeys.

::

    %d = grouped_linear(%h, $experts.w2, %off) : bf16[8*N~256,7168]

    %d = grouped_linear(%h, $experts.w2, %off)
           {kernel=triton.grouped_linear, schedule="<4 rows: swapped 16x128x64 w4 s4; rows 128x128x64 w8 s3"}

The bounds are rows an expert on average. Where schedules were picked by measurements, ``tuned`` says on which
device and when. Who emits what is the kernel records' to say (``moec.ir.records``).
An annotation that is there already stays, once it's known to be possible.
"""

from __future__ import annotations

from moec.ir import Module
from moec.ir.records import kernel_records
from moec.ir.weights import WEIGHTS
from moec.passes.manager import Pass, register


@register
class Select(Pass):
    """The kernel of each op and, where it has any, its schedules."""

    name = "select"
    phase = 2

    def run(self, module: Module) -> bool:
        records, changed = kernel_records(), False
        for function in module:
            # What runs when a checkpoint is loaded runs on the CPU.
            load_time = function.name.split(".")[0] == WEIGHTS
            target = "cpu" if load_time else module.target or "cpu"
            for op in function.ops:
                for key, value in records.annotations(op, target).items():
                    if op.annotate(key, value):
                        self.log.fired[key] += 1
                        changed = True
        return changed
