"""A mistake in a user's own model file is reported at the user's own line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import Cli

HEADER = """\
from dataclasses import dataclass
from moec.models import GQA, Block, Decoder, Experts, Layer, Model, MoE, RMSNorm, Router, SwiGLU

ATTENTION = GQA(heads=4, kv_heads=2, head_dim=16)

def of(mlp):
    return Model(name="mine", vocab=64, hidden=32, layers=[Decoder(attn=ATTENTION, mlp=mlp)], dtype="f32")
"""
BLOCK = """
@dataclass(frozen=True)
class Mine(Block):
    def lower(self, b, x):
        {}

def model():
    return of(Mine())  # made
"""


@dataclass(frozen=True)
class Mistake:
    """``source`` after HEADER is wrong where it says ``# here``; otherwise the file alone is named."""

    name: str
    code: str
    source: str
    words: tuple[str, ...]


def in_block(*lines: str) -> str:
    return BLOCK.format("\n        ".join(lines))


MISTAKES = [
    Mistake(
        "unknown field",
        "M0101",
        "model = of(MoE(Router(experts=8, top_k=2),\n    Experts(count=8, intermedate=16)))  # here",
        ("Experts", "'intermedate'", "mean intermediate"),
    ),
    Mistake(
        "field left out",
        "M0101",
        "def model():\n    return of(SwiGLU())  # here",
        ("SwiGLU", "intermediate"),
    ),
    Mistake(
        "text for a number",
        "M0101",
        'model = of(SwiGLU(intermediate="64"))  # here',
        ("intermediate", "'64'"),
    ),
    Mistake(
        "text for eps",
        "M0101",
        "L = [Decoder(ATTENTION, SwiGLU(8))]\nmodel = Model(11, 16, L, eps='a')  # here",
        ("eps", "'a'"),
    ),
    Mistake(
        "negative eps",
        "M0101",
        "L = [Decoder(ATTENTION, SwiGLU(8))]\nmodel = Model(11, 16, L, eps=-1.0)  # here",
        ("eps", "-1.0"),
    ),
    Mistake(
        "number for a name",
        "M0101",
        "L = [Decoder(ATTENTION, SwiGLU(8))]\nmodel = Model(11, 16, L, name=3)  # here",
        ("name", "3"),
    ),
    Mistake(
        "eos beyond the vocabulary",
        "M0101",
        "L = [Decoder(ATTENTION, SwiGLU(8))]\nmodel = Model(11, 16, L, eos=11)  # here",
        ("eos names 11", "11"),
    ),
    Mistake(
        "no regex",
        "M0101",
        "L = [Decoder(ATTENTION, SwiGLU(8))]\nmodel = Model(11, 16, L, ignored=(('(', 'bad'),))  # here",
        ("'('", "ignored"),
    ),
    Mistake(
        "text for a scale",
        "M0101",
        "router = Router(4, 2, scale='x')  # here\nmodel = None",
        ("scale", "'x'"),
    ),
    Mistake("text for a window", "M0101", "model = GQA(2, 1, 8, window='a')  # here", ("window", "'a'")),
    Mistake(
        "text for theta",
        "M0101",
        "from moec.models import RoPE\nmodel = RoPE(theta='x')  # here",
        ("theta", "'x'"),
    ),
    Mistake(
        "number for a block",
        "M0101",
        "model = Decoder(attn=ATTENTION, mlp=3)  # here",
        ("Decoder", "mlp", "3"),
    ),
    Mistake(
        "more experts a token than there are",
        "M0101",
        "model = of(MoE(\n    Router(experts=8, top_k=9),  # here\n    Experts(count=8, intermediate=16)))",
        ("top_k is 9", "8"),
    ),
    Mistake(
        "blocks that contradict each other",
        "M0101",
        "def model():\n    router = Router(experts=8, top_k=2)\n"
        "    return of(MoE(router, Experts(count=10, intermediate=16)))  # here",
        ("8 experts", "10"),
    ),
    Mistake(
        "no layers",
        "M0101",
        'model = Model(name="m", vocab=8, hidden=8, layers=[])  # here',
        ("layers is empty",),
    ),
    Mistake(
        "shapes that do not fit",
        "M0203",
        in_block('w = b.param("w", (31,))', "return b.mul(x, w)  # here"),
        ("mul", "31", "32"),
    ),
    Mistake(
        "columns that do not fit",
        "M0203",
        in_block('w = b.param("w", (16, 24))', "return b.linear(x, w)  # here"),
        ("linear", "24", "32"),
    ),
    Mistake(
        "unknown op",
        "M0205",
        in_block("return b.sofmax(x)  # here"),
        ("sofmax",),
    ),
    Mistake(
        "unknown attribute",
        "M0204",
        in_block('w = b.param("w", (32,))', "return b.rms_norm(x, w, epsilon=1e-6)  # here"),
        ("rms_norm", "epsilon"),
    ),
    Mistake(
        "exception in lower",
        "M0101",
        in_block("sizes = {}", 'n = sizes["n"]  # here', "return x"),
        ("Mine.lower", "KeyError", "'n'"),
    ),
    Mistake(
        "exception below lower",
        "M0101",
        "def half(n):\n    return n // 0  # here\n" + in_block("half(3)", "return x"),
        ("Mine.lower", "ZeroDivisionError"),
    ),
    Mistake(
        "lower returns nothing",
        "M0101",
        in_block("b.add(x, x)").replace("# made", "# here"),
        ("Mine.lower", "None"),
    ),
    Mistake(
        "lower of another width",
        "M0101",
        in_block('return b.project(x, "p", 48)').replace("# made", "# here"),
        ("Mine", "48", "32"),
    ),
    Mistake(
        "no lower",
        "M0101",
        "@dataclass(frozen=True)\nclass Idle(Block):\n    pass\nmodel = of(Idle())  # here",
        ("Idle", "lower"),
    ),
    Mistake(
        "layers that are not there",
        "M0701",
        'whole = of(SwiGLU(64))\nmodel = whole.with_layers("2-5")  # here',
        ("layers 2-5", "1 layers"),
    ),
    Mistake("exception in the file", "M0103", "n = 1 / 0  # here\nmodel = None", ("ZeroDivisionError",)),
    Mistake(
        "exception in the function",
        "M0103",
        'def model():\n    raise RuntimeError("not today")  # here',
        ("RuntimeError: not today",),
    ),
    Mistake("exit", "M0103", "import sys\nsys.exit(3)  # here", ("SystemExit",)),
    Mistake("missing module", "M0103", "import no_such_module  # here", ("no_such_module",)),
    Mistake("syntax", "M0103", "def model():\n    return of(SwiGLU(64)  # here", ("Python",)),
    Mistake("no such name", "M0103", "def modle():\n    return of(SwiGLU(64))", ("'model'", "modle")),
    Mistake("no model", "M0103", "def model():\n    return SwiGLU(64)", ("model", "SwiGLU")),
    Mistake("a class", "M0103", "class model:\n    pass", ("class model",)),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.name for m in MISTAKES])
def test_a_mistake_in_the_users_file(cli: Cli, tmp_path: Path, mistake: Mistake) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HEADER + mistake.source + "\n")
    result = cli("build", f"{file}:model", "-o", tmp_path / "package")
    result.refused(mistake.code, *mistake.words)
    lines = [n for n, line in enumerate(file.read_text().splitlines(), 1) if line.endswith("# here")]
    place = f"{file}:{lines[0]}" if lines else str(file)
    assert re.search(rf"^  --> {re.escape(place)}(  .*)?$", result.err, re.M), (
        f"not at {place}:\n{result.err}"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    "source",
    [
        "model = of(SwiGLU(64))",
        "def model():\n    return of(MoE(Router(experts=8, top_k=2), Experts(count=8, intermediate=16)))",
        in_block('w = b.param("w", (32,))', "return b.mul(x, w)"),
        in_block("return x"),
        "model = Model(11, 16, [Decoder(ATTENTION, SwiGLU(8))], name='mine', dtype='f32', eos=2, eps=1)",
    ],
)
def test_a_file_without_mistakes(cli: Cli, tmp_path: Path, source: str) -> None:
    (tmp_path / "mine.py").write_text(HEADER + source + "\n")
    result = cli("build", f"{tmp_path / 'mine.py'}:model", "-o", tmp_path / "package", "-O0")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("mine for cpu, f32: ")


def test_a_file_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "absent.py"
    cli("build", f"{file}:model", "-o", tmp_path / "package").refused(
        "M0103", f"--> {file}\n", "No such file"
    )
