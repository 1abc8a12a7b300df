"""What ``moec why-not`` and ``moec diff`` say of a package and of files."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from moec.errors import SourceLoc
from moec.ir import Module
from moec.passes import PASSES, Pass, pipeline
from moec.passes import expert_grouping as grouping
from moec.passes.mla_absorb import MLAAbsorb
from moec.why_not import ask, find_rule, rules_of, why_not
from tests.passes.modules import MoE, edited, func, module, replaced

from .conftest import Cli


def line_of(thing: object) -> int:
    return inspect.getsourcelines(thing)[1]  # type: ignore[arg-type]


def group() -> Pass:
    return PASSES["expert-grouping"]()


def test_the_condition_that_failed_with_both_lines() -> None:
    """The scope of this loop has no *, which over_all_experts refuses."""
    m = edited(replaced((", scope=mlp.experts.*", "")))
    m["forward"].named("y.2").op.loc = SourceLoc("mine.py", 7)  # type: ignore[attr-defined]
    (answer,) = [a for a in ask(m, group(), "expert-loop", "y.2") if a.function == "forward"]
    assert answer.fired is None and answer.miss is not None
    assert "has no *" in answer.miss.reason and answer.line == "mine.py:7"
    asked = answer.miss.asked
    assert asked is not None and asked.short == f"expert_grouping.py:{line_of(grouping.over_all_experts)}"


def test_a_refusal_names_the_line_that_raised_it() -> None:
    norm = "%h = rms_norm(%h.0, $n) {eps=1e-06} : f32[R,6]\n  "
    m = edited(replaced(("%h = swiglu(%g, %u)", "%h.0 = swiglu(%g, %u)"),
                        ("%d = linear(%h,", norm + "%d = linear(%h,"),
                        ("  param $gate_proj.weight", "  param $n: f32[6]\n  param $gate_proj.weight"),
                        ))  # fmt: skip
    found = [a for a in ask(m, group(), "expert-loop", "y.2") if a.function == "forward"]
    assert found and found[0].miss is not None and found[0].miss.asked is not None
    assert found[0].miss.asked.file.endswith("grouping.py")
    assert any(op.name == "for_each" for op in m["forward"]), "asking changes nothing"


def test_a_structure_that_does_not_fit_names_the_patterns_line() -> None:
    m = module(func("@forward(%x: f32[N,4]) -> f32[N,2]", "param $w: f32[4,4]",
                    "%gu = linear(%x, $w) : f32[N,4] ; a.py:3", "%h = swiglu(%gu) : f32[N,2] ; a.py:4",
                    "return %h"))  # fmt: skip
    (answer,) = ask(m, group(), "gate-up", "%h")
    assert answer.miss is not None and answer.miss.asked is not None
    assert answer.miss.asked.short.startswith("expert_grouping.py:")
    source = inspect.getsource(grouping).splitlines()
    assert (
        "P.linear(" in source[answer.miss.asked.line - 1] or "P.swiglu(" in source[answer.miss.asked.line - 1]
    )


def test_another_op_shows_the_nearest_misses() -> None:
    m = module(func("@forward(%x: f32[N,4]) -> (f32[N,2], f32[N,2])", "param $w: f32[4,4]",
                    "%a = sigmoid(%x) : f32[N,4]", "%gu = linear(%a, $w) : f32[N,4]",
                    "%other = swiglu(%x) : f32[N,2]", "%h = swiglu(%gu) : f32[N,2]",
                    "return %h, %other"))  # fmt: skip
    (answer,) = ask(m, group(), "gate-up", "a")
    assert answer.miss is None
    assert [miss.op.results[0].name for miss in answer.near] == ["h", "other"], (
        "what depends on it comes first"
    )


def test_what_fired_and_what_another_rule_took(built: Path) -> None:
    loop = [a for a in why_not("expert-loop", "%y.1", built) if a.function == "layer.moe"]
    assert loop[0].fired is not None and loop[0].ran and loop[0].source == "000_naive.moec"
    assert "for_each(%y.1)" in loop[0].fired.gone
    taken = [a for a in why_not("cast-combine", "mlp", built) if a.instead is not None]
    assert taken and taken[0].instead is not None and taken[0].instead.rule == "combine-plus"


def test_a_pass_of_no_pipeline_is_tried_on_the_last_dump(built: Path) -> None:
    found = why_not("permute-fusion.combine", "mlp", built, "layer.moe")
    assert [(a.ran, a.fired is not None) for a in found] == [(False, True)]


def test_every_rule_is_known_and_found_by_both_names() -> None:
    passes = pipeline(3, "sm_90a")
    for each in [*passes, *(cls() for cls in PASSES.values())]:
        for name in rules_of(each):
            assert any(p.name == each.name for p, _ in find_rule(name, passes))
            assert [p.name for p, _ in find_rule(f"{each.name}.{name}", passes)] == [each.name]
    assert "absorb" in " ".join(rules_of(MLAAbsorb()))


def test_asking_leaves_the_module_as_it_is(built: Path) -> None:
    from moec.ir import print_module

    m = MoE().build()
    before = print_module(m)
    ask(m, group(), "expert-loop", "y.2")
    ask(m, group(), "expert-loop", "y.1")
    assert print_module(m) == before


# The command.
def test_the_command(cli: Cli, built: Path) -> None:
    done = cli("why-not", "gate-up", "%shared.h", "--in", built)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(
        "expert-grouping.gate-up at %shared.h in @layer.moe of 000_naive.moec: fired\n"
    )
    done = cli(
        "why-not", "permute-fusion.gather-swiglu", "shared.h", "--in", built / "ir" / "005_canonicalise.moec"
    )
    assert "would not fire" in done.out and "[swiglu.py:" in done.out
    assert "%gu comes from linear, not grouped_linear" in done.out
    assert "asked by permute_fusion.py:" in done.out
    (answer,) = cli("why-not", "gate-up", "shared.h", "--in", built, "--json").json()
    assert answer["fired"]["made"] == ["linear(%gu)", "swiglu(%shared.h)"]


@pytest.mark.parametrize(
    ("rule", "value", "function", "code", "words"),
    [
        ("gate-ups", "h", None, "M0701", ("gate-ups", "mean gate-up")),
        ("expert-group.gate-up", "h", None, "M0701", ("expert-group", "mean expert-grouping")),
        ("mla-absorb.gate-up", "h", None, "M0701", ("mla-absorb.gate-up",)),
        ("gate-up", "shared.hh", None, "M0701", ("%shared.hh", "mean %shared.h")),
        ("gate-up", "kv_b.heads", "@head", "M0701", ("%kv_b.heads", "@head")),
        ("gate-up", "h", "layer.mo", "M0201", ("@layer.mo", "@layer.moe")),
        ("gate-up", "ids", "step", "M0701", ("%ids is an argument of @step",)),
    ],
)
def test_unknown_names(
    cli: Cli, built: Path, rule: str, value: str, function: str | None, code: str, words: tuple[str, ...]
) -> None:
    only = ("--function", function) if function else ()
    cli("why-not", rule, value, "--in", built, *only).refused(code, *words)


def test_where_to_look(cli: Cli, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli("why-not", "gate-up", "h").refused("M0701", "--in", "none")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "tiny").symlink_to(built)
    assert cli("why-not", "gate-up", "shared.h").code == 0
    cli("why-not", "gate-up", "h", "--in", tmp_path).refused("M0503", "no package")


# diff
def test_diff_of_packages_and_dumps(cli: Cli, built: Path, tmp_path: Path) -> None:
    same = cli("diff", built, built, "--exit-code")
    assert (same.code, same.out, same.err) == (0, "", "")
    dump = built / "ir" / "005_canonicalise.moec"
    edited = tmp_path / "edited.moec"
    edited.write_text(dump.read_text().replace("scale=2.5", "scale=1.5"))
    for argv in ((dump, edited), (built, edited, "--pass", "canonicalise")):
        done = cli("diff", *argv)
        assert (done.code, done.err) == (0, "")
        assert done.out.splitlines()[1:] == ["~ func @layer.moe", "  ~ %w,%id", "      scale: 2.5 -> 1.5"]
    assert cli("diff", dump, edited, "--exit-code").code == 1
    (function,) = cli("diff", dump, edited, "--json").json()["functions"]
    (change,) = function["changes"]
    assert (change["kind"], change["details"]) == ("changed", ["scale: 2.5 -> 1.5"])
    assert set(change["delta"].values()) == {0}


def test_diff_of_two_passes_of_one_package(cli: Cli, built: Path) -> None:
    done = cli("diff", built, "naive", "2", "--at", "T=16,S=16", "--function", "layer.moe")
    assert "+ func @weights" not in done.out and done.out.startswith("\n~ func @layer.moe  [+3 ops, ")
    assert "      - %y.1 = for_each @layer.moe.expert(" in done.out
    assert "  - $mlp.shared_experts.gate_proj.weight: f32[20,48]" in done.out
    both = cli("diff", built, "naive", "2", "--json").json()
    kinds = {f["name"]: f["kind"] for f in both["functions"]}
    assert kinds["layer.moe.expert"] == "removed" and kinds["weights"] == "added"


def test_diff_refuses(cli: Cli, built: Path) -> None:
    assert cli("diff", built).code == 2
    assert cli("diff", built, "1", "2", "--pass", "3").code == 2
    dump = built / "ir" / "000_naive.moec"
    assert cli("diff", dump, dump, "--pass", "3").code == 2
    cli("diff", built, "naive", "noive").refused("M0701", "noive", "mean naive")
    cli("diff", built, built, "--function", "layer.mo").refused("M0201", "@layer.mo")
    cli("diff", built, built, "--at", "Q=1").refused("M0701", "Q")


def test_costs_of_an_added_op_are_those_of_the_table() -> None:
    """Deltas by hand: a sigmoid of [10, 4] f32 reads and writes 160 bytes."""
    from moec.commands.diff import _delta
    from moec.ir.diff import diff_modules
    from moec.passes.firings import Prices

    lines = ["@f(%x: f32[N,4]) -> f32[N,4]", "%a = sigmoid(%x) : f32[N,4]", "return %a"]
    a, b = (
        parse(lines),
        parse([lines[0], lines[1], "%b = sigmoid(%a) : f32[N,4]", "return %b"]),
    )
    (f,) = diff_modules(a, b).functions
    delta = _delta("f", f.changes, (Prices(a, {"N": 10}), Prices(b, {"N": 10})))
    assert (delta["ops"], delta["launches"], delta["bytes"]) == (1, 1, 2 * 10 * 4 * 4)


def parse(lines: list[str]) -> Module:
    return module(func(*lines))
