"""``moec tune`` with its real worker, whose kernels Triton's interpreter runs: run by test_tune_worker.py."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import moec
from moec import models
from moec.codegen.schedules import space
from moec.codegen.tuned import read_tuning
from moec.ir import read_module
from moec.ir.devices import GPUS
from moec.runtime.manifest import seal
from moec.tune.measuring import Failed, Limits, Measurer, real_worker
from moec.tune.products import Product, products
from moec.tune.session import Session

TOKENS = 5


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A layer in f16 and one in fp8, without their kernels."""
    made = {}
    for name, width in (("f16", 32), ("fp8", 128)):
        block = models.MoE(
            models.Router(experts=2, top_k=1, renorm=False), models.Experts(count=2, intermediate=width)
        )
        spec = models.Layer(block, hidden=width, dtype="bf16" if name == "fp8" else "f16", name="layer")
        options = moec.BuildOptions(fp8=name == "fp8", tuning="none")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moec.driver.compiler", lambda *given: None)
            built = moec.build(spec, "sm_90a", tmp_path_factory.mktemp("tune") / name, options=options)
        made[name] = built.path
    return made


def of(package: Path) -> list[Product]:
    return products(read_module(sorted((package / "ir").glob("*.moec"))[-1]), "sm_90a")[0]


@pytest.mark.parametrize("name", ["f16", "fp8"])
def test_every_product_of_a_package_runs_alone(name: str, packages: dict[str, Path], tmp_path: Path) -> None:
    """Of each op: operands are drawn, the candidates run, agree with the first one and are timed."""
    measurer = Measurer(real_worker("cpu"))
    try:
        assert measurer.about() == {"device": "cpu", "capability": None}
        for number, product in enumerate(of(packages[name])):
            measurer.operands(product.arguments(TOKENS), product.choices(TOKENS))
            for at, schedule in enumerate(space(product.problem, GPUS["sm_90a"])[::9][:2]):
                folder = tmp_path / f"{number}.{at}"
                product.write(folder, schedule, "sm_90a")
                reply = measurer.measure(folder, 0.0, product.tolerance, at == 0)
                assert reply["seconds"] > 0 and reply["rounds"] >= 5 and not reply["graph"]
                assert reply["difference"] <= product.tolerance
    finally:
        measurer.close()


def edited(folder: Path, old: str, new: str) -> None:
    """Changes a kernel and what the manifest says of its hash."""
    (file,) = [f for f in (folder / "kernels").glob("*.py") if f.stem != "__init__"]
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    name = file.relative_to(folder).as_posix()
    manifest["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)), encoding="utf-8")


BAD = [
    ("total.to(y.dtype.element_ty)", "(total + 9.0).to(y.dtype.element_ty)", "off by"),
    ("    tl.store(out,", "    if first < 0:\n        tl.store(out,", "off by inf"),  # nothing is written
    ("    rows = slot.shape[0]", "    raise ValueError('no')", "ValueError: no"),
    ("    rows = slot.shape[0]", "    import os; os._exit(7)", "ended with status 7"),
    ("    rows = slot.shape[0]", "    import time; time.sleep(99)", "no result within"),
]


def test_a_bad_kernel_is_found_and_the_next_one_measured(packages: dict[str, Path], tmp_path: Path) -> None:
    (product,) = [p for p in of(packages["f16"]) if p.op.name == "gather_grouped_linear"]
    good = tmp_path / "good"
    product.write(good, space(product.problem, GPUS["sm_90a"])[0], "sm_90a")
    measurer = Measurer(real_worker("cpu"))
    given: Any = (product.arguments(TOKENS), product.choices(TOKENS))
    try:
        measurer.operands(*given)
        measurer.measure(good, 0.0, product.tolerance, True)
        for number, (old, new, why) in enumerate(BAD):
            bad = tmp_path / str(number)
            shutil.copytree(good, bad)
            edited(bad, old, new)
            measurer.limits = Limits(measure=3 if "within" in why else 60)
            with pytest.raises(Failed, match=why) as caught:
                measurer.measure(bad, 0.0, product.tolerance, False)
            assert caught.value.died == ("ended" in why or "within" in why)
            measurer.limits = Limits(measure=60)
            if caught.value.died:
                measurer.operands(*given)
            assert measurer.measure(good, 0.0, product.tolerance, caught.value.died)["seconds"] > 0
    finally:
        measurer.close()


def test_a_session_from_end_to_end(packages: dict[str, Path], tmp_path: Path) -> None:
    out, cache = tmp_path / "x.json", str(tmp_path / "cache")
    outcome = Session(packages["f16"], 6, (TOKENS,), out, cache, "cpu").run()
    assert outcome.file == tmp_path / "x.json" and outcome.device == "cpu"
    assert not [p.excluded for one in outcome.found for p in one.points if p.excluded]
    tuning = read_tuning(outcome.file, pytest.fail)
    assert tuning.measured and all(
        math.isfinite(s)
        for points in tuning.measured.values()
        for found in points.values()
        for s in found.values()
    )
