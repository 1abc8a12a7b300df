"""What ``moec list kernels`` shows: who emits each op for a target, and why a schedule was picked."""

from __future__ import annotations

from typing import Any

from moec.errors import BadOption

Rows = tuple[list[str], list[list[Any]]]


def emitted(target: str) -> Rows:
    """Each op with the records that may emit it for ``target``, in the order in which they are tried.

    ``from`` is the first one's template. PyTorch stands where no kernel of our own emits the op yet.
    """
    from moec import codegen
    from moec.codegen.kernels import KERNELS, Inline, serving

    goal = codegen.target(target)
    rows = []
    for op in sorted({k.op for k in KERNELS}):
        kernels = serving(op, goal.name)
        first = kernels[0]
        source = "an expression" if isinstance(first, Inline) else first.template
        family = {"triton": "Triton", "gluon": "Gluon", "cuda": "CUDA"}.get(first.family, "PyTorch")
        rows.append([op, family, source, ", ".join(k.name for k in kernels)])
    return ["op", f"on {goal.name}", "from", "kernels, the first that can is taken"], rows


def explained(spec: str, target: str, tokens: list[int]) -> Rows:
    """The best schedule of each grouped product of ``spec`` for these numbers of tokens, and its terms in µs.

    Of products that were measured, by the tuning file that builds go by, what a build takes there. Raises
    BadOption where the target has no schedules.
    """
    from moec import codegen, models, passes
    from moec.codegen.choosing import choose_by, measured, pick
    from moec.codegen.kernels import select
    from moec.codegen.kernels.triton import TritonKernel
    from moec.codegen.kernels.triton_grouped import problem
    from moec.codegen.select import Choice, choose, terms
    from moec.config import BuildOptions
    from moec.driver import choosing
    from moec.ir.devices import GPUS
    from moec.ir.ops.moe import ExpertProduct

    goal = codegen.target(target)
    if goal.name not in GPUS:
        raise BadOption(f"{target} has one way to run a kernel; --explain is for {', '.join(GPUS)}")
    module = models.lower(models.resolve(spec))
    module.target = goal.name
    passes.PassManager(passes.pipeline(target=goal.name)).run(module)
    found: dict[Any, str] = {}  # each product once, by the shape that its schedule depends on
    per_token: dict[Any, int] = {}
    for function in module:
        for op in function.ops:
            if isinstance(op, ExpertProduct) and isinstance(select(op, goal.name), TritonKernel):
                shape = problem(op)
                found.setdefault(shape, op.name)
                per_token[shape] = _slots_per_token(op)
    how, device = choosing(BuildOptions.from_environment(), goal.name), GPUS[goal.name]
    rows = []
    for shape, name in found.items():
        with choose_by(how):
            rungs = pick(shape, device, specialised=True) if measured(shape, device) else None
        for count in tokens:
            each = count * per_token[shape] / shape.experts
            choice = choose(shape, device, each)
            if rungs is not None:
                picked = next(s for below, s in rungs if each < below)
                choice = Choice(picked, terms(picked, shape, device, each))
            size = f"{shape.experts} × [{shape.matrices * shape.columns}, {shape.depth}] {shape.dtype}"
            micro, why = f"{choice.seconds * 1e6:.1f}", _terms(choice)
            if choice.schedule.form == "specialised":  # which the model doesn't know
                micro, why = "-", f"measured on {how.tuning.origin(shape)}" if how.tuning else ""
            rows.append([name, size, count, str(choice.schedule), micro, why])
    return ["op", "weights", "tokens", "schedule", "µs by the model", "terms, µs"], rows


def _terms(choice: Any) -> str:
    return ", ".join(f"{term} {seconds * 1e6:.1f}" for term, seconds in choice.terms.items())


def _slots_per_token(op: Any) -> int:
    """Rows of the product for each token: the coefficient of its symbolic number of rows."""
    from moec.codegen.kernels.triton_grouped import product_type

    rows: Any = product_type(op).shape[0]
    return int(rows.as_coeff_Mul()[0])
