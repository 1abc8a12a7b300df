"""Work grows with a model as its layers do: counted, not timed.

Counted is each line of Python that runs, moec's and its libraries'. A loop's turns are lines, those of
comprehensions too, so that no search through all functions hides. Only loops inside of C functions do.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from moec import models
from moec.codegen.emit import emit_python
from moec.codegen.parameters import manifest_tensors
from moec.ir import parse_module, print_module, verify
from moec.passes import Events, PassManager, pipeline

LAYERS = (1, 4, 13)
# The last step adds three times the layers that the first one does: three times the work, where a part that
# is quadratic would have eleven times its own. Seen: 3.005 at most.
MOST = 3.02


def lines_run(work: Callable[[], Any]) -> int:
    """Lines of Python that ``work`` runs."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    gc.disable()  # whatever others have it call is no work of ours
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def spec(layers: int) -> models.Model:
    """Latent attention and experts, stored in FP8, each layer a function of its own: no two have one eps."""
    attention = models.MLA(2, 4, 2, 4, 8, 8)
    router = models.Router(2, 1, score="sigmoid", bias=True)
    moe = models.MoE(router, models.Experts(2, 8), models.SwiGLU(8, name="shared_experts"))
    decoders = [models.Decoder(attention, moe, eps=(1 + i) * 1e-6) for i in range(layers)]
    return models.Model(16, 8, decoders, dtype="f32", quantization=models.BlockFP8((4, 4)))


def stages(layers: int, target: str, folder: Path) -> Iterator[tuple[str, int]]:
    """The work of each stage of a build, and of each pass."""
    module: Any = None

    def lower() -> None:
        nonlocal module
        module = models.lower(spec(layers))

    yield "lower", lines_run(lower)
    module.target = target
    for number, each in enumerate(pipeline(3, target)):
        yield f"{each.name} {number}", lines_run(lambda each=each: each.run(module))
    yield "verify", lines_run(lambda: verify(module))
    text = ""

    def write() -> None:
        nonlocal text
        text = print_module(module)

    yield "print", lines_run(write)
    yield "parse", lines_run(lambda: parse_module(text))
    yield "emit", lines_run(lambda: emit_python(module, target, "0"))
    yield "manifest", lines_run(lambda: manifest_tensors(module))
    again = models.lower(spec(layers))
    manager = PassManager(pipeline(2, target), [Events(folder / "events.jsonl")])
    yield "events", lines_run(lambda: manager.run(again))


@pytest.mark.parametrize("target", [pytest.param("cpu", marks=pytest.mark.slow), "sm_90a"])
def test_work_grows_as_the_layers_do(target: str, tmp_path: Path) -> None:
    list(stages(2, target, tmp_path))  # fills the caches of libraries
    small, middle, large = (dict(stages(n, target, tmp_path)) for n in LAYERS)
    growth = {name: (large[name] - middle[name]) / max(1, middle[name] - small[name]) for name in small}
    assert all(growth[name] > 2.5 for name in ("lower", "verify", "print", "parse")), growth
    assert max(growth.values()) < MOST, {n: round(g, 2) for n, g in growth.items() if g >= MOST}


@pytest.mark.parametrize(
    ("work", "quadratic"),
    [
        (lambda n: [i for i in range(n)], False),  # noqa: C416
        (lambda n: [[j for j in range(n)] for i in range(n)], True),  # noqa: C416
        (lambda n: [any(j == -1 for j in range(n)) for i in range(n)], True),
    ],
)
def test_the_counter_sees_loops_within_loops(work: Callable[[int], Any], quadratic: bool) -> None:
    small, middle, large = (lines_run(lambda n=n: work(n)) for n in (30, 90, 270))
    assert ((large - middle) / (middle - small) > MOST) == quadratic
