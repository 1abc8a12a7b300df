"""What the documents show as a command's output is its output."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .test_docs import ROOT, elsewhere, moec

__all__ = ["elsewhere"]  # a fixture

BLOCK = re.compile(r"^```console\n\$ (moec [^\n]*)\n(.*?)^```$", re.M | re.S)
DOCUMENTS = [d for d in sorted((ROOT / "docs").rglob("*.md")) if BLOCK.search(d.read_text(encoding="utf-8"))]


def shown(command: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in moec(command).splitlines())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_output_is_what_the_command_prints(
    document: Path, elsewhere: Path, pytestconfig: pytest.Config
) -> None:
    text = document.read_text(encoding="utf-8")
    if pytestconfig.getoption("--update-golden"):
        text = BLOCK.sub(lambda block: f"```console\n$ {block[1]}\n{shown(block[1])}```", text)
        document.write_text(text, encoding="utf-8")
    for command, output in BLOCK.findall(text):
        assert output == shown(command), f"{document.name} shows otherwise: $ {command}"


def test_the_guide_shows_something() -> None:
    assert {d.name for d in DOCUMENTS} >= {"tuning.md", "v3-decode.md"}
