"""Pipelines and options as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadOption, UnknownPass
from moec.ir import Module
from moec.passes import PASSES, Pass, parse_pipeline, pipeline, print_pipeline, register
from moec.passes.options import read_options, show_options, split_pipeline


@dataclass(frozen=True)
class Options:
    block: int = 128
    skip: tuple[str, ...] = ("lm_head",)
    fast: bool = False
    scale: float = 1.0
    recipe: str = ""
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError("block must be positive")


@pytest.fixture(autouse=True)
def sample() -> Iterator[None]:
    class Sample(Pass):
        name = "sample"
        Options = Options

        def run(self, module: Module) -> bool:
            return False

    register(Sample)
    yield
    del PASSES["sample"]


def test_a_pipeline_of_passes_with_options() -> None:
    passes = parse_pipeline(" canonicalise , sample{block=64, skip=[a,b.*], fast=true},expert-grouping{}")
    assert [p.name for p in passes] == ["canonicalise", "sample", "expert-grouping"]
    assert passes[1].options == Options(block=64, skip=("a", "b.*"), fast=True)
    assert print_pipeline(passes) == "canonicalise,sample{block=64,skip=[a,b.*],fast=true},expert-grouping"
    assert parse_pipeline(print_pipeline(passes)) == passes
    assert parse_pipeline("") == []


words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=8)


@given(
    st.builds(
        Options,
        block=st.integers(1, 512),
        skip=st.lists(words, max_size=3).map(tuple),
        fast=st.booleans(),
        scale=st.floats(allow_nan=False),
        recipe=words,
        limit=st.none() | st.integers(),
    )
)
def test_options_print_and_parse(options: Options) -> None:
    ((name, given),) = split_pipeline("sample" + show_options(options))
    assert read_options(name, Options, given) == options


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("canonicalize", UnknownPass, "no pass is called 'canonicalize'; did you mean canonicalise?"),
        ("xyz", UnknownPass, f"no pass is called 'xyz'; there are {', '.join(sorted({*PASSES, 'sample'}))}"),
        ("sample{blok=1}", BadOption, "sample: no option is called 'blok'; did you mean block?"),
        ("canonicalise{x=1}", BadOption, "canonicalise: no option is called 'x'; it has none"),
        ("sample{block=big}", BadOption, "sample: block=big is no int"),
        ("sample{limit=big}", BadOption, "sample: limit=big is no int or none"),
        ("sample{fast=yes}", BadOption, "sample: fast=yes is no bool (true or false)"),
        ("sample{block}", BadOption, "sample: 'block' is no option: 'name=value' is"),
        ("sample{block=1,block=2}", BadOption, "sample: block is given twice"),
        ("sample{block=0}", BadOption, "sample: block must be positive"),
        ("sample{block=1", BadOption, "'sample{block=1' is no pass: 'name' or 'name{option=value,...}' is"),
        ("a b", BadOption, "'a b' is no pass: 'name' or 'name{option=value,...}' is"),
    ],
)
def test_mistakes_are_named(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        parse_pipeline(text)
    assert caught.value.message == message  # type: ignore[attr-defined]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
def test_pipelines_name_passes_that_exist(level: int, target: str) -> None:
    names = [p.name for p in pipeline(level, target)]
    assert (names == []) == (level == 0)
    assert ("expert-grouping" in names) == (level >= 2)
    assert ("permute-fusion" in names) == (level >= 2 and target != "cpu")


def test_another_level_is_a_mistake() -> None:
    with pytest.raises(BadOption, match="-O 4: the levels are 0, 1, 2, 3"):
        pipeline(4)


def test_two_passes_of_one_name_are_a_bug() -> None:
    other: Any = type("Other", (Pass,), {"name": "canonicalise"})
    with pytest.raises(RuntimeError, match="two passes are called canonicalise"):
        register(other)
