"""What is written: valid, tidy, reproducible Python, and a manifest that lists it."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moec
from tests.codegen.packages import TINY, build, fp8_tiny, moe_layer, tied_tiny

SPECS: dict[str, Callable[[], object]] = {name: (lambda name=name: name) for name in TINY} | {
    "fp8": fp8_tiny,
    "tied": tied_tiny,
    "layer": moe_layer,
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tiny model, optimised and not."""
    folder = tmp_path_factory.mktemp("packages")
    return {
        f"{name}-O{level}": build(spec(), folder / f"{name}-O{level}", level).path
        for name, spec in SPECS.items()
        for level in (0, 2)
    }


def sources(packages: dict[str, Path]) -> dict[Path, str]:
    found = {f: f.read_text(encoding="utf-8") for p in packages.values() for f in sorted(p.rglob("*.py"))}
    assert len(found) > 50
    return found


def test_sources_are_tidy(packages: dict[str, Path]) -> None:
    for file, text in sources(packages).items():
        ast.parse(text)
        lines = text.splitlines()
        assert text.endswith("\n") and not text.endswith("\n\n"), file
        assert "\n\n\n\n" not in text, file
        for number, line in enumerate(lines, 1):
            assert line == line.rstrip(), f"{file}:{number} ends in a space"
            assert len(line) <= 140, f"{file}:{number} has {len(line)} characters"


def unused_imports(text: str) -> set[str]:
    """Names that a source imports and doesn't use."""
    tree = ast.parse(text)
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    return imported - {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_every_import_is_used(packages: dict[str, Path]) -> None:
    for file, text in sources(packages).items():
        if file.name != "__init__.py":
            assert not unused_imports(text), file
    assert unused_imports("import torch\nimport torch.nn.functional as F\nF.silu(1)") == {"torch"}


def loops(text: str) -> list[str]:
    """What each ``for`` of a source runs over."""
    return [
        ast.unparse(n.iter)
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.For | ast.AsyncFor | ast.comprehension)
    ]


def test_no_loop_runs_over_tokens(packages: dict[str, Path]) -> None:
    """Loops over layers, experts and sequences only."""
    over = {loop for text in sources(packages).values() for loop in loops(text)}
    counted = {loop for loop in over if re.fullmatch(r"range\(\d+, \d+\)", loop)}  # layers, experts
    assert over - counted <= {
        "enumerate(zip(bounds, bounds[1:]))",  # experts
        "zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:])",  # sequences
        "zip(block_table, seq_lens.tolist())",
        "enumerate(seq_lens.tolist())",
        "parts",  # where a sequence's pages lie
        "range(0, len(q), rows_at_once)",  # blocks of queries
        "((is_short, short), (~is_short, ~short))",  # parts of a batch
        "matrices",  # experts, at load time
    }


def test_equal_kernels_are_written_once(packages: dict[str, Path]) -> None:
    for package in packages.values():
        bodies = []
        for file in (package / "kernels").glob("*.py"):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.FunctionDef):
                    node.name = "f"
                    bodies.append(file.name + ast.unparse(node))
        assert len(set(bodies)) == len(bodies), package


def test_the_manifest_lists_every_file(packages: dict[str, Path]) -> None:
    for package in packages.values():
        listed = json.loads((package / "manifest.json").read_text())["files"]
        there = {f.relative_to(package).as_posix() for f in package.rglob("*") if f.is_file()}
        assert listed.keys() == there - {"manifest.json", "events.jsonl"}
        for name, digest in listed.items():
            assert hashlib.sha256((package / name).read_bytes()).hexdigest() == digest


def test_a_build_names_no_path_of_the_machine(packages: dict[str, Path]) -> None:
    for package in packages.values():
        for file in package.rglob("*"):
            if file.is_file():
                text = file.read_text(encoding="utf-8")
                assert str(package.parent) not in text, file
                assert str(Path(__file__).parents[2]) not in text, file


@pytest.mark.parametrize("name", ["fp8"])
def test_two_builds_are_the_same_bytes(name: str, packages: dict[str, Path], tmp_path: Path) -> None:
    """But for the event log, which holds times. The second in another process: strings hash otherwise."""
    first = packages[f"{name}-O2"]
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.codegen import packages, test_sources\n"
        "packages.build(test_sources.SPECS[sys.argv[1]](), Path(sys.argv[2]))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, name, str(tmp_path / "again")],
        cwd=root,
        env={"PYTHONHASHSEED": "12345", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again"
    names = sorted(f.relative_to(first) for f in first.rglob("*") if f.is_file() and f.name != "events.jsonl")
    assert names == sorted(
        f.relative_to(again) for f in again.rglob("*") if f.is_file() and f.name != "events.jsonl"
    )
    for file in names:
        assert (first / file).read_bytes() == (again / file).read_bytes(), file


def test_the_golden_package(packages: dict[str, Path], golden: Callable[[str, str], None]) -> None:
    """Read these files: they are what an engineer sees."""
    shown = {
        "deepseek-v3-tiny": ["model.py", "weights.py", "kernels/latent_attention.py", "kernels/route.py"],
        "llama-tiny": ["kernels/paged_attention.py"],
        "layer": ["model.py", "kernels/grouped_linear.py"],
    }
    for name, files in shown.items():
        for file in files:
            text = (packages[f"{name}-O2"] / file).read_text(encoding="utf-8")
            golden(f"{name}.{file.replace('/', '.')}.txt", without_lines(text))


def without_lines(text: str) -> str:
    """The source without line numbers of moec's own blocks, which move when these are edited."""
    return re.sub(r"(src\[\w+\.py):\d+\]", r"\1]", text)


def test_a_package_can_be_moved(packages: dict[str, Path], tmp_path: Path) -> None:
    moved = shutil.copytree(packages["layer-O2"], tmp_path / "elsewhere")
    assert isinstance(moec.load(moved, "random:0"), object)
