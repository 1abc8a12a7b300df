"""Every op has a kernel, every kernel its op, every template its record."""

from __future__ import annotations

import pytest

from moec.codegen import TARGETS
from moec.codegen.kernels import KERNELS, Inline, Kernel, Templated
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
}


def without_kernel(ops: set[str], kernels: list[Kernel], target: str) -> set[str]:
    return ops - STATEMENTS - {k.op for k in kernels if target in k.targets}


def unused_templates(templates: set[str], kernels: list[Kernel]) -> set[str]:
    return templates - FRAMES - {k.template for k in kernels if isinstance(k, Templated)}


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
    assert {k.template for k in KERNELS if isinstance(k, Templated)} <= templates


def test_a_template_without_a_record_is_found() -> None:
    assert unused_templates({"python/kernels/x.py.jinja", *FRAMES}, KERNELS) == {"python/kernels/x.py.jinja"}
