"""Weights from folders, mappings and seeds; what is wrong with them is said before anything is read."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import moec
import moec.models as models
from moec.errors import (
    BadInput,
    MoecError,
    PickleRefused,
    WeightsBroken,
    WeightsExtra,
    WeightsMisshapen,
    WeightsMissing,
    WeightsUnreadable,
)
from moec.runtime.checkpoint import Folder, InMemory, Random, expand, open_checkpoint
from moec.runtime.weights import Weights, check, convertible

Tensors = dict[str, torch.Tensor]
NORM = "model.norm.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
IDS = torch.tensor([[1, 2, 3]])


def save_shards(folder: Path, tensors: Tensors, shards: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def save(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


# Sources.
@pytest.mark.parametrize("how", [save, save_shards, lambda folder, tensors: tensors])
def test_all_sources_give_the_same_model(
    how: Callable[..., Any], package: moec.Built, checkpoint: Tensors, model: Any, tmp_path: Path
) -> None:
    loaded = moec.load(package, how(tmp_path / "w", checkpoint))
    assert loaded.weights.keys() == model.weights.keys()
    for name, tensor in model.weights.items():
        assert torch.equal(loaded.weights[name], tensor), name
    assert torch.equal(loaded(IDS), model(IDS))


def test_a_folder_given_as_text(package: moec.Built, checkpoint: Tensors, tmp_path: Path) -> None:
    assert moec.load(str(package.path), str(save(tmp_path / "w", checkpoint))).name == "deepseek-v3-tiny"


def test_progress_counts_parameters(package: moec.Built, model: Any) -> None:
    seen: list[tuple[int, int]] = []
    moec.load(package, "random:0", progress=lambda done, total: seen.append((done, total)))
    total = len(model.weights)
    assert seen == [(i + 1, total) for i in range(total)]


def test_a_caller_s_tensors_are_not_changed(package: moec.Built, checkpoint: Tensors) -> None:
    given_ones = {n: t.clone().requires_grad_() for n, t in checkpoint.items()}
    loaded = moec.load(package, given_ones)
    loaded.generate(IDS, max_new_tokens=2)
    assert all(torch.equal(t.detach(), checkpoint[n]) for n, t in given_ones.items())
    assert not loaded(IDS).requires_grad


# Seeds.
ENTRIES = [
    {"name": "a.*.w", "ranges": [[0, 2]], "dtype": "f32", "shape": [4, 100], "kind": "matrix"},
    {"name": "norm", "ranges": [], "dtype": "f32", "shape": [500], "kind": "norm"},
    {"name": "bias", "ranges": [], "dtype": "bf16", "shape": [500], "kind": "bias"},
    {"name": "q", "ranges": [], "dtype": "f8e4m3", "shape": [50, 10], "kind": "matrix"},
    {"name": "s", "ranges": [], "dtype": "f32", "shape": [500], "kind": "scale"},
]


@given(st.integers(0, 2**31 - 1), st.permutations(range(5)), st.integers(1, 5))
def test_a_seed_and_a_name_make_a_tensor(seed: int, order: list[int], count: int) -> None:
    whole, part = Random(seed, ENTRIES), Random(seed, [ENTRIES[i] for i in order[:count]])
    for name in part.names():
        assert torch.equal(part.tensor(name).float(), whole.tensor(name).float())
        assert not torch.equal(
            part.tensor(name).float(), Random((seed + 1) % 2**31, ENTRIES).tensor(name).float()
        )
        assert part.tensor(name).dtype == part.dtype(name)
        assert tuple(part.tensor(name).shape) == part.shape(name)


def test_random_tensors_are_of_their_kind() -> None:
    drawn = Random(7, ENTRIES)
    assert not torch.equal(drawn.tensor("a.0.w"), drawn.tensor("a.1.w"))
    assert float(drawn.tensor("a.0.w").std()) == pytest.approx(0.1, rel=0.2)
    assert float(drawn.tensor("norm").mean()) == pytest.approx(1, abs=0.05)
    assert float(drawn.tensor("bias").float().std()) == pytest.approx(0.1, rel=0.2)
    assert float(drawn.tensor("q").float().std()) == pytest.approx(1, rel=0.2)
    assert drawn.tensor("s").min() > 0


@pytest.mark.parametrize("weights", ["random:", "random:x", "random:-1", "random:1.5", f"random:{2**31}"])
def test_a_bad_seed(package: moec.Built, weights: str) -> None:
    with pytest.raises(BadInput, match="random:0"):
        moec.load(package, weights)


@pytest.mark.parametrize("weights", [None, 3, [("a", torch.zeros(1))], {"a": [1.0]}, {1: torch.zeros(1)}])
def test_what_is_no_weights(package: moec.Built, weights: Any) -> None:
    with pytest.raises(BadInput, match="M0601"):
        moec.load(package, weights)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=3))
def test_patterns_expand_in_order(ranges: list[tuple[int, int]]) -> None:
    spans = [[first, first + more] for first, more in ranges]
    name = ".".join(["l", *["*"] * len(spans)])
    found = list(expand({"name": name, "ranges": spans}))
    assert found == sorted(set(found))
    want = 1
    for first, last in spans:
        want *= last - first + 1
    assert len(found) == want


# What is wrong with a checkpoint.
class Unread(InMemory):
    """Fails when a tensor is read."""

    def tensor(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read before the check was over")


def without(tensors: Tensors, *names: str) -> Tensors:
    return {n: t for n, t in tensors.items() if n not in names}


def _case(error: type[MoecError], words: str, change: Callable[[Tensors], Tensors]) -> Any:
    return pytest.param(error, words, change, id=words)


CASES = [
    _case(WeightsMissing, NORM, lambda t: without(t, NORM)),
    _case(WeightsMissing, EXPERT, lambda t: without(t, EXPERT)),
    _case(WeightsMissing, "and 5 more", lambda t: without(t, *sorted(t)[:8])),
    _case(
        WeightsMissing,
        "there, but not of this model: norm.weight",
        lambda t: {**without(t, NORM), "norm.weight": t[NORM]},
    ),
    _case(WeightsExtra, "model.extra", lambda t: {**t, "model.extra": torch.zeros(1)}),
    _case(
        WeightsExtra,
        "experts.12.up_proj",
        lambda t: {**t, EXPERT.replace("3.up", "12.up"): t[EXPERT].clone()},
    ),
    _case(WeightsMisshapen, f"{EXPERT} is [48, 20]", lambda t: {**t, EXPERT: t[EXPERT].t().contiguous()}),
    _case(WeightsMisshapen, "the model's is [48]", lambda t: {**t, NORM: torch.zeros(47)}),
    _case(WeightsMisshapen, f"{NORM} is int64", lambda t: {**t, NORM: torch.zeros(48, dtype=torch.int64)}),
    _case(WeightsMisshapen, "is bool", lambda t: {**t, NORM: torch.zeros(48, dtype=torch.bool)}),
    _case(
        WeightsMisshapen,
        f"{EXPERT} is float8_e4m3fn",
        lambda t: {**t, EXPERT: t[EXPERT].to(torch.float8_e4m3fn)},
    ),
]


@pytest.mark.parametrize(("error", "words", "change"), CASES)
def test_a_wrong_checkpoint_is_refused_unread(
    error: type[MoecError], words: str, change: Any, package: moec.Built, checkpoint: Tensors, tmp_path: Path
) -> None:
    tensors = change(checkpoint)
    manifest = package.manifest
    wanted = {n: e for e in manifest["checkpoint"] for n in expand(e)}
    for source in (Unread(tensors), Folder(save(tmp_path / "w", tensors))):
        with pytest.raises(error) as caught:
            check(source, wanted, manifest["ignored"])
        assert words in str(caught.value)
        assert error.code in str(caught.value)
    with pytest.raises(error):
        moec.load(package, tmp_path / "w")


def test_build_checks_weights_from_their_headers(checkpoint: Tensors, tmp_path: Path) -> None:
    wrong = save(tmp_path / "w", {**checkpoint, NORM: torch.zeros(48, dtype=torch.int32)})
    with pytest.raises(WeightsMisshapen, match=NORM):
        moec.build("deepseek-v3-tiny", out=tmp_path / "x", weights=wrong)
    assert not (tmp_path / "x").exists()


def test_what_a_model_ignores_may_be_there(package: moec.Built, checkpoint: Tensors) -> None:
    """Multi-token prediction lies behind the last layer, 2."""
    moec.load(package, {**checkpoint, "model.layers.3.eh_proj.weight": torch.zeros(3)})
    with pytest.raises(WeightsExtra, match=r"model\.layers\.4\.eh_proj"):
        moec.load(package, {**checkpoint, "model.layers.4.eh_proj.weight": torch.zeros(3)})
    with pytest.raises(WeightsExtra, match=r"x\.model\.layers\.3\."):
        moec.load(package, {**checkpoint, "x.model.layers.3.eh_proj.weight": torch.zeros(3)})


# Dtypes.
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_are_converted_by_their_values(
    stored: torch.dtype, package: moec.Built, checkpoint: Tensors
) -> None:
    loaded = moec.load(package, {n: t.to(stored) for n, t in checkpoint.items()})
    assert torch.equal(loaded.weights[NORM], checkpoint[NORM].to(stored).float())
    assert all(t.dtype == torch.float32 for t in loaded.weights.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_scale_that_is_not_finite_is_named(bad: float, fp8: bool, tmp_path: Path) -> None:
    """Of a checkpoint in fp8, whether its weights stay so or are dequantised when they are loaded."""
    mlp = models.MoE(models.Router(4, 2), models.Experts(4, 8))
    layer = models.Decoder(models.GQA(heads=2, kv_heads=1, head_dim=8), mlp)
    model = models.Model(vocab=11, hidden=16, layers=[layer], quantization=models.BlockFP8((4, 4)))
    built = moec.build(model, out=tmp_path / "package", options=moec.BuildOptions(fp8=fp8))
    entries = json.loads((built.path / "manifest.json").read_text())["checkpoint"]
    seeded = Random(0, entries)
    tensors = {name: seeded.tensor(name) for name in seeded.names()}
    moec.load(built, tensors)
    name = "model.layers.0.mlp.experts.3.up_proj.weight_scale_inv"
    tensors[name][1, 2] = bad
    with pytest.raises(WeightsBroken, match=rf"M0406.*{name}\[1, 2\] is {bad} in .*: a scale is finite"):
        moec.load(built, tensors)
    where = save(tmp_path / "folder", tensors)
    with pytest.raises(WeightsBroken, match=rf"{name}.*{where / 'model.safetensors'}"):
        moec.load(built, where)


def test_only_floats_convert_and_never_fp8() -> None:
    fp8, f32, bf16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16
    assert convertible(f32, bf16) and convertible(bf16, f32) and convertible(fp8, fp8)
    for found, wanted in [(fp8, f32), (f32, fp8), (torch.int32, f32), (f32, torch.int32), ("F4", f32)]:
        assert not convertible(found, wanted)
    assert not convertible(torch.float8_e5m2, fp8)


# Files.
def header(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


BROKEN = {
    "empty": b"",
    "short": b"\x01\x02",
    "no JSON": struct.pack("<Q", 4) + b"nope",
    "huge header": struct.pack("<Q", 2**62) + b"{}",
    "offsets": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),
    "backwards": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, b"\0" * 16),
    "dtype": header({"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(kind: str, package: moec.Built, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(BROKEN[kind])
    with pytest.raises(WeightsUnreadable, match=r"M0401.*model\.safetensors"):
        moec.load(package, tmp_path)


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_file_is_named(
    keep: float, package: moec.Built, checkpoint: Tensors, tmp_path: Path
) -> None:
    file = save(tmp_path / "w", checkpoint) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(WeightsUnreadable, match="truncated"):
        moec.load(package, tmp_path / "w")


def test_a_folder_that_looks_like_a_file(package: moec.Built, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(WeightsUnreadable, match=r"model\.safetensors"):
        moec.load(package, tmp_path)


@pytest.mark.parametrize("what", ["nothing", "missing", "file"])
def test_no_weights_there(what: str, package: moec.Built, tmp_path: Path) -> None:
    path = tmp_path / "w"
    if what == "nothing":
        path.mkdir()
    if what == "file":
        path.write_text("x")
    with pytest.raises(WeightsUnreadable, match="w"):
        moec.load(package, path)


def test_a_tensor_in_two_shards(package: moec.Built, checkpoint: Tensors, tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "w", checkpoint)
    save_file({NORM: checkpoint[NORM]}, folder / "z.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        WeightsUnreadable, match=rf"{NORM} is in both model-0000\d-of-00002\.safetensors and z\."
    ):
        moec.load(package, folder)


def test_an_index_that_lists_a_shard_that_is_missing(
    package: moec.Built, checkpoint: Tensors, tmp_path: Path
) -> None:
    folder = save_shards(tmp_path / "w", checkpoint)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsUnreadable, match="model-00002-of-00002"):
        moec.load(package, folder)


@pytest.mark.parametrize(
    "file", ["../w2/model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", 3, None, ["a"]]
)
def test_an_index_can_t_lead_out_of_the_folder(
    file: Any, package: moec.Built, checkpoint: Tensors, tmp_path: Path
) -> None:
    save(tmp_path / "w2", checkpoint)
    folder = save(tmp_path / "w", checkpoint)
    (folder / "a").mkdir()
    (folder / "model.safetensors").rename(folder / "a" / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: file}}))
    with pytest.raises(WeightsUnreadable, match="index"):
        moec.load(package, folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}', '"x"', "\udcff"]
)
def test_an_index_that_is_none(text: str, package: moec.Built, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(WeightsUnreadable, match="index"):
        moec.load(package, tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.pkl", "x.ckpt"])
def test_pickles_are_refused_unread(name: str, package: moec.Built, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for weights in (tmp_path, tmp_path / name, str(tmp_path / name)):
        with pytest.raises(PickleRefused, match=rf"M0405.*{name}"):
            moec.load(package, weights)


def test_a_pickle_beside_safetensors_is_passed_over(
    package: moec.Built, checkpoint: Tensors, tmp_path: Path
) -> None:
    (save(tmp_path / "w", checkpoint) / "training_args.bin").write_bytes(pickle.dumps(Bomb()))
    assert moec.load(package, tmp_path / "w").name


def test_a_pickle_named_safetensors_is_not_read(package: moec.Built, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightsUnreadable):
        moec.load(package, tmp_path)


# Parameters.
@given(st.lists(st.sampled_from(["a.0.w", "a.1.w", "a.10.w", "b.w", "a.1.c.w"]), unique=True))
def test_scopes_hold_what_is_below_them(names: list[str]) -> None:
    weights = Weights((n, torch.tensor([float(i)])) for i, n in enumerate(names))
    for scope in ("a.1.", "a.", "b.", "c."):
        want = {n.removeprefix(scope): weights[n] for n in names if n.startswith(scope)}
        assert dict(weights.at(scope)) == want
        assert weights.at(scope) is weights.at(scope)
    if "a.1.c.w" in names:
        assert weights.at("a.").at("1.c.")["w"] is weights["a.1.c.w"]


def test_a_tensor_under_two_names_counts_once() -> None:
    tensor = torch.zeros(10)
    assert Weights([("a", tensor), ("b", tensor), ("c", torch.zeros(5))]).nbytes == 60


def test_open_checkpoint_takes_any_mapping() -> None:
    from types import MappingProxyType

    assert list(open_checkpoint(MappingProxyType({"a": torch.zeros(1)}), []).names()) == ["a"]
