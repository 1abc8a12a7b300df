"""Every op has a kernel, every kernel its op, every template its record."""

from __future__ import annotations

import re

import pytest

from moec.codegen import TARGETS
from moec.codegen.kernels import KERNELS, Inline, Kernel
from moec.codegen.kernels.cuda import CudaKernel
from moec.codegen.kernels.triton import TritonKernel
from moec.codegen.render import TEMPLATES, environment
from moec.ir.op import OPS
from moec.ir.ops.control import Loop

# Written by the emitter itself.
STATEMENTS = {"return", "bind", *(name for name, op in OPS.items() if issubclass(op, Loop))}
FRAMES = {
    "python/model.py.jinja",
    "python/weights.py.jinja",
    "python/kernels_init.py.jinja",
    "python/kernel_file.py.jinja",
    "triton/kernel_file.py.jinja",
    "cuda/kernel_file.py.jinja",
}


def without_kernel(ops: set[str], kernels: list[Kernel], target: str) -> set[str]:
    return ops - STATEMENTS - {k.op for k in kernels if not k.targets or target in k.targets}


def unused_templates(templates: set[str], kernels: list[Kernel]) -> set[str]:
    """Templates that no record renders, and no template that one renders includes or imports."""
    used = {k.template for k in kernels if not isinstance(k, Inline)}
    used |= {k.source for k in kernels if isinstance(k, CudaKernel)}
    used |= {helper for k in kernels if isinstance(k, TritonKernel) for helper in k.helpers}
    while True:
        text = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in sorted(used & templates))
        starts = tuple(re.findall(r'{% (?:include|import) "([^"]+)"', text))  # of names
        more = {t for t in templates - used if t.startswith(starts)}
        if not more:
            return templates - FRAMES - used
        used |= more


@pytest.mark.parametrize("target", TARGETS)
def test_every_op_has_a_kernel(target: str) -> None:
    assert not without_kernel(set(OPS), KERNELS, target)


def test_an_op_without_a_kernel_is_found() -> None:
    assert without_kernel({"rope", "return"}, [], "cpu") == {"rope"}
    assert without_kernel({"rope"}, [Inline("rope", lambda op, args: "", ("sm_90a",))], "cpu") == {"rope"}


def test_every_kernel_is_for_an_op_and_a_target() -> None:
    assert {k.op for k in KERNELS} <= OPS.keys() - STATEMENTS
    assert {t for k in KERNELS for t in k.targets} <= TARGETS.keys()


def test_every_template_is_used_and_there() -> None:
    templates = set(environment().list_templates())
    assert templates == {p.relative_to(TEMPLATES).as_posix() for p in TEMPLATES.rglob("*.jinja")}
    assert templates >= FRAMES
    assert not unused_templates(templates, KERNELS)
    assert {k.template for k in KERNELS if not isinstance(k, Inline)} <= templates


def test_a_template_without_a_record_is_found() -> None:
    assert unused_templates({"python/kernels/x.py.jinja", *FRAMES}, KERNELS) == {"python/kernels/x.py.jinja"}
