"""What each command prints, where, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moec import cli as command_line
from moec.ir import read_module
from moec.ir.text import split_top

from .conftest import PRESET, Cli

ERRORS_ONLY = "stdout is for results: progress goes to stderr, and only where that is a terminal"


# Help and exit codes.
@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_help(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Usage: moec {command} ")
    assert all(len(line) <= 80 for line in done.out.splitlines())


def test_the_commands_own_first_line_is_what_the_overview_says_in_short(cli: Cli) -> None:
    overview = cli("--help")
    assert overview.code == 0
    assert [line.split()[0] for line in overview.out.partition("Commands:\n")[2].splitlines()] == [
        *command_line.COMMANDS
    ]
    assert cli("--version").out.startswith("moec, version ")


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("compile",),
        ("build",),
        ("build", PRESET, "--fast"),
        ("build", PRESET, "-O", "x"),
        ("list", "things"),
        ("run", "p", "--weights", "random:0"),
        ("run", "p", "a prompt", "--ids", "1", "--weights", "random:0"),
        ("run", "p", "a prompt"),
        ("show", "p", "--kernel", "rope", "--pass", "1"),
    ],
)
def test_wrong_usage_exits_with_2(cli: Cli, argv: tuple[str, ...]) -> None:
    done = cli(*argv)
    assert (done.code, done.out) == (2, "")
    assert "Usage: moec" in done.err


def test_a_bug_exits_with_70_and_keeps_its_trace(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("unforeseen")

    monkeypatch.setattr("moec.codegen.write_package", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = cli("build", PRESET, "-o", tmp_path / "outputs" / "package")
    assert (done.code, done.out) == (70, "")
    assert done.err.startswith("error[M0001] a bug in moec: AssertionError: unforeseen\n")
    assert list((tmp_path / "outputs").iterdir()) == []
    (trace,) = tmp_path.glob("moec-bug-*.txt")
    assert str(trace) in done.err
    assert "in broken" in trace.read_text()


def test_an_interrupted_build_leaves_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moec.codegen.write_package", interrupted)
    done = cli("build", PRESET, "-o", tmp_path / "package")
    assert (done.code, done.out, done.err.strip()) == (130, "", "interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_build_that_is_told_to_stop_leaves_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: signal.Handlers
) -> None:
    number = getattr(signal, name)

    def told(folder: Path, *_: Any) -> None:
        (folder / "half").write_text("")
        assert [p.name[:9] for p in tmp_path.iterdir()] == [".package."]
        os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    monkeypatch.setattr("moec.codegen.write_package", told)
    outside = signal.signal(number, before)
    try:
        done = cli("build", PRESET, "-o", tmp_path / "package")
        assert signal.getsignal(number) == before, "the caller's handlers are there again"
    finally:
        signal.signal(number, outside)
    ignored = before == signal.SIG_IGN  # as nohup has it
    code, said = (130, "interrupted") if ignored else (128 + number, f"stopped by {name}")
    assert (done.code, done.out, done.err.strip()) == (code, "", said)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_stops_reading(built: Path) -> None:
    """A pipe that closes before all was written, as in ``moec show x | head``."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "moec", "show", str(built / "ir" / "000_naive.moec")],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_progress_goes_to_stderr(
    cli: Cli, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if both streams were terminals
    build = cli("build", "mixtral-tiny", "-o", tmp_path / "package", "--json")
    assert build.json() and "emitting" in build.err
    run = cli("run", built, "--ids", "1", "--weights", "random:0", "-n", 1)
    assert run.out.strip().isdigit() and "weights" in run.err
    assert cli("verify", built, "--json").json()["ok"]


# list
@pytest.mark.parametrize(
    ("kind", "member"),
    [("models", PRESET), ("targets", "cpu"), ("passes", "expert-grouping"), ("ops", "grouped_linear")],
)
def test_list(cli: Cli, kind: str, member: str) -> None:
    table, rows = cli("list", kind), cli("list", kind, "--json").json()
    first = next(iter(rows[0]))
    assert member in [row[first] for row in rows]
    lines = table.out.splitlines()
    assert len(lines) == len(rows) + 2, "a head, a rule, and one line for each"
    for row, line in zip(rows, lines[2:], strict=True):
        assert line.startswith(row[first])
    assert all(value for row in rows for key, value in row.items() if key.startswith("what")), "no summary"


# show
def test_show_prints_a_dump_as_it_is(cli: Cli, built: Path) -> None:
    dumps = sorted((built / "ir").glob("*.moec"))
    assert len(dumps) > 2
    for dump in dumps:
        shown = cli("show", built, "--pass", dump.stem.partition("_")[0])
        assert (shown.code, shown.out, shown.err) == (0, dump.read_text(), ""), ERRORS_ONLY
        assert cli("show", dump).out == dump.read_text()
    assert cli("show", built).out == dumps[-1].read_text()
    assert cli("show", built, "--pass", "naive").out == dumps[0].read_text()
    assert cli("show", built, "--pass", "expert-grouping").out == dumps[1].read_text()
    assert cli("show", built, "--pass", "canonicalise").out == dumps[3].read_text(), "the last of that name"
    unchanged = cli("show", built, "--pass", "1")
    assert unchanged.out == dumps[0].read_text()
    assert unchanged.err == "note: pass 1, canonicalise, changed nothing: this is 000_naive\n"


def test_show_of_a_spec_is_its_naive_ir(cli: Cli, pristine: Path) -> None:
    assert "= for_each @layer.moe.expert(" in cli("show", PRESET).out
    assert cli("show", PRESET, "--plain").out == cli("show", pristine, "--plain").out.replace(
        "@tiny", f"@{PRESET}"
    )


def test_show_plain_leaves_out_what_is_derived(cli: Cli, built: Path) -> None:
    derived, plain = cli("show", built).out, cli("show", built, "--plain").out
    assert " ; " in derived and ";" not in plain
    assert [line.partition(" ; ")[0] for line in derived.splitlines()] == plain.splitlines()


def test_show_function(cli: Cli, built: Path) -> None:
    whole = cli("show", built).out
    for name in ("layer.moe", "@layer.moe"):
        text = cli("show", built, "--function", name).out
        assert text.startswith("func @layer.moe(") and text.strip() in whole and text.count("\nend") == 1
    both = cli("show", built, "--function", "head", "--function", "step").out
    assert both.index("func @head(") < both.index("func @step(")
    cli("show", built, "--function", "layer.mo").refused("M0201", "@layer.mo", "@layer.moe")


def test_show_kernel(cli: Cli, built: Path) -> None:
    for name in ("route", "route.py"):
        assert cli("show", built, "--kernel", name).out == (built / "kernels" / "route.py").read_text()
    cli("show", built, "--kernel", "rout").refused("M0701", "rout", "mean route")


def test_show_refuses_what_is_not_there(cli: Cli, built: Path, tmp_path: Path) -> None:
    cli("show", built, "--pass", "fp8").refused("M0701", "'fp8'", "000_naive", "002_expert-grouping")
    cli("show", PRESET, "--pass", "1").refused("M0701", "--pass", PRESET)
    cli("show", tmp_path / "no.moec").refused("M0202", "no.moec")


# opt
def test_opt_repeats_each_pass_byte_for_byte(cli: Cli, built: Path, tmp_path: Path) -> None:
    """A dump's header says which passes lead to it from the one before."""
    dumps = sorted((built / "ir").glob("*.moec"))
    assert len(dumps) > 2
    for before, after in pairwise(dumps):
        ran, all_ran = (split_top(read_module(f).ran) for f in (before, after))
        done = cli("opt", before, "-p", ",".join(all_ran[len(ran) :]))
        assert (done.code, done.err) == (0, "")
        assert done.out == after.read_text(), f"{all_ran} on {before.name}"
    assert cli("opt", dumps[0], "-p", read_module(dumps[-1]).ran).out == dumps[-1].read_text()
    assert cli("opt", dumps[0]).out == dumps[0].read_text()


def test_opt_in_a_pipe(cli: Cli, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = built / "ir" / "000_naive.moec"
    first = cli("opt", dump, "-p", "expert-grouping").out
    monkeypatch.setattr(sys, "stdin", io.StringIO(first))
    both = cli("opt", dump, "-p", "expert-grouping,canonicalise", "--plain")
    assert cli("opt", "-", "-p", "canonicalise", "--plain").out == both.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("nothing"))
    cli("opt", "-").refused("M0202", "--> <stdin>:1")


def test_opt_prints_after_passes(cli: Cli, built: Path) -> None:
    dump = built / "ir" / "000_naive.moec"
    run = ("opt", dump, "-p", "mla-absorb,expert-grouping,expert-grouping")
    plain = cli(*run).out

    def headings(*options: str) -> list[str]:
        done = cli(*run, *options)
        assert done.out == plain, "stdout has the result alone"
        return [line for line in done.err.splitlines() if line.startswith("; after")]

    absorbed, grouped = "; after pass 1, mla-absorb", "; after pass 2, expert-grouping"
    again = "; after pass 3, expert-grouping, which changed nothing"
    assert headings("--print-after=changed") == [absorbed, grouped]
    assert headings("--print-after=all") == [absorbed, grouped, again]
    assert headings("--print-after=mla-absorb") == [absorbed]
    assert headings("--print-after=expert-grouping") == [grouped, again]
    assert "grouped_linear(" in cli(*run, "--print-after=expert-grouping").err
    cli(*run, "--print-after=mla-absorbs").refused("M0701", "mla-absorbs", "mean mla-absorb")


def test_opt_with_instruments(cli: Cli, built: Path, tmp_path: Path) -> None:
    dump = built / "ir" / "000_naive.moec"
    run = ("opt", dump, "-p", "expert-grouping,canonicalise,mla-absorb")
    done = cli(*run, "--time", "--oracle", "--dump", tmp_path / "ir", "--events", tmp_path / "events.jsonl")
    assert done.code == 0 and done.out == cli(*run).out
    for word in ("expert-loop 1", "absorb 2", "ms", "dB", "relative error"):
        assert word in done.err
    names = [f.name for f in sorted((tmp_path / "ir").iterdir())]
    assert names == [
        "000_naive.moec",
        "001_expert-grouping.moec",
        "002_canonicalise.moec",
        "003_mla-absorb.moec",
    ]
    assert (tmp_path / "ir" / "003_mla-absorb.moec").read_text() == done.out
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {"expert-loop", "absorb"} <= {row.get("rule") for row in rows}
    assert cli(*run, "--tolerance", 1).code == 2
    strict = cli(*run, "--oracle", "--tolerance", 1e-12)
    assert strict.code == 1 and "M0706" in strict.err and "expert-grouping changed step.0" in strict.err


def test_opt_takes_an_edited_dump(cli: Cli, built: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited.moec"
    edited.write_text((built / "ir" / "000_naive.moec").read_text().replace("scale=2.5", "scale=1.5"))
    text = cli("opt", edited, "-p", "expert-grouping").out
    assert "scale=1.5" in text and "grouped_linear(" in text and "scale=2.5" not in text


def test_opt_writes_a_file_and_does_not_overwrite(cli: Cli, built: Path, tmp_path: Path) -> None:
    dump, file = built / "ir" / "000_naive.moec", tmp_path / "new.moec"
    done = cli("opt", dump, "-o", file, "--plain")
    assert (done.code, done.out, done.err) == (0, "", "")
    plain = file.read_text()
    assert plain == cli("opt", dump, "--plain").out
    cli("opt", dump, "-o", file).refused("M0501", str(file), "--force")
    assert file.read_text() == plain
    assert cli("opt", dump, "-o", file, "--force").code == 0
    assert file.read_text() == dump.read_text()
    cli("opt", dump, "-o", tmp_path / "no" / "new.moec").refused("M0502", str(tmp_path / "no"))


def test_opt_refuses_a_broken_dump_at_its_line(cli: Cli, built: Path, tmp_path: Path) -> None:
    lines = (built / "ir" / "000_naive.moec").read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if "= route(" in line)
    for old, new, code in (
        ("= route(", "= rout(", "M0205"),
        ("k=3", "k=99", "M0203"),
        ("k=3", "k=x", "M0202"),
        ("k=3", "kk=3", "M0204"),
        ("= route(", "= route((", "M0202"),
    ):
        broken = tmp_path / "broken.moec"
        broken.write_text("\n".join([*lines[:at], lines[at].replace(old, new), *lines[at + 1 :]]))
        cli("opt", broken).refused(code, f"--> {broken}:{at + 1}")


@pytest.mark.parametrize(
    ("pipeline", "code", "words"),
    [
        ("expert-groupin", "M0702", ("expert-groupin", "mean expert-grouping")),
        ("canonicalise{x=1}", "M0701", ("canonicalise", "'x'")),
        ("canonicalise{", "M0701", ()),
    ],
)
def test_opt_refuses_unknown_passes(
    cli: Cli, built: Path, pipeline: str, code: str, words: tuple[str, ...]
) -> None:
    cli("opt", built / "ir" / "000_naive.moec", "-p", pipeline).refused(code, *words)


# build
def test_build_reports_what_it_built(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("build", "mixtral-tiny", "--dtype", "f32")
    assert (done.code, done.err) == (0, "")
    first, *rest = done.out.splitlines()
    assert first.startswith("mixtral-tiny for cpu, f32: build/mixtral-tiny ")
    assert [line.split("  ")[1] for line in rest] == [
        "parameters",
        "KV cache",
        "step memory",
        "IR",
        "sources",
    ]
    assert max(map(len, rest)) < 100
    # embedding, head, final norm; a layer: two norms, q, k, v, o, router, experts' three projections
    layer = 2 * 48 + 48 * (60 + 20 + 20 + 60) + 5 * 48 + 5 * 3 * 48 * 40
    assert f"{(2 * 256 * 48 + 48 + 2 * layer) / 1e3:.3g} K" in rest[0]
    # keys and values of 2 heads of 10 elements of 4 bytes in 2 layers
    assert "320 bytes a token" in rest[1]


def test_build_json(cli: Cli, tmp_path: Path) -> None:
    done = cli("build", "mixtral-tiny", "-o", tmp_path / "package", "-O1", "--json")
    said = done.json()
    assert (done.code, done.err, said["package"]) == (0, "", str(tmp_path / "package"))
    assert said["manifest"] == json.loads((tmp_path / "package" / "manifest.json").read_text())
    assert said["seconds"] > 0


# bench
def test_bench(cli: Cli, built: Path) -> None:
    argv = ("bench", built, "--prefill", 4, "--decode", 2, "--repeats", 1, "--batch", 2)
    done = cli(*argv, "--json")
    found = done.json()
    assert (done.code, done.err) == (0, "")
    assert [found[k] for k in ("model", "target", "dtype", "batch")] == [PRESET, "cpu", "f32", 2]
    figures = ("prefill_s", "prefill_tokens_per_s", "decode_s", "decode_tokens_per_s", "weights_bytes")
    assert all(found[k] > 0 for k in figures)
    assert found["prefill_tokens_per_s"] == pytest.approx(8 / found["prefill_s"])
    assert found["cache_bytes_per_token"] == 3 * (24 + 8) * 4
    table = cli(*argv).out
    assert "prefill" in table and "2 × 4" in table and "decode" in table


@pytest.mark.parametrize("option", ["--prefill", "--decode", "--batch", "--repeats"])
def test_bench_refuses_no_work(cli: Cli, built: Path, option: str) -> None:
    cli("bench", built, option, 0).refused("M0601", option.removeprefix("--"), "0")


def test_bench_refuses_what_does_not_fit(cli: Cli, built: Path, layer_package: Path) -> None:
    cli("bench", built, "--prefill", 250, "--decode", 10).refused("M0601", "250 + 10", "256")
    cli("bench", layer_package).refused("M0503", "single layer")


def test_list_kernels_says_who_emits_an_op(cli: Cli) -> None:
    on = {row["op"]: row["on sm_90a"] for row in cli("list", "kernels", "--json").json()}
    assert on["gather_grouped_linear"] == on["grouped_linear_combine"] == "Triton"
    assert on["attention"] == "PyTorch"
    here = {row["on cpu"] for row in cli("list", "kernels", "--target", "cpu", "--json").json()}
    assert here == {"PyTorch"}


def test_list_kernels_explains_its_choice(cli: Cli) -> None:
    rows = cli("list", "kernels", "--explain", "mixtral-tiny", "--tokens", "1,4096", "--json").json()
    assert {row["tokens"] for row in rows} == {1, 4096}
    for row in rows:
        terms = dict(term.rsplit(" ", 1) for term in row["terms, µs"].split(", "))
        assert {"weights", "activations", "matrix unit", "launch"} <= set(terms)
        assert sum(map(float, terms.values())) == pytest.approx(float(row["µs by the model"]), abs=0.5)
    assert cli("list", "kernels", "--explain", "mixtral-tiny", "--target", "cpu").code == 1
    assert cli("list", "kernels", "--explain", "mixtral-tiny", "--tokens", "many").code == 1
