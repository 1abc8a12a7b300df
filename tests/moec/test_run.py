"""``moec run``: what is read as a prompt, what is printed, and when."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import moec

from .conftest import PRESET, Cli


def ids(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def test_ids_are_those_of_generate(cli: Cli, built: Path, pristine: Path) -> None:
    done = cli("run", built, "--ids", "1,2,3", "--weights", pristine, "-n", 6)
    assert (done.code, done.err) == (0, "")
    model = moec.load(built, pristine)
    assert isinstance(model, moec.LanguageModel)
    (expected,) = model.generate([[1, 2, 3]], 6, eos_token_id=1)
    assert ids(done.out) == expected.tolist()[3:]


def test_bytes_are_tokens_of_a_vocabulary_of_256(cli: Cli, built: Path) -> None:
    prompt = "naïve →"
    argv = ("--weights", "random:0", "-n", 5)
    done = cli("run", built, prompt, *argv)
    new = ids(cli("run", built, "--ids", ",".join(map(str, prompt.encode())), *argv).out)
    read = codecs.getincrementaldecoder("utf-8")("replace").decode  # what is cut off at the end isn't shown
    assert done.out == prompt + read(bytes(new)) + "\n"


def test_sampling_is_reproducible(cli: Cli, built: Path) -> None:
    def run(*argv: object) -> str:
        return cli("run", built, "--ids", "9", "--weights", "random:0", "-n", 12, *argv).out

    warm = run("--temperature", 2, "--seed", 1)
    assert run("--temperature", 2, "--seed", 1) == warm
    assert run("--temperature", 2, "--seed", 2) != warm
    assert run("--temperature", 2, "--seed", 1, "--top-k", 1) == run() != warm


def test_random_weights_follow_their_seed(cli: Cli, built: Path) -> None:
    def run(seed: int) -> str:
        return cli("run", built, "--ids", "9", "--weights", f"random:{seed}", "-n", 8).out

    assert run(0) == run(0) != run(1)


def test_nothing_new(cli: Cli, built: Path) -> None:
    argv = ("--weights", "random:0", "-n", 0)
    assert cli("run", built, "as it is", *argv).out == "as it is\n"
    assert cli("run", built, "--ids", "1,2", *argv).out == "\n"


@pytest.fixture(scope="session")
def words() -> list[str]:
    """A vocabulary of 200 words."""
    return ["<unk>", *(f"word{n}" for n in range(199))]


@pytest.fixture(scope="session")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a vocabulary of 200: no bytes."""
    from dataclasses import replace

    from moec.models import resolve

    out = tmp_path_factory.mktemp("worded") / "package"
    return moec.build(replace(resolve(PRESET), vocab=200), out=out, dtype="f32").path


def test_a_tokenizer_beside_the_weights(cli: Cli, worded: Path, checkpoint: Path, words: list[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    resize(checkpoint, 200)
    done = cli("run", worded, "word5 word7", "--weights", checkpoint, "-n", 4)
    assert (done.code, done.err) == (0, "")
    new = ids(cli("run", worded, "--ids", "6,8", "--weights", checkpoint, "-n", 4).out)
    assert done.out == "word5 word7" + "".join(words[n] for n in new) + "\n"


def test_a_broken_tokenizer(cli: Cli, built: Path, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    cli("run", built, "a", "--weights", checkpoint).refused("M0601", str(checkpoint / "tokenizer.json"))


def test_no_tokenizer(cli: Cli, worded: Path) -> None:
    cli("run", worded, "word1", "--weights", "random:0").refused("M0601", "tokenizer.json", "200", "--ids")
    assert cli("run", worded, "--ids", "1", "--weights", "random:0", "-n", 2).code == 0


def test_a_layer_has_no_tokens(cli: Cli, layer_package: Path) -> None:
    cli("run", layer_package, "--ids", "1", "--weights", "random:0").refused("M0503", "single layer")


def resize(checkpoint: Path, vocab: int) -> None:
    """The checkpoint with the first ``vocab`` tokens only."""
    from safetensors.torch import load_file, save_file

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:vocab].contiguous()
    save_file(tensors, file)
