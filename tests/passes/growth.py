"""How the work of each stage of a build grows with a model's layers: lines of Python that run.

``python -m tests.passes.growth sm_90a FOLDER`` prints it as JSON, by stage. A process of its own, since sympy
keeps a thousand results: which of them are still there would depend on what ran before, and on hashes.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from moec import models
from moec.codegen.emit import emit_python
from moec.codegen.parameters import manifest_tensors
from moec.ir import parse_module, print_module, verify
from moec.passes import Events, PassManager, pipeline

ENVIRONMENT = {"SYMPY_CACHE_SIZE": "None", "PYTHONHASHSEED": "0"}
LAYERS = (1, 4, 13)


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


def main() -> None:
    target, folder = sys.argv[1], Path(sys.argv[2])
    list(stages(2, target, folder))  # fills the caches of libraries
    small, middle, large = (dict(stages(n, target, folder)) for n in LAYERS)
    growth = {name: (large[name] - middle[name]) / max(1, middle[name] - small[name]) for name in small}
    print(json.dumps(growth))


if __name__ == "__main__":
    main()
