"""Types: text both ways, sizes in bytes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import IRError, ParseError
from moec.ir import OPS, DType, Range, TensorType
from moec.ir.attrs import BLOCK, FLOAT, INT, RANGE, STR, SYMBOL, Kind
from moec.ir.types import DTYPES, Type, as_dim, bf16, f32, format_dim, i64, parse_dim, parse_type, symbol
from tests.strategies_types import ATTRIBUTES, dims, tensor_types, types

N = symbol("N")
f8, f4 = DTYPES["f8e4m3"], DTYPES["f4e2m1"]


@given(types())
def test_types_survive_printing(type: Type) -> None:
    assert parse_type(str(type)) == type
    assert str(parse_type(str(type))) == str(type)


@given(dims())
def test_dimensions_survive_printing(dim: Any) -> None:
    assert parse_dim(format_dim(dim)) == dim


@given(dims(), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_a_printed_dimension_has_the_value_that_python_gives_it(dim: Any, n: int, b: int, s: int) -> None:
    values = {"N": n, "B": b, "seq_len": s}
    expected = sympy.sympify(dim).subs({symbol(name): value for name, value in values.items()})
    assert eval(format_dim(dim), {}, values) == expected


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("N*(N+1)", "N*N+N"),
        ("2*(N+1)", "2*N+2"),
        ("0-(0-N)//4", "-((-N)//4)"),
        ("4//2", "2"),
        ("N//1", "N"),
        ("(N//2)*2", "2*(N//2)"),
    ],
)
def test_equal_dimensions_are_alike(text: str, same: str) -> None:
    assert parse_dim(text) == parse_dim(same)
    assert format_dim(parse_dim(text)) == same
    assert as_dim(sympy.ceiling(N / 4)) == parse_dim("0-(0-N)//4")


@pytest.mark.parametrize(
    "text",
    ["", "N M", "N/2", "1.5", "f(N)", "N**2", "N//0", "N//M", "(" * 300 + "N" + ")" * 300, "N\x00", "'N'"],
)
def test_what_is_no_dimension(text: str) -> None:
    with pytest.raises(ParseError, match="is no dimension"):
        parse_dim(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16", "is no type"),
        ("bf16[N", "is no type"),
        ("bf15[N]", "no dtype is called 'bf15'; there are f64, f32"),
        ("bf16[N]@s0", "scale blocks"),
        ("bf16[N]@s1x2", "scale blocks"),
        ("bf16[N]@s*x*", "scale blocks"),
        ("bf16[N]@s**", "is no type"),
        ("bf16[N,M~2]", "is no axis"),
        ("bf16[N~2~3]", "is no axis"),
        ("bf16[N@ep@tp]", "is no axis"),
        ("bf16[N@]", "is no axis"),
        ("bf16[1-2]", "-1 is no size"),
        ("cache<bf16[], page=1>", "is no type"),
        ("cache<bf16[0], page=1>", "must be positive"),
        ("cache<bf16[5], page=0>", "must be positive"),
        ("cache<bf16[5], page=1, scale=2.0>", "a scale is positive, of entries in f8e4m3"),
        ("cache<f8e4m3[5], page=1, scale=0.0>", "a scale is positive"),
        ("cache<f8e4m3[5], page=1, scale=1e999>", "a scale is positive"),
        ("cache<f8e4m3[5], page=1, scale=e4>", "is no type"),
        ("cache<f8e4m3[5], page=1, rank=4>", "no bytes of 4 elements"),
        ("cache<u8[657], page=64, rank=512>", "no bytes of 512 elements in e4m3, their scales and bf16"),
        ("cache<u8[515], page=64, rank=512>", "no bytes of 512 elements"),
        ("cache<u8[2,656], page=64, rank=512>", "no bytes of 512 elements"),
        ("cache<u8[656], page=64, rank=0>", "is no type"),
        ("cache<bf16[5], page=" + "9" * 5000 + ">", "is no type"),
        ("token<>", "is no type"),
    ],
)
def test_what_is_no_type(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse_type(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (-1,)},
        {"shape": (N / 2,)},
        {"shape": (), "groups": 3},
        {"scale": (-1,)},
        {"scale": (1, 1, 1)},
        {"placement": ((2, "ep"),)},
        {"placement": ((0, "ep"), (0, "tp"))},
    ],
)
def test_what_no_tensor_may_be(wrong: dict[str, Any]) -> None:
    TensorType(bf16, (N, 4))
    with pytest.raises(IRError):
        TensorType(**{"dtype": bf16, "shape": (N, 4)} | wrong)


@given(tensor_types())
def test_the_order_of_placements_means_nothing(type: TensorType) -> None:
    assert type.with_(placement=tuple(reversed(type.placement))) == type


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("f32[3,5]", 60),
        ("bf16[0,5]", 0),
        ("bf16[]", 2),
        ("i64[7]", 56),
        ("bool[7]", 7),
        ("f4e2m1[2,4]", 4),  # two to a byte
        ("f4e2m1[3,3]", 5),  # 4.5, rounded up
        ("f8e4m3[576,7168]@s128x128", 576 * 7168 + 4 * 5 * 56),  # kv_a_proj: the last block is partial
        ("f8e4m3[4,256]@s1x128", 4 * 256 + 4 * 4 * 2),
        ("f8e4m3[3,256,256]@s128x128", 3 * 256 * 256 + 4 * 3 * 2 * 2),  # a scale matrix an expert
        ("f8e4m3[5,300]@s1x*", 5 * 300 + 4 * 5),
        ("f8e4m3[5,300]@s*x*", 5 * 300 + 4),
        ("f8e4m3[7,5,300]@s*x*", 7 * 5 * 300 + 4 * 7),
        ("f8e4m3[0,300]@s*x*", 4),  # a whole axis is one block, however short
        ("f8e4m3[0,300]@s1x128", 0),
    ],
)
def test_bytes(text: str, nbytes: int) -> None:
    found = parse_type(text).nbytes  # type: ignore[union-attr]
    assert found == nbytes and isinstance(found, int)


def test_bytes_of_symbolic_shapes() -> None:
    assert TensorType(bf16, (N, 7168)).nbytes == 14336 * N
    assert TensorType(f4, (N, 3)).nbytes.subs(N, 3) == 5
    assert TensorType(f8, (N, 256), scale=(128, 128)).nbytes.subs(N, 130) == 130 * 256 + 4 * 2 * 2
    assert TensorType(f8, (N, 256), scale=(1, 0)).nbytes == 260 * N


def test_the_shape_of_scales() -> None:
    assert TensorType(f8, (N, 300), groups=3, scale=(1, 128)).scale_shape == (N, 3)
    assert TensorType(f8, (4, 576, 7168), scale=(128, 128)).scale_shape == (4, 5, 56)
    assert TensorType(f8, (4, N, 7168), scale=(0, 0)).scale_shape == (4, 1, 1)
    with pytest.raises(IRError, match="has no scales"):
        TensorType(f8, (N, 300)).scale_shape  # noqa: B018


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_dtype_is_torch_s(dtype: DType) -> None:
    assert DType.of(dtype.name) is DType.of(dtype.torch_name) is DType.of(str(dtype.torch)) is dtype
    assert dtype.is_float == dtype.torch.is_floating_point
    if dtype.bits >= 8:
        assert dtype.torch.itemsize * 8 == dtype.bits


# Attributes.
KINDS = {spec.kind.name: spec.kind for op in OPS.values() for spec in op.attr_specs.values()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(data=st.data())
def test_attributes_survive_printing(kind: Kind, data: st.DataObject) -> None:
    words = kind.name.split("|")
    value = data.draw(
        st.sampled_from(words) if len(words) > 1 else ATTRIBUTES.get(kind.name, st.just(words[0]))
    )
    assert kind.check(value)
    text = kind.print(value)
    assert "\n" not in text and len(text.splitlines()) <= 1
    assert kind.parse(text) == value


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (INT, True),
        (INT, 1.0),
        (FLOAT, 1),
        (FLOAT, float("nan")),
        (STR, 3),
        (SYMBOL, "a b"),
        (SYMBOL, "lambda"),
        (SYMBOL, "8N"),
        (RANGE, Range(3, 1)),
        (RANGE, Range(-2, 1)),
        (RANGE, (0, 1)),
        (BLOCK, (128, -1)),
        (BLOCK, ()),
    ],
)
def test_attributes_of_another_kind(kind: Kind, wrong: Any) -> None:
    assert not kind.check(wrong)


@pytest.mark.parametrize(("text", "numbers"), [("0..3", [0, 1, 2, 3]), ("5..5", [5]), ("0..-1", [])])
def test_a_range_includes_both_ends(text: str, numbers: list[int]) -> None:
    value = RANGE.parse(text)
    assert RANGE.check(value) and list(value) == numbers and len(value) == len(numbers)


def test_names_of_types() -> None:
    assert str(TensorType(bf16, (8 * N, 7168), groups=256)) == "bf16[8*N~256,7168]"
    assert str(TensorType(f8, (2048, 7168), scale=(128, 128))) == "f8e4m3[2048,7168]@s128x128"
    assert str(TensorType(f8, (2048, 7168), scale=(1, 0), space="host")) == "f8e4m3[2048,7168]@s1x*@host"
    assert str(TensorType(f8, (2048, 7168), scale=(0, 0))) == "f8e4m3[2048,7168]@s*x*"
    assert str(TensorType(bf16, (256, 8), placement=((0, "ep"),), space="host")) == "bf16[256@ep,8]@host"
    assert str(TensorType(f8, (N, 8), 4, (1, 128)[:1], ((0, "ep"),))) == "f8e4m3[N@ep~4,8]@s1"
    assert str(TensorType(i64, ())) == "i64[]"
    assert f32.is_float and not DTYPES["bool"].is_float
