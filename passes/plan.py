"""Which buffer each result lies in: values that are never held at once share one.

::

    %q_a = linear(%attn.in, $q_a_proj.weight) {buffer=3} : bf16[N,1536]
    %q.heads = reshape(%q.flat) {shape=[N,128,192]} : bf16[N,128,192]       a view holds no memory
    %w, %id = route(%logits, $bias) {buffer=[7,8], k=8} : f32[N,8], i32[N,8]

Numbers count within a function, the largest buffer first; a body's buffers lie beside its caller's. The plan
itself (``moec.ir.memory``) gives the peak of an entry, and where generated code lets go of what is dead.
"""

from __future__ import annotations

from moec.ir import Module
from moec.ir.memory import plan_memory
from moec.ir.records import kernel_records
from moec.passes.manager import Pass, register


@register
class Plan(Pass):
    """Lifetimes, buffers that are reused, and the peak of each entry."""

    name = "plan"
    phase = 3

    def run(self, module: Module) -> bool:
        changed = False
        for plan in plan_memory(module, kernel_records()).functions.values():
            number = {held.value: buffer for held, buffer in plan.buffers.items()}
            for op in plan.function.ops:
                buffers = tuple(number.get(result) for result in op.results)
                if op.annotate("buffer", buffers if any(b is not None for b in buffers) else None):
                    self.log.fired["buffer"] += 1
                    changed = True
        return changed
