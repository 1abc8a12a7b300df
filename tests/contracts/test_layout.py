"""The shape of the repository: what a wheel holds, who imports whom, their length, whose paths they name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.contracts.imports import FOLDERS, violations

ROOT = Path(__file__).resolve().parents[2]
OURS = (*FOLDERS, "moec")
MAX_LINES = 450

# Paths that exist on one machine only: home folders and the like, at the start of an absolute path.
MACHINE_PATH = re.compile(r"(?<![\w.~$})\]>*/-])/(?:root|home|Users|work|workspace|scratch)/\w")


def repository_files() -> list[str]:
    """Every file that is or would be committed, relative to the root, with slashes; links are left out."""
    git = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if git.returncode == 0:
        names = git.stdout.split("\0")[:-1]
    else:  # a copy without git
        names = []
        for folder, folders, files in os.walk(ROOT):
            folders[:] = [f for f in folders if not f.startswith((".venv", ".git", "__pycache__", "build"))]
            names += [(Path(folder) / f).relative_to(ROOT).as_posix() for f in files]
    return sorted(n for n in set(names) if (ROOT / n).is_file() and not (ROOT / n).is_symlink())


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def in_package(names: list[str], *endings: str) -> list[str]:
    return [n for n in names if n.startswith(tuple(f"{f}/" for f in OURS)) and n.endswith(endings)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_links_in_moec_are_relative(folder: str) -> None:
    link = ROOT / "moec" / folder
    assert link.is_symlink()
    assert link.readlink().as_posix() == f"../{folder}"
    assert (link / "__init__.py").is_file()


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from a copy, so that nothing is left here and no stale build/ gets in."""
    copy = tmp_path_factory.mktemp("wheel") / "moec"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in OURS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", "out", "-q"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "out").glob("moec-*.whl")
    with zipfile.ZipFile(wheel) as z:
        return set(z.namelist())


def test_the_wheel_holds_only_moec(wheel_names: set[str]) -> None:
    stray = [n for n in wheel_names if not re.match(r"moec/|moec-[^/]+\.dist-info/", n)]
    assert not stray, f"a wheel that installs more than moec shadows other people's packages: {stray}"


def test_the_wheel_holds_all_of_moec(wheel_names: set[str]) -> None:
    tuning = [n for n in repository_files() if n.startswith("codegen/tuning/")]
    names = [*in_package(repository_files(), ".py", ".jinja"), *tuning, "moec/py.typed"]
    wanted = {n if n.startswith("moec/") else f"moec/{n}" for n in names}
    assert {f"moec/{f}/__init__.py" for f in FOLDERS} <= wanted
    lacking = sorted(wanted - wheel_names)
    assert not lacking, f"no __init__.py in their folder, or not covered by package-data: {lacking}"


def test_imports_run_one_way() -> None:
    names = [n for n in repository_files() if n.endswith(".py")]
    assert "tests/contracts/test_layout.py" in names
    found = [v for n in names for v in violations(n, read(n))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moec/cli.py", "import ir"),
        ("tests/ir/test_x.py", "from models.deepseek import spec"),
        ("ir/graph.py", "import passes.manager as m"),
        ("ir/graph.py", "from moec.passes import manager"),
        ("ir/graph.py", "from moec import models"),
        ("ir/graph.py", "import moec"),
        ("ir/graph.py", "from ..runtime import cache"),
        ("ir/ops/linear.py", "from ...codegen import emit"),
        ("models/dsl.py", "from moec.passes import pipelines"),
        ("models/intake.py", "def f():\n    import transformers"),
        ("passes/fp8.py", "from moec.models import deepseek"),
        ("passes/fp8.py", "from moec.codegen.select import pick"),
        ("codegen/emit.py", "from moec.passes import manager"),
        ("codegen/emit.py", "def f():\n    from moec.models import deepseek"),
        ("codegen/emit.py", "importlib.import_module(f'moec.models.{name}')"),
        ("runtime/load.py", "from moec.ir import types"),
        ("runtime/load.py", "from moec import build"),
        ("runtime/load.py", "import rich"),
        ("moec/errors.py", "from moec.config import BuildOptions"),
        ("moec/config.py", "from . import cli"),
        ("moec/cli.py", "from transformers import AutoConfig"),
    ],
)
def test_an_import_against_the_rules_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ir/graph.py", "import networkx\nfrom . import types\nfrom moec.errors import MoecError"),
        ("ir/__init__.py", "from .graph import Module\nfrom moec.ir.text import parse"),
        ("ir/__init__.py", "from .. import errors"),
        ("models/dsl.py", "from moec.ir import builder\nfrom moec.models.blocks import MLA"),
        ("passes/fp8.py", "from moec import ir\nfrom moec.config import BuildOptions"),
        ("codegen/emit.py", "import jinja2\nfrom moec import __version__\nfrom moec.ir import cost"),
        ("runtime/load.py", "import json, torch\nfrom safetensors import safe_open\nfrom moec import config"),
        ("runtime/load.py", "from .cache import Cache\nfrom cuda.bindings import driver"),
        ("moec/cli.py", "from moec import codegen, ir, models, passes, runtime"),
        ("moec/config.py", "import dataclasses"),
        ("moec/integrations/hf.py", "import transformers"),
        ("tests/models/test_x.py", "import transformers\nfrom moec.models import deepseek"),
        ("examples/pydoc/train.py", "from transformers import DeepseekV3Config"),
    ],
)
def test_an_import_by_the_rules_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_files_stay_short() -> None:
    lines = {n: read(n).count("\n") for n in in_package(repository_files(), ".py", ".jinja")}
    assert lines
    long = {n: c for n, c in lines.items() if c > MAX_LINES}
    assert not long, f"one idea a file, about 400 lines at most: {long}"


def test_no_file_names_a_machine() -> None:
    found = []
    for name in repository_files():
        data = (ROOT / name).read_bytes()
        if b"\0" in data[:8192]:
            continue  # binary
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_machine_paths_are_told_from_others() -> None:
    one = "/".join(["", "root", "model"])
    assert MACHINE_PATH.search(f'weights = "{one}"')
    assert MACHINE_PATH.search(one)
    assert not MACHINE_PATH.search(f"https://example.org{one}")
    assert not MACHINE_PATH.search(f"build{one}")
    assert not MACHINE_PATH.search("/usr/local/cuda")
