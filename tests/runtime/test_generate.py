"""Generated text: greedy against the logits without a cache, ragged against alone, sampled by seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import BadInput
from moec.runtime import LanguageModel

VOCAB = 256
prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=4)


def greedy(model: LanguageModel, prompt: list[int], count: int, eos: int | None = None) -> list[int]:
    """One forward pass over the whole text for each token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        if text[-1] == eos:
            break
    return text


def continued(model: LanguageModel, text: list[int], count: int) -> list[int]:
    """The best token after each of the last ``count`` prefixes: one pass, as no token sees a later one."""
    best: list[int] = model(torch.tensor([text]))[0].argmax(-1)[-count - 1 : -1].tolist()
    return best


def lists(found: Any) -> list[list[int]]:
    return [row.tolist() for row in found]


@settings(max_examples=10)
@given(prompts)
def test_greedy_is_the_best_token_of_a_run_without_a_cache(
    model: LanguageModel, texts: list[list[int]]
) -> None:
    for prompt, text in zip(texts, lists(model.generate(texts, max_new_tokens=4)), strict=True):
        assert text[: len(prompt)] == prompt
        assert text[len(prompt) :] == continued(model, text, 4)


@settings(max_examples=10)
@given(prompts)
def test_greedy_with_a_sliding_window(windowed: LanguageModel, texts: list[list[int]]) -> None:
    """Longer than the window, so that keys drop out."""
    for text in lists(windowed.generate(texts, max_new_tokens=6)):
        assert text[-6:] == continued(windowed, text, 6)


def test_past_a_page(model: LanguageModel) -> None:
    page = model.cache_specs[0].page
    prompt = [i % VOCAB for i in range(page - 2)]
    assert lists(model.generate([prompt, [1]], max_new_tokens=6)) == [
        greedy(model, p, 6) for p in (prompt, [1])
    ]


@settings(max_examples=3)
@given(prompts, st.sampled_from([0.0, 0.8]), st.integers(0, 9))
def test_each_prompt_as_if_alone(
    model: LanguageModel, texts: list[list[int]], temperature: float, seed: int
) -> None:
    """What is drawn for a prompt depends on the seed and its place, not on its neighbours."""
    together = lists(model.generate(texts, max_new_tokens=4, temperature=temperature, seed=seed))
    for place, text in enumerate(texts):
        others = [[7]] * place
        alone = model.generate([*others, text], max_new_tokens=4, temperature=temperature, seed=seed)
        assert alone[-1].tolist() == together[place]


def test_seeds(model: LanguageModel) -> None:
    texts = [[1, 2, 3]] * 3

    def draw(seed: int) -> list[list[int]]:
        return lists(model.generate(texts, max_new_tokens=8, temperature=1.5, seed=seed))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    rows = draw(5)
    assert rows[0] != rows[1] != rows[2]  # equal prompts at different places
    assert draw(-1) == draw(-1)


def test_top_k_1_is_greedy(model: LanguageModel) -> None:
    assert lists(model.generate([[5, 6]], max_new_tokens=5, temperature=3.0, top_k=1)) == [
        greedy(model, [5, 6], 5)
    ]


# Ends.
def test_no_new_tokens(model: LanguageModel) -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    assert lists(model.generate([[1], [2, 3]], max_new_tokens=0)) == [[1], [2, 3]]
    assert list(model.stream([[1]], max_new_tokens=0)) == []


@pytest.mark.parametrize("several", [False, True])
def test_an_end_token_ends_a_prompt(model: LanguageModel, several: bool) -> None:
    texts = [[9, 4], [8, 7], [3, 1]]
    free = lists(model.generate(texts, max_new_tokens=6))
    end = free[1][3]  # the second token of the second prompt
    want = [greedy(model, t, 6, end) for t in texts]
    assert len({len(w) for w in want}) > 1
    eos = [255 if end != 255 else 254, end] if several else end
    if several:
        want = [greedy_until(model, t, 6, eos) for t in texts]
    assert lists(model.generate(texts, max_new_tokens=6, eos_token_id=eos)) == want
    longest = max(map(len, want))
    filled = [w + w[-1:] * (longest - len(w)) for w in want]
    assert model.generate(torch.tensor(texts), max_new_tokens=6, eos_token_id=eos).tolist() == filled


def greedy_until(model: LanguageModel, prompt: list[int], count: int, ends: list[int]) -> list[int]:
    text = greedy(model, prompt, count)
    stops = [i for i in range(len(prompt), len(text)) if text[i] in ends]
    return text[: stops[0] + 1] if stops else text


def test_all_prompts_may_end_early(model: LanguageModel) -> None:
    first = greedy(model, [5, 5], 1)[-1]
    assert model.generate(torch.tensor([[5, 5], [5, 5]]), max_new_tokens=9, eos_token_id=first).shape == (
        2,
        3,
    )


@settings(max_examples=6)
@given(prompts, st.sampled_from([None, *range(0, 250, 50)]), st.sampled_from([0.0, 1.0]))
def test_streaming_gives_the_same_tokens(
    model: LanguageModel, texts: list[list[int]], eos: int | None, temperature: float
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": temperature, "eos_token_id": eos}
    texts = [list(t) for t in texts]
    streamed = [list(t) for t in texts]
    for tokens in model.stream(texts, **options):
        assert len(tokens) == len(texts)
        for text, token in zip(streamed, tokens, strict=True):
            if token is not None:
                text.append(token)
    assert streamed == lists(model.generate(texts, **options))


def test_forms_of_prompts(model: LanguageModel) -> None:
    want = [greedy(model, [1, 2], 2), greedy(model, [3, 4], 2)]
    forms: list[Any] = [
        torch.tensor([[1, 2], [3, 4]]),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
        [torch.tensor([1, 2]), torch.tensor([3, 4], dtype=torch.int32)],
        [[1, 2], (3, 4)],
        ((1, 2), [3, 4]),
    ]
    for form in forms:
        found = model.generate(form, max_new_tokens=2)
        assert isinstance(found, torch.Tensor) == isinstance(form, torch.Tensor)
        assert lists(found) == want


def test_arguments_of_other_libraries(model: LanguageModel) -> None:
    want = lists(
        model.generate([[1, 2]], 3, temperature=0.5, top_k=9, top_p=0.5, seed=7, eos_token_id=[5, 6])
    )
    for ids in (np.array([[1, 2]]), [np.array([1, 2], dtype=np.int32)], [[np.int64(1), np.uint8(2)]]):
        for eos in (torch.tensor([5, 6]), np.array([5, 6]), {5, 6}, (np.int64(5), torch.tensor(6))):
            found = model.generate(
                ids,
                np.int64(3),
                temperature=np.float32(0.5),
                top_k=torch.tensor(9),
                top_p=np.float64(0.5),
                seed=np.uint32(7),
                eos_token_id=eos,
            )
            assert lists(found) == want
            assert isinstance(found, torch.Tensor) == isinstance(ids, np.ndarray)


def test_one_end_token_in_any_form(model: LanguageModel) -> None:
    (row,) = lists(model.generate([[1, 2]], 4))
    end = row[2]
    for eos in (end, np.int64(end), torch.tensor(end), torch.tensor([end]), np.array([end]), [end]):
        assert lists(model.generate([[1, 2]], 4, eos_token_id=eos)) == [row[:3]]


# Wrong input.
BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "none": ([], "no prompt"),
    "none, a tensor": (torch.zeros(0, 3, dtype=torch.int64), "no prompt"),
    "empty": ([[1], []], "prompt 1 is empty"),
    "empty, a tensor": (torch.zeros(2, 0, dtype=torch.int64), "prompt 0 is empty"),
    "above": ([[1], [1, 2, 256]], "token id 256 at place 2 of prompt 1 is outside the vocabulary of 256"),
    "below": (torch.tensor([[1, -1]]), "token id -1 at place 1 of prompt 0"),
    "rank 1": (torch.tensor([1, 2]), r"int64 \[B, T\], not int64 \[2\]"),
    "rank 3": (torch.zeros(1, 1, 1, dtype=torch.int64), "int64"),
    "floats": (torch.zeros(1, 2), "not float32"),
    "a prompt of floats": ([torch.zeros(2)], "prompt 0"),
    "a prompt of rank 2": ([torch.zeros(1, 2, dtype=torch.int64)], "prompt 0"),
    "a list of ids": ([1, 2, 3], "prompt 0"),
    "text": ("hello", "not str"),
    "a list of texts": (["hello"], "prompt 0"),
    "fractions": ([[1.5]], "prompt 0"),
    "flags": ([[True]], "prompt 0"),
    "an array of floats": (np.zeros((1, 2)), "not float64"),
    "an array of texts": (np.array([["a"]]), "array of <U1"),
    "a prompt in an array of floats": ([np.zeros(2)], "prompt 0"),
    "nothing": (None, "not NoneType"),
    "too long": ([[1] * 255], "prompt 0 has 255 tokens; with 2 new ones that is more than the 256 positions"),
}


@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_bad_prompts(kind: str, model: LanguageModel) -> None:
    given_ids, words = BAD_PROMPTS[kind]
    for call in (model.generate, model.stream):
        with pytest.raises(BadInput, match=words) as caught:
            call(given_ids, max_new_tokens=2)
        assert "M0601" in str(caught.value)


def test_as_long_as_the_model_allows(model: LanguageModel) -> None:
    assert len(model.generate([[1] * 254], max_new_tokens=2)[0]) == 256


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": -1},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": None},
        {"max_new_tokens": True},
        {"temperature": -1.0},
        {"temperature": "a"},
        {"temperature": "0.5"},
        {"temperature": None},
        {"temperature": torch.tensor([0.1, 0.2])},
        {"top_p": 0.0},
        {"top_p": None},
        {"top_k": -2},
        {"top_k": 1.5},
        {"top_k": None},
        {"seed": 1.5},
        {"seed": None},
        {"eos_token_id": "a"},
        {"eos_token_id": 1.0},
        {"eos_token_id": [1, "b"]},
        {"eos_token_id": torch.tensor([1.5])},
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], model: LanguageModel) -> None:
    (name,) = options
    for call in (model.generate, model.stream):
        with pytest.raises(BadInput, match=name):
            call([[1, 2]], **options)


def test_logits_take_one_tensor(model: LanguageModel) -> None:
    with pytest.raises(BadInput, match="ragged prompts go to generate"):
        model([[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="place 1 of prompt 0"):
        model(torch.tensor([[1, 999]]))
    with pytest.raises(BadInput, match="257 tokens"):
        model(torch.zeros(1, 257, dtype=torch.int64))


def test_weights_that_overflow_are_reported(package: Any, checkpoint: dict[str, torch.Tensor]) -> None:
    import moec

    broken = moec.load(package, {**checkpoint, "model.norm.weight": torch.full((48,), torch.nan)})
    with pytest.raises(BadInput, match="best logit is nan"):
        broken.generate([[1, 2]], max_new_tokens=1)
