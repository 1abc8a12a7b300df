"""The DSL: a user's own blocks and files, and mistakes in them, reported at the user's line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import moec.models as m
from moec.errors import ModelFileError, MoecError, SpecError, TypeMismatch, UnknownOp, UnknownPreset
from moec.ir import Builder, Interpreter, Range, Value, print_module
from moec.ir.types import DTYPES

HERE = __file__
ATTN = m.GQA(heads=4, kv_heads=2, head_dim=8)


def line_of(mark: str) -> int:
    """The line of this file that ends in ``# mark``."""
    lines = Path(HERE).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {mark}")]
    return number


def small(mlp: m.Block, attn: m.Block = ATTN) -> m.Model:
    return m.Model(vocab=16, hidden=12, layers=[m.Decoder(attn, mlp)], dtype="f32")


class Mix(m.Block):
    """A user's block in its shortest form."""

    def lower(self, b: Builder, x: Value) -> Value:
        return b.add(x, b.project(x, "mix", x.type.shape[-1]))


@dataclasses.dataclass(frozen=True)
class Wide(m.Block):
    """A user's block with a field, which returns what the residual stream can't take."""

    width: int

    def lower(self, b: Builder, x: Value) -> Value:
        return b.project(x, "wide", self.width)


# What works.
def test_a_users_block_runs_as_a_layer() -> None:
    module = m.lower(m.Layer(Mix(), hidden=6, dtype="f32"))
    w, x = torch.randn(6, 6), torch.randn(3, 6)
    (y,) = Interpreter(module, {"mix.weight": w}).run("forward", x)
    assert torch.allclose(y, x + x @ w.T, atol=1e-5)


def test_a_users_block_serves_as_mlp_and_as_attention() -> None:
    text = print_module(m.lower(small(Mix())))
    assert "call @layer.mix(" in text and "param $mix.weight: f32[12,12]" in text
    text = print_module(m.lower(small(m.SwiGLU(8), attn=Mix())))
    assert "cache<" not in text and "$mix.weight" in text


def test_a_layer_may_change_the_width() -> None:
    (y,) = m.lower(m.Layer(Wide(5), hidden=6))["forward"].outputs
    assert str(y.type) == "bf16[N,5]"


def test_an_attention_layer_takes_the_cache_and_what_it_asks_for() -> None:
    module = m.lower(m.Layer(ATTN, hidden=12, dtype="f32", page=4))
    args = {a.name: str(a.type) for a in module["forward"].args}
    assert next(iter(args)) == "x" and args["kv"] == "cache<f32[4,8], page=4>"
    assert {*args} == {"x", "kv", "positions", "slot_mapping", "block_table", "seq_lens", "cu_seqlens"}


def test_an_empty_name_opens_no_scope() -> None:
    moe = m.MoE(m.Router(4, 2), m.Experts(4, 8), name="")
    module = m.lower(m.Layer(moe, hidden=6))
    assert "gate.weight" in module["forward"].params
    (loop,) = (op for op in module["forward"].ops if op.name == "for_each")
    assert loop.attrs["scope"] == "experts.*"


def test_equal_layers_share_one_function_and_unequal_ones_do_not() -> None:
    first = m.Decoder(ATTN, m.SwiGLU(8))
    same = m.Decoder(m.GQA(heads=4, kv_heads=2, head_dim=8), m.SwiGLU(8))
    other = m.Decoder(ATTN, m.SwiGLU(9))
    assert first == same and hash(first) == hash(same)  # made on different lines
    module = m.lower(m.Model(vocab=16, hidden=12, layers=[first, same, other, same]))
    calls = [(op.attrs["callee"], str(op.attrs["layers"])) for op in module["step"].ops if op.name == "call"]
    assert calls == [("layer.dense", "0..1"), ("layer.dense2", "2..2"), ("layer.dense", "3..3")]


def test_one_cache_for_each_shape_of_entry() -> None:
    latent = m.MLA(heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=16)
    layers = [m.Decoder(ATTN, m.SwiGLU(8)), m.Decoder(latent, m.SwiGLU(8)), m.Decoder(ATTN, m.SwiGLU(8))]
    step = m.lower(m.Model(vocab=16, hidden=12, layers=layers, dtype="f32"))["step"]
    kinds = {a.name: str(a.type) for a in step.args if a.name.startswith("kv")}
    assert kinds == {"kv0": "cache<f32[4,8], page=64>", "kv1": "cache<f32[20], page=64>"}
    assert [str(v.type) for v in step.outputs[1:]] == list(kinds.values())
    # Two ropes: of 8 elements in half layout, of 4 interleaved.
    assert [op.attrs["dim"] for op in step.ops if op.name == "rope_table"] == [8, 4]


def test_tied_embeddings() -> None:
    tied = m.lower(dataclasses.replace(small(m.SwiGLU(8)), tied=True))
    assert list(tied["head"].params) == ["model.embed_tokens.weight"]
    assert list(m.lower(small(m.SwiGLU(8)))["head"].params) == ["lm_head.weight"]


class Looping(m.Block):
    """A block with a loop of its own, whose body asks for ``wanted`` of the context."""

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted

    def lower(self, b: Builder, x: Value) -> Value:
        def body(b: Builder, e: Value, y: Value) -> list[Value]:
            slot = b.cast(b.context[self.wanted], DTYPES["i32"])
            return [b.add(y, b.project(b.gather_rows(y, slot, per_row=1), "w", x.type.shape[-1]))]

        return b.loop("for_each", Range(0, 2), "own.*", "own", [x], [], body)[0]


def test_what_a_body_asks_for_is_passed_through_every_loop() -> None:
    module = m.lower(small(Looping("positions")))
    assert "positions" in [a.name for a in module["own"].args]
    assert "positions" in [a.name for a in module["layer.looping"].args]
    assert "positions" not in [a.name for a in m.lower(small(Mix()))["layer.mix"].args]


def test_state_is_not_passed_but_carried() -> None:
    with pytest.raises(SpecError, match="is state: a loop must carry it"):
        m.lower(small(Looping("cache of 4x8")))


# Mistakes in the fields.
def test_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="GQA has no field 'head_dims'; did you mean head_dim") as caught:
        m.GQA(heads=4, kv_heads=2, head_dims=8)  # unknown-field
    assert (caught.value.loc.file, caught.value.loc.line) == (HERE, line_of("unknown-field"))


def test_a_missing_field() -> None:
    with pytest.raises(SpecError, match="SwiGLU lacks 'intermediate'") as caught:
        m.SwiGLU()  # missing-field
    assert caught.value.loc.line == line_of("missing-field")


def test_a_contradiction_is_reported_where_the_block_is_made() -> None:
    with pytest.raises(SpecError, match="4 query heads can't share 3 key heads") as caught:
        m.Decoder(
            attn=m.GQA(heads=4, kv_heads=3, head_dim=8),  # unequal-heads
            mlp=m.SwiGLU(8),
        )
    assert (caught.value.loc.file, caught.value.loc.line) == (HERE, line_of("unequal-heads"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: m.SwiGLU(0), "intermediate must be a positive integer, not 0"),
        (lambda: m.SwiGLU(8, act="relu"), "act is one of silu, gelu, gelu_tanh, not 'relu'"),
        (lambda: m.Router(8, 9), "top_k is 9 of 8 experts"),
        (lambda: m.Router(8, 2, groups=3), "8 experts don't make 3 equal groups"),
        (lambda: m.Router(8, 2, groups=8, group_score="top2sum"), "no two best"),
        (lambda: m.Router(8, 3, groups=4), "1 groups of 2 allow 2"),
        (lambda: m.MoE(m.Router(8, 2), m.Experts(7, 4)), "8 experts, but there are 7"),
        (lambda: m.MoE(m.Router(8, 2), m.Experts(8, 4), shared_gate="g"), "without a shared MLP"),
        (lambda: m.MLA(2, 8, 3, 8, 16), "qk_rope_head_dim is 3"),
        (lambda: m.RoPE(layout="both"), "layout must be 'half' or 'interleaved'"),
        (lambda: m.Decoder(ATTN, "mlp"), "mlp must be a Block, not 'mlp'"),
        (lambda: m.Model(16, 12, []), "layers is empty"),
        (lambda: m.Model(16, 12, [ATTN]), r"layers\[0\] must be a Decoder"),
        (lambda: m.Model(16, 12, [m.Decoder(ATTN, Mix())], dtype="int8"), "dtype is one of f32, bf16, f16"),
        (lambda: m.SwiGLU(8, limit=0), "limit must be a finite number above 0, not 0"),
        (lambda: m.Experts(8, 4, limit="7"), "limit must be a finite number above 0, not '7'"),
        (lambda: m.BlockFP8((128,)), "block is two positive integers"),
    ],
)
def test_fields_that_do_not_fit(make: object, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        make()
    assert caught.value.loc is not None and caught.value.loc.file == HERE


@pytest.mark.parametrize(
    "make",
    [
        lambda: m.Router(8, 8),
        lambda: m.Router(8, 2, groups=4, group_score="top2sum"),
        lambda: m.Router(8, 2, groups=8, masked="zero"),
        lambda: m.Router(8, 4, groups=4, topk_groups=2),
        lambda: m.MoE(m.Router(8, 2), m.Experts(8, 4), m.SwiGLU(4), shared_gate="g"),
        lambda: m.MLA(2, 8, 4, 8, 16, q_lora_rank=None),
        lambda: m.GQA(6, 1, 2),
    ],
)
def test_fields_that_do(make: object) -> None:
    make()


# Mistakes in lower.
class Misspelt(m.Block):
    def lower(self, b: Builder, x: Value) -> Value:
        return b.linaer(x)  # misspelt


class Raises(m.Block):
    def lower(self, b: Builder, x: Value) -> Value:
        return x.nothing  # raises


class Misfit(m.Block):
    def lower(self, b: Builder, x: Value) -> Value:
        return b.linear(x, b.param("w", (3, 5)))  # misfit


class Lost(m.Block):
    def lower(self, b: Builder, x: Value) -> Value:
        return b.add(x, b.context["postions"])  # lost


@pytest.mark.parametrize(
    ("block", "error", "message", "mark"),
    [
        (Misspelt, UnknownOp, "no op is called 'linaer'; did you mean linear", "misspelt"),
        (Raises, SpecError, "Raises.lower: AttributeError", "raises"),
        (Misfit, TypeMismatch, "linear: K is 12 in %mlp.in but 5 in \\$w", "misfit"),
        (Lost, SpecError, "the context has no postions; did you mean positions", "lost"),
    ],
)
def test_a_mistake_in_lower_is_reported_at_its_line(
    block: type[m.Block], error: type[MoecError], message: str, mark: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        m.lower(small(block()))
    assert (caught.value.loc.file, caught.value.loc.line) == (HERE, line_of(mark))
    assert f"--> {HERE}:{line_of(mark)}" in str(caught.value)


@pytest.mark.parametrize("attn", [True, False])
def test_a_result_that_does_not_join_the_stream_is_reported_where_the_block_is_made(attn: bool) -> None:
    wide = Wide(5)  # too-wide
    model = small(m.SwiGLU(8), attn=wide) if attn else small(wide)
    with pytest.raises(SpecError, match=r"Wide takes f32\[N,12\] but returns f32\[N,5\]") as caught:
        m.lower(model)
    assert (caught.value.loc.file, caught.value.loc.line) == (HERE, line_of("too-wide"))
    m.lower(small(Wide(12)))


def test_a_block_without_lower_and_one_that_returns_nothing() -> None:
    class Empty(m.Block):
        pass

    class Silent(m.Block):
        def lower(self, b: Builder, x: Value) -> Value:
            return None

    with pytest.raises(SpecError, match=r"Empty has no lower\(self, b, x\)"):
        m.lower(small(Empty()))
    with pytest.raises(SpecError, match=r"Silent\.lower returns None"):
        m.lower(small(Silent()))


# A user's file.
GOOD = """
    import moec.models as m

    attn = m.GQA(heads=4, kv_heads=2, head_dim=8)
    model = m.Model(vocab=16, hidden=12, layers=[m.Decoder(attn, m.SwiGLU(8))], name="mine")
    layer = m.Layer(attn, hidden=12)
    number = 7

    def make():
        return model

    def broken():
        return 1 / 0
    """


@pytest.fixture
def write(tmp_path: Path) -> object:
    def write(text: str) -> str:
        path = tmp_path / "my_model.py"
        path.write_text(dedent(text).lstrip())
        return str(path)

    return write


def test_a_users_file(write: object) -> None:
    file = write(GOOD)
    model = m.resolve(f"{file}:model")
    assert isinstance(model, m.Model) and model.name == "mine"
    assert m.resolve(f"{file}:make") == model
    assert isinstance(m.resolve(f"{file}:layer"), m.Layer)
    assert m.resolve(model) is model


@pytest.mark.parametrize(
    ("name", "message", "line"),
    [
        ("modle", "nothing is called 'modle'; did you mean model", 0),
        ("number", "number is a int, not a Model or Layer", 0),
        ("broken", "ZeroDivisionError: division by zero", 12),
        ("", "say which model of the file is meant: .*:model or .*:make", 0),
    ],
)
def test_names_in_a_users_file(write: object, name: str, message: str, line: int) -> None:
    file = write(GOOD)
    with pytest.raises(ModelFileError, match=message) as caught:
        m.resolve(f"{file}:{name}")
    assert (caught.value.loc.file, caught.value.loc.line) == (file, line)


@pytest.mark.parametrize(
    ("text", "error", "message", "line"),
    [
        ("x = (\n", ModelFileError, "no Python: '\\(' was never closed", 1),
        ("import nothing_of_that_name\n", ModelFileError, "ModuleNotFoundError", 1),
        ("x = 1\nraise SystemExit(3)\n", ModelFileError, "SystemExit: 3", 2),
        (
            "import moec.models as m\nmodel = m.GQA(heads=4, kv_heads=3, head_dim=8)\n",
            SpecError,
            "can't share",
            2,
        ),
        ("import moec.models as m\nmodel = m.preset('x')\n", UnknownPreset, "no preset is called 'x'", 2),
    ],
)
def test_mistakes_in_a_users_file(
    write: object, text: str, error: type[MoecError], message: str, line: int
) -> None:
    file = write(text)
    with pytest.raises(error, match=message) as caught:
        m.resolve(f"{file}:model")
    assert (caught.value.loc.file, caught.value.loc.line) == (file, line)


def test_a_users_file_may_import_its_neighbours_and_define_dataclasses(tmp_path: Path, write: object) -> None:
    (tmp_path / "neighbour_of_my_model.py").write_text("WIDTH = 12\n")
    text = """
        from __future__ import annotations
        from dataclasses import dataclass
        import moec.models as m
        from neighbour_of_my_model import WIDTH

        @dataclass(frozen=True)
        class Own(m.Block):
            width: int
            def lower(self, b, x):
                return b.project(x, "own", self.width)

        layer = m.Layer(Own(WIDTH), hidden=4)
        """
    layer = m.resolve(write(text) + ":layer")
    assert str(m.lower(layer)["forward"].outputs[0].type) == "bf16[N,12]"


@pytest.mark.parametrize("spec", ["deepseek-v33", "no/such/folder", "no_such.py:model", 7])
def test_specs_that_are_nothing(spec: object) -> None:
    with pytest.raises((UnknownPreset, ModelFileError, SpecError)):
        m.resolve(spec)
