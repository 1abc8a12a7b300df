"""``moec tune`` from end to end: a package and a device, then a file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moec import dumps
from moec.config import BuildOptions
from moec.errors import BadOption, DeviceUnavailable
from moec.ir import read_module
from moec.ir.devices import GPUS
from moec.runtime.devices import family
from moec.runtime.package import read_manifest
from moec.tune import results
from moec.tune.compiling import Compiling
from moec.tune.files import file_name, folder_of, versions
from moec.tune.measuring import Failed, Limits, Measurer, real_worker
from moec.tune.products import Product, products
from moec.tune.refit import Fit, fit, measurements
from moec.tune.search import Found, Say, Search

# Each stands for half to twice as many: together for 1 to 8192.
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass
class Outcome:
    """``file`` is where it was written, None where nothing was measured."""

    device: str
    found: list[Found]
    file: Path | None
    fit: Fit | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Session:
    """What ``moec tune`` can be told. ``device``: cuda, or cpu for kernels in Triton's interpreter."""

    package: Path
    seconds: float = 120.0
    tokens: Sequence[int] = TOKENS
    out: Path | None = None
    cache: str | None = None
    device: str = "cuda"
    limits: Limits = field(default_factory=Limits)
    clock: Callable[[], float] = time.monotonic  # by which the seconds count

    def run(self, say: Say = lambda line: None, keep: Callable[[Path], None] = lambda path: None) -> Outcome:
        """Measures and writes, after each number of tokens: what ends it early loses nothing.

        ``keep`` hears each time of the file. Raises NotAPackage; BadOption for a package of the CPU or one
        that has nothing to tune; DeviceUnavailable where no GPU of its target is here; BadTuning or BadOption
        for a file that can't be added to; OutputUnwritable.
        """
        target = read_manifest(self.package)["target"]
        if target not in GPUS:
            raise BadOption(
                f"{self.package} is for {target}: only packages for GPUs have schedules to choose among"
            )
        todo, notes = self._products(target)
        measurer = Measurer(real_worker(self.device), self.limits)
        try:
            name = self._device(measurer, target)
            ours = versions(target)
            path = self.out or folder_of(BuildOptions(cache=self.cache)) / file_name(name, ours["triton"])
            file = results.started(path, results.header(name, target, ours))
            outcome = Outcome(name, [], None, notes=notes)

            def write(found: list[Found]) -> None:
                if any(point.measured for one in found for point in one.points):
                    results.write(path, results.merged(file, found))
                    outcome.file = path
                    keep(path)

            with tempfile.TemporaryDirectory(prefix="moec-tune-") as folder:
                compiling = Compiling(Path(folder), target, self._cache(), self.device == "cuda")
                try:
                    search = Search(GPUS[target], measurer, compiling, self.seconds, say, write, self.clock)
                    outcome.found = search.run(todo, self.tokens)
                finally:
                    compiling.close()
        finally:
            measurer.close()
        if outcome.file is not None:
            outcome.fit = refit(path)
        return outcome

    def _products(self, target: str) -> tuple[list[Product], list[str]]:
        module = read_module(dumps.find_dump(self.package, None)[0])
        todo, left_out = products(module, target)
        if not todo:
            raise BadOption(f"{self.package} has no product with schedules to choose among")
        return todo, left_out

    def _device(self, measurer: Measurer, target: str) -> str:
        try:
            about: dict[str, Any] = measurer.about()
        except Failed as failure:
            raise DeviceUnavailable(
                f"{failure.reason}",
                notes=[f"moec tune measures on a GPU that runs {target}; builds for one need none"],
            ) from None
        capability = about["capability"]
        if capability is not None and not family(target).runs_on((capability[0], capability[1])):
            raise DeviceUnavailable(
                f"{self.package} is for {target}, and the GPU here is {about['device']}, compute capability "
                f"{capability[0]}.{capability[1]}"
            )
        return str(about["device"])

    def _cache(self) -> Path:
        from moec.runtime.kernel_cache import default_folder

        return Path(self.cache) if self.cache else default_folder()


def refit(path: Path) -> Fit | None:
    """Fits the model's constants to a file's measurements, and writes them into it; None for too few."""
    from moec.codegen.tuned import read_json, read_tuning

    tuning = read_tuning(path)
    found = fit(measurements(tuning), GPUS[tuning.target])
    if found is not None:
        results.write(path, results.merged(read_json(path), [], found))
    return found
