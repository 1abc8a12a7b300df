"""``moec run PACKAGE PROMPT``."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

import click

from moec.commands import ui
from moec.errors import BadInput, BadOption, NotAPackage, OutputExists, OutputUnwritable


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def stream(self, ids: Iterable[int]) -> Iterator[str]: ...


class Bytes:
    """Every byte of UTF-8 is a token: models of 256."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            yield decoder.decode(bytes([token]))
        yield decoder.decode(b"", final=True)  # what was begun and never finished


class FromFile:
    """A ``tokenizer.json``, read by the tokenizers library."""

    def __init__(self, file: Path) -> None:
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise BadInput(f"{file} needs the tokenizers library: pip install 'moec[hf]'") from None
        try:
            self._tokenizer = Reader.from_file(str(file))
        except Exception as error:
            raise BadInput(f"{file} is no tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        # Decodes the last tokens only, twice: without and with what is new. A token's text may depend on the
        # one before it (a space, a character's first bytes), but not on what lies further back.
        window: list[int] = []
        shown = ""  # the window's text so far
        known = 0  # tokens of the window that made it
        text = ""
        for token in ids:
            window.append(token)
            text = self._tokenizer.decode(window)
            if len(text) > len(shown) and not text.endswith("\ufffd"):  # no character's bytes are to come
                yield text[len(shown) :]
                del window[:known]
                known, shown, text = len(window), self._tokenizer.decode(window), ""
        yield text[len(shown) :]


def tokenizer_of(weights: str, vocab: int) -> Tokenizer:
    """The tokenizer.json beside the weights, else bytes for a vocabulary of 256, else BadInput."""
    file = Path(weights) / "tokenizer.json"
    if file.is_file():
        return FromFile(file)
    if vocab == 256:
        return Bytes()
    raise BadInput(
        f"no tokenizer.json in {weights}, and a vocabulary of {vocab} is not one of bytes; give --ids"
    )


@click.command("run")
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--weights", required=True, help="A folder of safetensors, or random:SEED.")
@click.option("--ids", help="The prompt as token ids, '1,2,3'; ids are printed then.")
@click.option(
    "-n", "--max-new-tokens", default=128, show_default=True, help="How many tokens to add at most."
)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Keep only the k best tokens; 0 keeps all.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep the best tokens that together reach p.")
@click.option("--seed", default=0, show_default=True)
@click.option("--allow-edited", is_flag=True, help="Also a package whose files were edited.")
@click.option(
    "--record-routing",
    "trace",
    type=click.Path(path_type=Path),
    help="Write what the routers chose, FILE.npy.",
)
@click.option("--force", is_flag=True, help="Replace an existing trace.")
def command(
    package: Path,
    prompt: str | None,
    weights: str,
    ids: str | None,
    max_new_tokens: int,
    allow_edited: bool,
    trace: Path | None,
    force: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with the model in PACKAGE, printing tokens as they come."""
    if (prompt is None) == (ids is None):
        raise click.UsageError("give a PROMPT, or --ids")
    if trace is not None:
        _check_trace(trace, force)
    model = load(package, weights, allow_edited)
    with model.record_routing() if trace is not None else nullcontext() as recorded:
        _continue(model, prompt, ids, weights, max_new_tokens, sampling)
    if trace is not None and recorded is not None:
        recorded.save(trace)


def _check_trace(file: Path, force: bool) -> None:
    if file.suffix != ".npy":
        raise BadOption(f"--record-routing {file}: a trace is a .npy file")
    if file.exists() and not force:
        raise OutputExists(f"{file} exists; --force replaces it")
    if not file.parent.is_dir():
        raise OutputUnwritable(f"can't write {file}: {file.parent} is no folder")
    try:  # before the run, not after it
        with NamedTemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise OutputUnwritable(f"can't write {file}: {error.strerror}") from None


def _continue(
    model: Any,
    prompt: str | None,
    ids: str | None,
    weights: str,
    max_new_tokens: int,
    sampling: dict[str, Any],
) -> None:
    eos = model.manifest["eos"]
    if ids is not None:
        tokens = model.stream([_ids(ids)], max_new_tokens, eos_token_id=eos, **sampling)
        click.echo(",".join(str(t[0]) for t in tokens))
        return
    tokenizer = tokenizer_of(weights, model.vocab)
    encoded = tokenizer.encode(prompt or "")
    stream = model.stream([encoded], max_new_tokens, eos_token_id=eos, **sampling)
    click.echo(prompt, nl=False)
    for text in tokenizer.stream(t[0] for t in stream):
        click.echo(text, nl=False)
    click.echo()


def load(package: Path, weights: str, allow_edited: bool = False) -> Any:
    """The package's language model, with a progress bar for its weights. Raises NotAPackage for a layer."""
    with ui.status("loading"):
        from moec import runtime
    with ui.bar("weights") as progress:
        model = runtime.load(package, weights, verify=not allow_edited, progress=progress)
    if not isinstance(model, runtime.LanguageModel):
        raise NotAPackage(f"{package} is a single layer: it has no tokens")
    return model


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"--ids {text!r}: numbers and commas, as in 1,2,3") from None
