"""Verifying packages in fp8: sound ones are equal, however routers flip; planted mistakes are found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import moec
from moec.check import SQNR, verify_package
from moec.models.families import FAMILIES

from .test_check import plant

FP8 = moec.BuildOptions(fp8=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package in fp8 and fp32; not to be changed."""
    out = tmp_path_factory.mktemp("fp8") / "tiny"
    return moec.build("deepseek-v3-tiny", out=out, dtype="f32", options=FP8).path


@pytest.mark.parametrize("tiny", sorted({family.tiny for family in FAMILIES.values()}))
def test_a_sound_package_is_equal(tiny: str, tmp_path: Path) -> None:
    for dtype in ("f32", "bf16"):
        package = moec.build(tiny, out=tmp_path / dtype, dtype=dtype, options=FP8).path
        verdict = verify_package(package, "random:4", decode=1, seed=4)
        assert verdict.ok and not verdict.exact and verdict.wrong == 0, verdict
        assert bool(verdict.flipped) == bool(verdict.routed), "fp8 changes some of the choices"
        if dtype == "f32":
            assert max(r.median for r in verdict.rows) < 1e-5, "but for single tokens the same numbers"


@pytest.mark.parametrize(
    "recipe",
    ["per-row", "per-tensor", "deepseek-v3.1", "block=16", "ops=[linear,grouped_linear,head_linear]"],
)
def test_every_recipe_is_judged(recipe: str, tmp_path: Path) -> None:
    package = moec.build("deepseek-v3-tiny", out=tmp_path / "x", options=moec.BuildOptions(fp8=recipe)).path
    assert verify_package(package, "random:0", decode=1).ok


MISTAKES = [
    ("quant", "/ 448", "/ 900"),  # half of the range saturates
    ("quant", "amax.clamp(min=1e-4)", "amax.clamp(min=2)"),
    ("linear", "w.float() * w_scale", "w.float() * w_scale.clamp(max=1e-4)"),
    ("linear", "x.float() * x_scale", "x.float() * x_scale.roll(1, 0)"),
    ("grouped_linear", "w_scale[expert]", "w_scale[expert - 1]"),
    ("grouped_linear", "w[expert].float()", "w[expert - 1].float()"),
    ("route", "choice = scores + bias", "choice = scores + 0"),
    ("route", "weights = weights * 2.5", "pass"),
    ("route", ".topk(2, dim=-1).values.sum(-1)", ".amin(-1)"),
    ("latent_attention", "value, scale=0.30558255774919335", "value, scale=0.25"),
    ("rope", "torch.complex(cos, sin)", "torch.complex(cos, -sin)"),
]


@pytest.mark.parametrize(("kernel", "old", "new"), MISTAKES)
def test_a_planted_mistake_is_found(whole: Path, tmp_path: Path, kernel: str, old: str, new: str) -> None:
    package = Path(shutil.copytree(whole, tmp_path / "package"))
    plant(package, f"kernels/{kernel}.py", old, new)
    assert not verify_package(package, "random:0", decode=1).ok


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [("topk_groups=2", "topk_groups=1", True), ("scale=2.5", "scale=0.5", False)],
)
def test_a_pass_that_changes_the_router_is_found(
    whole: Path, tmp_path: Path, old: str, new: str, wrong: bool
) -> None:
    """Package and last dump agree; the naive router, asked about the same logits, doesn't."""
    (dump,) = (whole / "ir").glob("*_fp8-cast.moec")
    assert old in dump.read_text()
    edited = tmp_path / dump.name
    edited.write_text(dump.read_text().replace(old, new))
    options = moec.BuildOptions(resume=str(edited))
    package = moec.build("deepseek-v3-tiny", out=tmp_path / "x", dtype="f32", options=options).path
    verdict = verify_package(package, "random:0", decode=1)
    assert not verdict.ok and bool(verdict.wrong) == wrong
    low = [r.value for r in verdict.rows if r.sqnr is not None and r.sqnr < SQNR["f32 in fp8"][0]]
    assert wrong or low


def test_folded_shared_experts_are_none_of_the_naive_router_s(tmp_path: Path) -> None:
    options = moec.BuildOptions(fp8=True, opt_level=3)
    package = moec.build("deepseek-v3-tiny", out=tmp_path / "x", dtype="bf16", options=options).path
    assert verify_package(package, "random:0", decode=1).ok
    plant(package, "kernels/route.py", "choice = scores + bias", "choice = scores + 0")
    assert not verify_package(package, "random:0", decode=1).ok


def test_a_layer_is_judged_by_its_last_dump(tmp_path: Path) -> None:
    mlp = moec.models.Layer(moec.models.SwiGLU(48), hidden=32, dtype="f32")
    package = moec.build(mlp, out=tmp_path / "x", options=FP8).path
    assert verify_package(package, "random:0").ok
    plant(package, "kernels/quant.py", "/ 448", "/ 900")
    assert not verify_package(package, "random:0").ok
