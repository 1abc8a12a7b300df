"""The kernel records, as passes and analyses ask for them (``moec.ir.records``)."""

from __future__ import annotations

from moec.codegen.kernels import select
from moec.codegen.kernels.record import emits_nothing
from moec.codegen.targets import target as known_target
from moec.ir.amount import Amount
from moec.ir.op import Op
from moec.ir.ops.control import Loop, Return
from moec.ir.ops.weights import Bind


class KernelRecords:
    """Implements ``moec.ir.records.Records``."""

    def annotations(self, op: Op, target: str) -> dict[str, str]:
        known_target(target)
        if isinstance(op, Loop | Return | Bind):
            emits_nothing(op)
            return {}
        kernel = select(op, target)
        schedules, origin = kernel.schedules(op, target), kernel.measured_on(op, target)
        found = {"kernel": kernel.name, "schedule": schedules, "tuned": origin}
        return {key: text for key, text in found.items() if text}

    def workspace(self, op: Op, target: str) -> Amount:
        return select(op, target).workspace(op)
