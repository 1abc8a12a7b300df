"""Opening a package: what isn't the one that was built is refused before it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.errors import BadInput, DeviceUnavailable, NotAPackage, PackageTampered
from moec.runtime.manifest import seal
from moec.runtime.package import Package, read_manifest

X = torch.linspace(-1, 1, 24).view(3, 8)


@pytest.fixture
def copy(layer_package: Path, tmp_path: Path) -> Path:
    """A package that a test may spoil."""
    return shutil.copytree(layer_package, tmp_path / "copy")


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


# What is in it.
@pytest.mark.parametrize(
    "name", ["model.py", "kernels/grouped_linear.py", "weights.py", "__init__.py", "ir/000_naive.moec"]
)
def test_a_changed_file_is_refused(name: str, copy: Path) -> None:
    append(copy / name, "\n")
    with pytest.raises(PackageTampered, match=rf"M0504.*{name}"):
        moec.load(copy, "random:0")


@pytest.mark.parametrize("name", ["model.py", "kernels/grouped_linear.py"])
def test_a_missing_file_is_refused(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(PackageTampered, match=rf"{name} is missing"):
        moec.load(copy, "random:0")


@pytest.mark.parametrize(
    "name",
    [
        "torch.py",
        "kernels/extra.py",
        "kernels/__pycache__/combine.cpython-311.pyc",
        "x.so",
        "kernels/torch/__init__.py",
    ],
)
def test_a_stray_file_that_python_could_run_is_refused(name: str, copy: Path) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("raise SystemExit('ran')")
    with pytest.raises(PackageTampered, match="not in its manifest"):
        moec.load(copy, "random:0")


def test_other_files_may_lie_there(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    (copy / "report.html").write_text("mine")
    moec.load(copy, "random:0")


def test_nothing_runs_before_all_is_verified(copy: Path) -> None:
    """The first file that would run is whole; the last one isn't."""
    append(copy / "model.py", "raise SystemExit('ran')")
    with pytest.raises(PackageTampered):
        moec.load(copy, "random:0")
    assert not [name for name in sys.modules if name.startswith("moec_package_") and _of(name) == str(copy)]


def _of(module: str) -> str:
    return str(Path(getattr(sys.modules[module], "__file__", "") or "").parent)


def test_an_edited_package_loads_on_request(copy: Path, layer: Any) -> None:
    kernel = copy / "kernels" / "combine.py"
    kernel.write_text(kernel.read_text().replace("return y.squeeze(1)", "return 2 * y.squeeze(1)"))
    edited = moec.load(copy, "random:0", verify=False)
    assert torch.equal(edited(X), 2 * layer(X))


def test_an_edit_shows_at_the_next_load(copy: Path, layer: Any) -> None:
    """In one process, again and again: no module of an earlier load is used again."""
    kernel = copy / "kernels" / "combine.py"
    text = kernel.read_text()
    for factor in (2, 3, 4):
        kernel.write_text(text.replace("return y.squeeze(1)", f"return {factor} * y.squeeze(1)"))
        loaded = moec.load(copy, "random:0", verify=False)
        assert torch.equal(loaded(X), factor * layer(X))
        del loaded


def test_two_packages_side_by_side(package: moec.Built, layer_package: Path, model: Any, layer: Any) -> None:
    first, second, again = (moec.load(p, "random:0") for p in (package, layer_package, package))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(first(ids), model(ids))
    assert torch.equal(second(X), layer(X))
    assert torch.equal(again(ids), model(ids))


def test_loading_leaves_nothing_behind(copy: Path) -> None:
    before = sorted(p.relative_to(copy) for p in copy.rglob("*"))
    moec.load(copy, "random:0")(X)
    assert sorted(p.relative_to(copy) for p in copy.rglob("*")) == before
    moec.load(copy, "random:0")


def test_loading_never_unpickles(package: moec.Built, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    moec.load(package, "random:0")


# What is no package.
def test_what_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(NotAPackage, match="M0503"):
            moec.load(path, "random:0")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"format": 1}',
        '{"format": 1, "files": 3}',
        '{"format": 1, "files": {}}',
    ],
)
def test_a_manifest_that_is_none(text: str, copy: Path) -> None:
    (copy / "manifest.json").write_text(text)
    for verify in (True, False):
        with pytest.raises(NotAPackage, match="manifest"):
            moec.load(copy, "random:0", verify=verify)


def test_a_manifest_that_is_no_text(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(NotAPackage, match="manifest"):
        moec.load(copy, "random:0")


LACKING = object()


def edit(copy: Path, **changes: Any) -> None:
    """Changes fields of the manifest, and its digest with them."""
    manifest = read_manifest(copy) | changes
    manifest = {k: v for k, v in manifest.items() if v is not LACKING}
    (copy / "manifest.json").write_text(json.dumps(seal(manifest)))


@pytest.mark.parametrize("found", [0, 2, "1", 1.5])
def test_another_format_is_refused_with_advice(found: Any, copy: Path) -> None:
    edit(copy, format=found)
    with pytest.raises(NotAPackage, match="reads format 1: build it again"):
        moec.load(copy, "random:0")


@pytest.mark.parametrize("key", ["entries", "target", "checkpoint", "dtype", "ignored"])
def test_a_manifest_that_lacks_something(key: str, copy: Path) -> None:
    edit(copy, **{key: LACKING})
    with pytest.raises(NotAPackage, match=key):
        moec.load(copy, "random:0")


def test_a_package_without_an_entry(copy: Path) -> None:
    edit(copy, entries={})
    with pytest.raises(NotAPackage, match="no entry"):
        moec.load(copy, "random:0")


def test_files_that_the_manifest_forgets(copy: Path) -> None:
    edit(copy, files={})
    with pytest.raises(PackageTampered, match="not in its manifest"):
        moec.load(copy, "random:0")


def test_the_builder_seals_as_the_runtime_does(package: moec.Built, layer_package: Path) -> None:
    for folder in (package.path, layer_package):
        written = json.loads((folder / "manifest.json").read_text())
        assert seal(written) == written
        assert seal(written | {"name": "other"})["digest"] != written["digest"]


@pytest.mark.parametrize(
    "change", [{"vocab": 9999}, {"name": "other"}, {"max_positions": 1}, {"device": "cuda"}, {"eos": [3]}]
)
def test_a_changed_manifest_is_refused(change: dict[str, Any], package: moec.Built, tmp_path: Path) -> None:
    copy = shutil.copytree(package.path, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(PackageTampered, match=r"manifest\.json isn't the manifest that was built"):
        moec.load(copy, "random:0")
    (copy / "manifest.json").write_text(json.dumps(manifest, indent=3, sort_keys=True))
    moec.load(copy, "random:0")  # what it says is what counts


CACHE = {"name": "kv", "dtype": "f32", "entry": [2, 4], "page": 16, "layers": [0]}
TENSOR = {"name": "a.*", "ranges": [[0, 1]], "dtype": "f32", "shape": [2], "bound": True, "kind": "matrix"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("caches", 3),
        ("caches", [CACHE | {"page": "x"}]),
        ("caches", [CACHE | {"page": 0}]),
        ("caches", [CACHE | {"dtype": "zz"}]),
        ("caches", [CACHE | {"more": 1}]),
        ("caches", [{"name": "kv"}]),
        ("vocab", None),
        ("vocab", "256"),
        ("max_positions", None),
        ("parameters", [TENSOR | {"dtype": "zz"}]),
        ("parameters", [TENSOR | {"ranges": []}]),
        ("parameters", [TENSOR | {"ranges": [[0]]}]),
        ("parameters", {}),
        ("checkpoint", None),
        ("checkpoint", [TENSOR | {"shape": 3}]),
        ("checkpoint", [TENSOR | {"name": 3}]),
        ("ignored", [["(", "x"]]),
        ("ignored", ["x"]),
        ("name", 3),
        ("dtype", "q"),
        ("dtype", ["f32"]),
        ("hidden", True),
        ("entries", []),
        ("entries", {"step": 3}),
        ("files", {"a": 1}),
        ("eos", 1),
        ("digest", 7),
    ],
)
def test_a_field_of_the_wrong_type(field: str, value: Any, package: moec.Built, tmp_path: Path) -> None:
    copy = shutil.copytree(package.path, tmp_path / "copy")
    manifest = seal(json.loads((copy / "manifest.json").read_text()) | {field: value})
    manifest |= {"digest": value} if field == "digest" else {}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for verify in (True, False):
        with pytest.raises(NotAPackage, match=rf"manifest\.json .*'{field}'"):
            moec.load(copy, "random:0", verify=verify)


def test_a_manifest_that_agrees_with_itself_but_not_with_the_code(
    package: moec.Built, tmp_path: Path
) -> None:
    copy = shutil.copytree(package.path, tmp_path / "copy")
    edit(copy, checkpoint=[])
    with pytest.raises(NotAPackage, match="load program and its manifest disagree"):
        moec.load(copy, "random:0")


def test_a_file_that_verify_would_have_missed(copy: Path) -> None:
    (copy / "weights.py").unlink()
    with pytest.raises(NotAPackage, match=r"weights\.py is missing"):
        moec.load(copy, "random:0", verify=False)


@pytest.mark.parametrize("device", ["cuda", "interpret", "tpu"])
def test_another_device_than_it_was_built_for(device: str, layer_package: Path) -> None:
    with pytest.raises(DeviceUnavailable, match=f"built for cpu and can't run on {device!r}"):
        moec.load(layer_package, "random:0", device=device)
    assert moec.load(layer_package, "random:0", device="cpu")


def test_a_device_of_pytorch_s(layer_package: Path) -> None:
    assert moec.load(layer_package, "random:0", device=torch.device("cpu")).device == "cpu"


@pytest.mark.parametrize(
    ("given", "name"),
    [({"device": 3}, "device"), ({"package": None}, "package"), ({"package": 3}, "package")],
)
def test_arguments_of_the_wrong_type(given: dict[str, Any], name: str, layer_package: Path) -> None:
    with pytest.raises(BadInput, match=f"^error.*{name} is"):
        moec.load(**{"package": layer_package, "weights": "random:0"} | given)


def test_module_names_are_never_used_again(layer_package: Path) -> None:
    assert Package(layer_package)._parent != Package(layer_package)._parent


# The runtime alone.
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("moec.") and name.split(".")[1] in ("ir", "models", "passes", "codegen", "driver"):
            raise ImportError(f"{name} is not part of the runtime")

sys.meta_path.insert(0, Refuse())
import torch
from moec import runtime
from moec.errors import BadInput

model = runtime.load(sys.argv[1], "random:0")
print(model.generate([[1, 2, 3], [4]], max_new_tokens=3, eos_token_id=0))
print(runtime.load(sys.argv[2], "random:0")(torch.zeros(2, 8)).shape)
ours = ("moec.runtime", "moec.errors")
others = sorted(m for m in sys.modules if m.startswith("moec.") and not m.startswith(ours))
print("others:", others)
"""


def test_a_package_runs_with_the_runtime_alone(package: moec.Built, layer_package: Path, model: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(package.path), str(layer_package)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    want = model.generate([[1, 2, 3], [4]], max_new_tokens=3, eos_token_id=0)
    assert done.stdout.splitlines() == [str(want), "torch.Size([2, 8])", "others: []"]
