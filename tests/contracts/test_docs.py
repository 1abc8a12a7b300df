"""What the documents say is true: their code runs, the files and presets that they name exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from moec import cli
from moec.codegen import TARGETS
from moec.models import PRESETS
from moec.passes import PASSES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)


def blocks(start: str, language: str = "") -> list[str]:
    return [text for kind, text in BLOCKS if kind == language and text.startswith(start)]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def moec(line: str) -> str:
    """stdout of a shell line, ``moec build ...``, which must succeed."""
    words = shlex.split(line, comments=True)
    assert words[0] == "moec", line
    result = CliRunner().invoke(cli.moec, words[1:], prog_name="moec")
    assert result.exception is None and result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"
    return result.stdout


def test_the_tour_runs_as_it_stands(elsewhere: Path) -> None:
    (tour,) = blocks("$ moec build ")
    lines = tour.splitlines()
    assert len(lines) > 5
    for line in lines:
        assert moec(line.removeprefix("$ ")), line


def test_the_python_runs_as_it_stands(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tour,) = blocks("import torch, moec", "python")
    exec(compile(tour, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 8, "one list of tokens for each step"


def test_the_model_of_ones_own_builds(elsewhere: Path) -> None:
    (model,) = blocks("from moec.models import", "python")
    (elsewhere / "my_model.py").write_text(model)
    (command,) = re.findall(r"`(moec build my_model\.py:\w+)`", README)
    assert "mine for cpu" in moec(command)


def test_the_ir_is_what_the_compiler_writes(elsewhere: Path) -> None:
    (shown,) = blocks("%w, %id = route(")
    moec("moec build deepseek-v3 --layers 4 --out package")
    written = [line.strip() for line in moec("moec show package --plain --pass canonicalise").splitlines()]
    for line in shown.splitlines():
        assert line in written, f"the README shows {line!r}, which is in no dump"


def rows(header: str) -> list[list[str]]:
    """The cells of the README's table whose header line begins so."""
    table = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_presets_targets_and_passes_exist() -> None:
    presets = [name for row in rows("| models | presets |") for name in re.findall(r"`([^`]+)`", row[1])]
    assert len(presets) > 10
    assert set(presets) <= set(PRESETS)
    targets = [row[0].strip("`") for row in rows("| target | ")]
    assert targets == list(TARGETS)
    (sentence,) = re.findall(r"^Passes so far: (.*?)\.", README, re.M | re.S)
    assert set(re.findall(r"`([\w-]+)`", sentence)) == set(PASSES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.relative_to(ROOT).as_posix())
def test_files_and_commands_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = [n for n in named_files(text) if not ((ROOT / n).exists() or (document.parent / n).exists())]
    assert not missing
    commands = set(re.findall(r"(?:^\$ |`|^ {2,})moec ([a-z][\w-]*)", text, re.M)) - {"my"}
    assert commands <= set(cli.COMMANDS), f"no such command: {commands - set(cli.COMMANDS)}"


def named_files(text: str) -> set[str]:
    """Paths in backticks that begin with a folder of the repository, and links; no placeholders."""
    here = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0].isalpha()]
    folders = "|".join(name for name in here if name != "build")
    quoted = re.findall(rf"`((?:{folders})/[\w./-]*)(?::\w+)?`", text)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    return {name for name in (*quoted, *links) if "NNN" not in name}


def test_named_files_are_found() -> None:
    text = "`docs/no.md`, `moec/errors.py`, `tests/`, `examples/x/model.py:model` `x/y`"
    text += "[a](b/c.md) [d](https://e.f)"
    assert named_files(text) == {"docs/no.md", "moec/errors.py", "tests/", "examples/x/model.py", "b/c.md"}


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:^|`|^ +)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.M))
        assert named <= targets, f"{document.name}: {named - targets}"
