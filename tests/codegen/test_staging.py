"""A package folder is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import moec
from moec.codegen import package as codegen_package
from moec.codegen.package import staging
from moec.errors import MoecError, OutputExists, OutputUnwritable
from tests.codegen.packages import moe_layer


def write(out: Path, text: str, force: bool = False) -> None:
    with staging(out, force) as folder:
        (folder / "manifest.json").write_text(text)
        (folder / "kernels").mkdir()
        (folder / "kernels" / "a.py").write_text(text)


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_when_all_is_written(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "x"
    with staging(out, False) as folder:
        assert not out.exists()
        assert folder.parent == out.parent
        (folder / "a").write_text("1")
    assert left(out.parent) == ["x"]
    assert left(out) == ["a"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), OutputExists("told so")])
@pytest.mark.parametrize("before", [False, True])
def test_a_failure_leaves_what_was_there(error: BaseException, before: bool, tmp_path: Path) -> None:
    out = tmp_path / "x"
    if before:
        write(out, "old")
    with pytest.raises(type(error)), staging(out, True) as folder:
        (folder / "half").write_text("1")
        raise error
    assert left(tmp_path) == (["x"] if before else [])
    if before:
        assert (out / "manifest.json").read_text() == "old"
        assert not (out / "half").exists()


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OutputUnwritable, match=r"M0502.*can't write .*x: No space left"):
        try:
            with staging(tmp_path / "x", False):
                raise OSError(28, "No space left on device")
        except OutputUnwritable as error:
            raise OutputUnwritable(str(error)) from None
    assert left(tmp_path) == []


def test_force_replaces_a_package_whole(tmp_path: Path) -> None:
    out = tmp_path / "x"
    write(out, "old")
    (out / "stray").write_text("1")
    with pytest.raises(OutputExists, match="--force"):
        write(out, "new")
    assert (out / "stray").exists()
    write(out, "new", force=True)
    assert (out / "kernels" / "a.py").read_text() == "new"
    assert left(out) == ["kernels", "manifest.json"]
    assert left(tmp_path) == ["x"]


def test_force_replaces_only_packages(tmp_path: Path) -> None:
    out = tmp_path / "x"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExists, match="not a package"):
        write(out, "new", force=True)
    assert (out / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(force: bool, tmp_path: Path) -> None:
    out = tmp_path / "x"
    out.write_text("mine")
    with pytest.raises(OutputExists, match="no folder"):
        write(out, "new", force)
    assert out.read_text() == "mine"


def test_a_dangling_link_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExists):
        write(tmp_path / "x", "new", True)
    assert left(tmp_path) == ["x"]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    write(tmp_path / "x", "new")
    assert (tmp_path / "x" / "manifest.json").read_text() == "new"
    assert left(tmp_path) == ["x"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputUnwritable, match=r"can't write .*file/x"):
        write(tmp_path / "file" / "x", "new")


def test_a_relative_path_and_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("x"), "new")
    assert left(tmp_path) == ["x"]
    with pytest.raises(OutputExists):
        write(Path("."), "new")


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupted_swap_brings_the_old_one_back(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing takes two renames: whichever fails, the old package is there."""
    out = tmp_path / "x"
    write(out, "old")
    calls, replace = [], os.replace

    def flaky(src: Path, dst: Path) -> None:
        calls.append(src)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        replace(src, dst)

    monkeypatch.setattr(codegen_package.os, "replace", flaky)
    with pytest.raises(OutputUnwritable, match="Input/output error"):
        write(out, "new", force=True)
    assert len(calls) >= failing
    assert (out / "manifest.json").read_text() == "old"
    assert left(tmp_path) == ["x"]


def test_what_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "x"
    with pytest.raises(OutputExists), staging(out, False) as folder:
        (folder / "manifest.json").write_text("mine")
        write(out, "theirs")
    assert (out / "manifest.json").read_text() == "theirs"
    assert left(tmp_path) == ["x"]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moec.codegen import emit

    def fail(*args: object, **values: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(emit, "render_python", fail)
    with pytest.raises(MoecError):
        moec.build(moe_layer(), out=tmp_path / "x")
    assert left(tmp_path) == []
