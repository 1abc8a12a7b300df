"""The main job on real input, on the CPU: compile a trained model, check it, look inside, let it write.

    make demo            or: python examples/pydoc/demo.py ["a prompt"]

The model has DeepSeek-V3's architecture at 1/180,000 of its size (README.md beside this file says more). moec
reads its checkpoint as it would read the real one; what is printed is what an engineer would look at there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import moec
from moec.check import verify_package
from moec.commands.build import facts
from moec.commands.run import tokenizer_of

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
PROMPT = "The for statement"


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def compile_model(out: Path) -> moec.Built:
    heading("1. Compile")
    start = time.perf_counter()
    options = moec.BuildOptions(force=True)
    built = moec.build(
        str(CHECKPOINT), target="cpu", out=out, dtype="f32", options=options, weights=CHECKPOINT
    )
    print(f"   moec build {shown(CHECKPOINT)} --target cpu --dtype f32 --out {shown(out)}")
    print(f"   {time.perf_counter() - start:.1f} s for {built.manifest['name']}:")
    for name, value in facts(built.manifest):
        print(f"   {name:<11} {value}")
    return built


def show_ir(built: moec.Built) -> None:
    heading("2. The IR, before the first pass and after each")
    for file in built.ir_files:
        lines = file.read_text(encoding="utf-8").splitlines()
        print(f"   {shown(file)}  ({len(lines)} lines)")
    print(
        "\n   Experts were a loop over sixteen small MLPs; expert-grouping made two grouped products of it:\n"
    )
    naive = built.ir_files[0].read_text(encoding="utf-8").splitlines()
    final = built.ir_files[-1].read_text(encoding="utf-8").splitlines()
    excerpt([line for line in naive if "= for_each" in line], "before")
    excerpt([line for line in final if any(f"= {op}(" in line for op in MOE_OPS)], "after")


MOE_OPS = ("sort_by_expert", "gather_rows", "grouped_linear", "combine")


def excerpt(lines: list[str], label: str) -> None:
    width = shutil.get_terminal_size((120, 24)).columns - 12
    for line in lines:
        text = line.strip()
        print(f"   {label:<7} {text if len(text) <= width else text[: width - 1] + '…'}")
        label = ""


def show_kernels(built: moec.Built) -> None:
    heading("3. The generated code")
    for file in built.sources:
        print(f"   {shown(file)}  ({len(file.read_text(encoding='utf-8').splitlines())} lines)")
    print("\n   kernels/grouped_linear.py:\n")
    source = (built.path / "kernels" / "grouped_linear.py").read_text(encoding="utf-8")
    print("\n".join(f"   │ {line}" for line in source[source.index("def ") :].rstrip().splitlines()))


def verify(built: moec.Built) -> bool:
    heading("4. The generated code against the reference interpreter, same weights, same text")
    prompt = list(f"{PROMPT} is used to iterate over the elements of a sequence.".encode())
    verdict = verify_package(built.path, str(CHECKPOINT), prompts=[prompt, list(b"import")], decode=2)
    print("   value                      shape           worst relative error")
    for row in verdict.rows:
        print(f"   {row.value:<26} {list(row.shape)!s:<15} {row.worst:.1e}")
    same = f"{verdict.same_tokens} of {verdict.tokens} greedy tokens the same"
    print(f"   {'equal' if verdict.ok else 'DIFFERENT'} within {verdict.tolerance:.0e}; {same}")
    return verdict.ok


def write(built: moec.Built, prompt: str, tokens: int) -> None:
    heading(f"5. Run: moec.load(package, weights).stream(prompt), {tokens} bytes")
    model = moec.load(built, weights=CHECKPOINT)
    if not isinstance(model, moec.LanguageModel):
        raise SystemExit(f"{built.path} is no language model")
    tokenizer = tokenizer_of(str(CHECKPOINT), model.vocab)
    start = time.perf_counter()
    stream = model.stream([tokenizer.encode(prompt)], tokens, temperature=0.5, top_p=0.95, seed=3)
    print(f"\n{prompt}", end="")
    for text in tokenizer.stream(step[0] or 0 for step in stream):
        print(text, end="", flush=True)
    print(f"\n\n   {tokens / (time.perf_counter() - start):.0f} tokens/s")


def shown(path: Path) -> str:
    """A path as short as it can be from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("-n", "--tokens", type=int, default=400)
    parser.add_argument("-o", "--out", type=Path, default=Path("build") / "pydoc")
    args = parser.parse_args()
    built = compile_model(args.out)
    show_ir(built)
    show_kernels(built)
    equal = verify(built)
    write(built, args.prompt, args.tokens)
    package, weights = shown(built.path), shown(CHECKPOINT)
    heading("Next" if shutil.which("moec") else "Next, after `. .venv/bin/activate`")
    print(f'   moec run {package} "import" --weights {weights} --temperature 0.5')
    print(f"   moec show {package} --function layer.moe        moec bench {package} --weights {weights}")
    print("   moec list models                                moec build deepseek-v3 --out build/deepseek-v3")
    return 0 if equal else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except moec.MoecError as error:
        sys.exit(str(error))
