"""Quantised values as packages hold them: bit for bit the reference's, and as the checkpoint stores them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import WeightsMisshapen
from moec.ir import Function, Interpreter, Module, TensorType
from moec.ir.op import op_class
from moec.ir.types import DTYPES, bf16, f16, f32, symbol
from moec.runtime.manifest import flaw
from moec.runtime.values import Scaled
from moec.runtime.weights import _Memory, _placed
from tests.codegen.emission import Emitted, emitted, forward

N = symbol("N")
F8 = DTYPES["f8e4m3"]
BAD = [float("nan"), float("inf"), -float("inf"), 0.0, 1e30]


def bits(x: torch.Tensor) -> tuple[tuple[int, ...], list[int]]:
    return tuple(x.shape), x.flatten().contiguous().view(torch.uint8).tolist() if x.numel() else []


@given(
    dtype=st.sampled_from([f32, bf16, f16]),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 9)),
    lead=st.sampled_from([None, 1, 2]),
    block=st.tuples(st.sampled_from([0, 1, 2, 128]), st.sampled_from([0, 1, 4, 128])),
    scale=st.sampled_from(["fp32", "ue8m0"]),
    known=st.booleans(),
    bad=st.sampled_from(BAD),
    seed=st.integers(0, 9),
)
def test_quant_is_the_reference_bit_for_bit(dtype, shape, lead, block, scale, known, bad, seed) -> None:  # type: ignore[no-untyped-def]
    """Rows known and not, of stacks too; zeros, outliers and what isn't finite among them."""
    rows, columns = (max(shape[0], 1) if known else shape[0]), shape[1]
    size = ((lead,) if lead else ()) + (rows if known else N, columns)
    x = torch.randn(
        (*((lead,) if lead else ()), rows, columns), generator=torch.Generator().manual_seed(seed)
    )
    if x.numel():
        x.view(-1)[seed % x.numel()] = bad
    x = x.to(dtype.torch)
    module = forward(lambda b, x: b.quant(x, block=block, scale=scale), TensorType(dtype, size))
    (want,) = Interpreter(module, {}).run("forward", x)
    (have,) = emitted(module, {}, x)
    assert isinstance(have, Scaled) and bits(have.q) == bits(want.q) and bits(have.scale) == bits(want.scale)


def native() -> Module:
    """A weight stored in fp8 whose own scaled form is a parameter."""
    module = Module("tests", "cpu", {"N": 8})
    load = module.add(Function("weights"))
    q = load.param("w", TensorType(F8, (6, 8)))
    s = load.param("w_scale_inv", TensorType(f32, (2, 2)))
    (pair,) = load.create(op_class("scaled")([q, s], {"block": (4, 4)})).results
    load.create(op_class("bind")([pair], {"param": "w.q"}))
    load.ret()
    function = module.add(Function("forward", [("x", TensorType(f32, (N, 8)))]))
    w = function.param("w.q", TensorType(F8, (6, 8), scale=(4, 4)))
    (x,) = function.create(op_class("quant")([function.args[0]], {"block": (1, 4)})).results
    function.ret(*function.create(op_class("linear")([x, w], {"acc": f32})).results)
    return module


def stored() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 8, generator=generator).mul(50).to(torch.float8_e4m3fn)
    return {"w": q, "w_scale_inv": torch.rand(2, 2, generator=generator) + 0.5}


def test_a_native_weight_reaches_its_kernel_as_it_is_stored(tmp_path: Path) -> None:
    weights = stored()
    package = Emitted(tmp_path, native(), weights)
    (entry,) = package.manifest["parameters"]
    assert (entry["dtype"], entry["shape"], entry["scale"], entry["bound"]) == (
        "f8e4m3",
        [6, 8],
        [2, 2],
        True,
    )
    kinds = {e["name"]: e["kind"] for e in package.manifest["checkpoint"]}
    assert kinds == {"w": "matrix", "w_scale_inv": "scale"}  # by which random weights are drawn
    loaded = package.weights["w.q"]
    assert isinstance(loaded, Scaled) and bits(loaded.q) == bits(weights["w"])
    assert bits(loaded.scale) == bits(weights["w_scale_inv"])
    assert package.weights.nbytes == 48 + 16 and package.weights.at("w.")["q"] is loaded
    assert "emulation" in (tmp_path / "kernels" / "linear.py").read_text(encoding="utf-8")
    assert ".q, x_q.scale" not in (tmp_path / "weights.py").read_text(encoding="utf-8")


def test_a_parameter_without_its_scales_is_refused() -> None:
    entry = {"shape": [2, 2], "dtype": "f8e4m3", "scale": [1, 1]}
    q, scale = torch.zeros(2, 2).to(torch.float8_e4m3fn), torch.ones(1, 1)
    assert isinstance(_placed("w", Scaled(q, scale), entry, _Memory("cpu")), Scaled)
    for wrong in (q, Scaled(q, torch.ones(2, 1)), Scaled(q[:1], scale)):
        with pytest.raises(WeightsMisshapen, match=r"w became .* not \[2, 2\] with scales \[1, 1\]"):
            _placed("w", wrong, entry, _Memory("cpu"))
    with pytest.raises(WeightsMisshapen, match="with scales None"):
        _placed("w", Scaled(q, scale), {"shape": [2, 2], "dtype": "f8e4m3"}, _Memory("cpu"))


def test_a_manifest_s_scales_are_sizes(tmp_path: Path) -> None:
    manifest = Emitted(tmp_path, native(), stored()).manifest
    assert flaw(manifest) is None
    manifest["parameters"][0]["scale"] = "2x2"
    assert flaw(manifest) == "has a wrong 'parameters'"
