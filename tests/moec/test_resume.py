"""Builds that go on from a dump, as it was or edited; pipelines that stop early."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.check import verify_package
from moec.errors import BadOption
from moec.ir import read_module

from .conftest import PRESET, Cli

GROUPED = "002_expert-grouping.moec"
AFTER_GROUPING = "mla-absorb,paged-attention,canonicalise,decode-entry,select,plan"


@pytest.fixture
def dump(built: Path, tmp_path: Path) -> Path:
    """A copy of the dump after expert-grouping."""
    return Path(shutil.copy(built / "ir" / GROUPED, tmp_path / GROUPED))


def resume(dump: Path, out: Path, **more: Any) -> moec.Built:
    return moec.build(PRESET, out=out, dtype="f32", options=moec.BuildOptions(resume=str(dump), **more))


def sources(package: Path) -> dict[str, str]:
    return {f.relative_to(package).as_posix(): f.read_text() for f in sorted(package.rglob("*.py"))}


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_every_dump_unedited_leads_to_the_same_package(built: Path, tmp_path: Path) -> None:
    for file in sorted((built / "ir").glob("*.moec")):
        again = resume(file, tmp_path / file.stem)
        assert sources(again.path) == sources(built), file.name
        number = file.stem.partition("_")[0]
        later = [f.name for f in sorted((built / "ir").glob("*.moec")) if f.name > file.name]
        assert [f.name for f in again.ir_files] == ["000_naive.moec", f"{number}_resumed.moec", *later]
        last, resumed = built / "ir" / sorted((built / "ir").iterdir())[-1].name, again.ir_files[-1]
        assert resumed.read_text() == last.read_text()


def test_the_manifest_says_what_it_was_resumed_from(dump: Path, tmp_path: Path) -> None:
    made = resume(dump, tmp_path / "again")
    assert made.manifest["resumed"] == {
        "file": GROUPED,
        "sha256": hashlib.sha256(dump.read_bytes()).hexdigest(),
        "ran": "canonicalise,expert-grouping",
        "passes": AFTER_GROUPING,
    }
    assert "resume" not in made.manifest["options"]
    assert isinstance(moec.load(made, "random:0"), moec.LanguageModel)
    rows = [json.loads(line) for line in (made.path / "events.jsonl").read_text().splitlines()]
    assert {row["number"] for row in rows} == {3, 4, 5, 6, 7, 8}, "the passes keep their numbers"


def test_an_edit_is_built_and_verify_sees_that_it_changed_the_meaning(dump: Path, tmp_path: Path) -> None:
    edit(dump, "scale=2.5", "scale=1.5")
    made = resume(dump, tmp_path / "edited")
    assert "* 1.5" in (made.path / "kernels" / "route.py").read_text()
    assert "scale=2.5" in made.ir_files[0].read_text(), "the naive IR is the spec's"
    assert not verify_package(made.path, "random:0", decode=0).ok


def test_an_edit_that_keeps_the_meaning(dump: Path, tmp_path: Path) -> None:
    edit(dump, "%xe = gather_rows", "%renamed = gather_rows")
    edit(dump, "grouped_linear(%xe,", "grouped_linear(%renamed,")
    made = resume(dump, tmp_path / "edited")
    assert "renamed = " in (made.path / "model.py").read_text()
    assert verify_package(made.path, "random:0", decode=0).ok


def _no_header(text: str) -> str:
    return "".join(line.split(" ; ")[0] + "\n" if i == 0 else line
                   for i, line in enumerate(text.splitlines(keepends=True)))  # fmt: skip


def test_a_dumps_name_stands_in_for_its_header(built: Path, dump: Path, tmp_path: Path) -> None:
    dump.write_text(_no_header(dump.read_text()))
    assert read_module(dump).ran == ""
    assert sources(resume(dump, tmp_path / "again").path) == sources(built)
    other = tmp_path / "edited.moec"
    dump.rename(other)
    with pytest.raises(BadOption, match="doesn't say which pass"):
        resume(other, tmp_path / "no")
    given = resume(other, tmp_path / "given", passes=AFTER_GROUPING)
    assert sources(given.path) == sources(built)
    wrong = tmp_path / "002_mla-absorb.moec"
    other.rename(wrong)
    with pytest.raises(BadOption, match=r"pass 2 is no mla-absorb .*2: expert-grouping"):
        resume(wrong, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_other_passes_than_those_that_the_dump_names(dump: Path, tmp_path: Path) -> None:
    made = resume(dump, tmp_path / "again", passes="mla-absorb")
    assert [f.name for f in made.ir_files] == ["000_naive.moec", "002_resumed.moec", "003_mla-absorb.moec"]
    assert "latent_attention" in made.ir_files[-1].read_text()
    assert read_module(made.ir_files[-1]).to_run == ""


def test_a_tensor_that_the_edit_no_longer_reads(dump: Path, pristine: Path, tmp_path: Path) -> None:
    edit(dump, "add(%y.1, %shared.down)", "add(%y.1, %y.1)")
    made = resume(dump, tmp_path / "again")
    reasons = {reason for _, reason in made.manifest["ignored"]}
    assert "the resumed dump doesn't read it" in reasons
    assert moec.load(made, str(pristine)) is not None, "the spec's checkpoint still fits"


Edit = Callable[[str], str]


@pytest.mark.parametrize(
    ("change", "code", "at", "words"),
    [
        (lambda t: t.replace("k=3", "k=99"), "M0203", "k=99", ("route: k is 99 of 12 experts",)),
        (lambda t: t.replace("k=3", "k=x"), "M0202", "k=x", ("k=x is no",)),
        (lambda t: t.replace("= route(", "= rout("), "M0205", "= rout(", ("mean route",)),
        (lambda t: t.replace("@step(%ids: i64[N]", "@step(%ids: i64[N,1]"), "M0203", "embedding", ()),
        (lambda t: t.replace("layers=1..2", "layers=0..2"), "M0201", "layers=0..2", ("overlap",)),
        (lambda t: t.replace("call @layer.moe(", "call @layer.mo("), "M0201", "@layer.mo(", ("@layer.mo",)),
    ],
)  # fmt: skip
def test_a_broken_edit_is_an_error_at_its_line(
    cli: Cli, dump: Path, tmp_path: Path, change: Edit, code: str, at: str, words: tuple[str, ...]
) -> None:
    text = dump.read_text()
    dump.write_text(change(text))
    assert dump.read_text() != text
    line = next(n for n, body in enumerate(dump.read_text().splitlines(), start=1) if at in body)
    out = tmp_path / "package"
    done = cli("build", PRESET, "--dtype", "f32", "-o", out, "--resume", dump)
    done.refused(code, f"--> {dump}:{line}:", "^", *words)
    assert not out.exists() and {p.name for p in tmp_path.iterdir()} == {GROUPED}


def test_a_dump_of_something_else(cli: Cli, dump: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "package")
    cli("build", "mixtral-tiny", *out, "--resume", dump).refused("M0201", str(dump))
    cli("build", PRESET, *out, "--target", "sm_90a", "--resume", dump).refused("M0701", "--target cpu")
    cli("build", PRESET, *out, "--dtype", "bf16", "--resume", dump).refused("M0201", str(dump))
    cli("build", PRESET, *out, "--resume", tmp_path / "none.moec").refused("M0701", "none.moec")
    edit(dump, "func @head(", "func @heads(")
    cli("build", PRESET, *out, "--resume", dump).refused("M0201", "@head is gone")
    assert {p.name for p in tmp_path.iterdir()} == {GROUPED}


# --stop-after
def test_stop_after(cli: Cli, tmp_path: Path) -> None:
    for last, dumps in (("expert-grouping", 2), ("2", 2), ("1", 1), ("canonicalise", 4)):
        out = tmp_path / f"to-{last}"
        assert cli("build", PRESET, "-o", out, "--stop-after", last).code == 0
        assert len(list((out / "ir").iterdir())) == dumps, last
    cli("build", PRESET, "-o", tmp_path / "no", "--stop-after", "mla").refused("M0701", "'mla'", "mla-absorb")


def test_stop_after_in_a_resumed_build_counts_as_the_whole_does(dump: Path, tmp_path: Path) -> None:
    made = resume(dump, tmp_path / "again", stop_after="5")
    assert made.ir_files[-1].name == "005_canonicalise.moec"


def test_fp8_that_the_dump_does_not_have_is_refused(dump: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"fp8-cast is asked for, .* no fp8-cast"):
        resume(dump, tmp_path / "no", fp8=True)
    assert not (tmp_path / "no").exists()


def test_the_manifest_says_the_fp8_that_ran(tmp_path: Path) -> None:
    """A dump's header has it to run; the flags of the resumed build say nothing of it."""
    first = moec.build(PRESET, out=tmp_path / "a", dtype="f32", options=moec.BuildOptions(fp8=True))
    made = resume(first.ir_files[0], tmp_path / "b")
    assert made.manifest["fp8"] == "fp8-cast" and not made.manifest["options"]["fp8"]
    assert sources(made.path) == sources(first.path)
