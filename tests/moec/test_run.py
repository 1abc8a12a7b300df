"""``moec run``: what is read as a prompt, what is printed, and when."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import moec
from moec.commands.run import Bytes, FromFile

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
    assert done.out == prompt + bytes(new).decode(errors="replace") + "\n"


@pytest.mark.parametrize("text", ["", "é", "a→b", "\N{GRINNING FACE}!"])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_bytes_that_end_within_a_character(text: str, cut: int) -> None:
    ids = list(text.encode())[: len(text.encode()) - cut]
    assert "".join(Bytes().stream(ids)) == bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of GPT-2's kind: characters may be cut between tokens."""
    vocab = {char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    file = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_tokenizer_s_characters_over_several_tokens(byte_level: Path, cut: int) -> None:
    tokenizer = FromFile(byte_level)
    text = "naïve → \N{GRINNING FACE} 道可道 é"
    new = tokenizer.encode(text)
    new = new[: len(new) - cut]
    pieces = list(tokenizer.stream(new))
    assert "".join(pieces) == tokenizer._tokenizer.decode(new)
    assert "\ufffd" not in "".join(pieces[:-1])
    assert len(pieces) >= len(text) - 1, "not all at the end"


def test_spaces_between_the_words_of_a_tokenizer(tmp_path: Path) -> None:
    """Metaspace drops the space before the first word that it decodes, and only that one."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert list(FromFile(tmp_path / "tokenizer.json").stream([0, 1, 2, 0])) == ["a", " b", "c", " a", ""]


def test_a_token_s_cost_does_not_grow_with_the_text(byte_level: Path) -> None:
    tokenizer, lengths = FromFile(byte_level), []

    class Counting:
        def decode(self, ids: list[int]) -> str:
            lengths.append(len(ids))
            return str(inner.decode(ids))

    inner, tokenizer._tokenizer = tokenizer._tokenizer, Counting()
    new = inner.encode("many words, one after the other " * 20).ids
    assert "".join(tokenizer.stream(new)) == inner.decode(new)
    assert max(lengths) <= 8


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


def test_a_trace_of_the_routing_is_written_and_read_again(cli: Cli, built: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.npy"
    run = ("run", built, "--ids", "1,2,3", "-n", "4", "--weights", "random:0")
    plain = cli(*run)
    assert cli(*run, "--record-routing", trace).out == plain.out
    shown = cli("show", built, "--cost", "--at", "T=2", "--routing", trace)
    assert "routing trace.npy: " in shown.out
    cli("show", built, "--cost", "--at", "T=7", "--routing", trace).refused("M0701", "holds 6 tokens")
    cli(*run, "--record-routing", trace).refused("M0501", "--force replaces it")
    assert cli(*run, "--record-routing", trace, "--force").code == 0
    cli(*run, "--record-routing", tmp_path / "trace.bin").refused("M0701", "a trace is a .npy file")
    cli(*run, "--record-routing", tmp_path / "a" / "b.npy").refused("M0502", "can't write")


def test_a_trace_that_cannot_be_written_is_refused_before_the_run(cli: Cli, built: Path) -> None:
    done = cli("run", built, "--weights", "random:0", "--ids", "1,2", "--record-routing", "/proc/t.npy")
    assert (done.code, done.out) == (1, "") and "can't write /proc/t.npy" in done.err
