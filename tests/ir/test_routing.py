"""Routing assumptions against enumeration, simulation and the published table."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BadOption
from moec.ir.routing import (
    Load,
    Trace,
    Uniform,
    Zipf,
    active,
    binomial_cdf,
    chosen_in_turn,
    parse_routing,
    read_trace,
)


def enumerated(weights: list[float], k: int, tokens: int, tile: int) -> dict[str, float]:
    """Every way in which tokens can choose, with its probability: nothing is approximated."""
    experts = range(len(weights))
    one: dict[frozenset[int], float] = {}
    for order in itertools.permutations(experts, k):
        probability, left = 1.0, sum(weights)
        for expert in order:
            probability *= weights[expert] / left
            left -= weights[expert]
        one[frozenset(order)] = one.get(frozenset(order), 0.0) + probability
    found = {"active": 0.0, "most": 0.0, "tiles": 0.0}
    for choices in itertools.product(one.items(), repeat=tokens):
        probability = math.prod(p for _, p in choices)
        rows = [sum(e in chosen for chosen, _ in choices) for e in experts]
        found["active"] += probability * sum(r > 0 for r in rows)
        found["most"] += probability * max(rows)
        found["tiles"] += probability * sum(math.ceil(r / tile) for r in rows)
    return found


ROUTERS = st.integers(1, 4).flatmap(
    lambda e: st.tuples(st.just(e), st.integers(1, e), st.integers(1, 3), st.integers(1, 3))
)


@given(ROUTERS, st.one_of(st.just(0.0), st.floats(0, 3)))
def test_expectations_are_those_of_every_way_to_choose(router: tuple[int, int, int, int], s: float) -> None:
    experts, k, tokens, tile = router
    exact = enumerated([i**-s for i in range(1, experts + 1)], k, tokens, tile)
    for routing in [Zipf(s)] + ([Uniform()] if s == 0 else []):
        load = routing.load(experts, k, tokens, tile)
        assert load.active == pytest.approx(exact["active"], abs=2e-4)
        assert load.tiles == pytest.approx(exact["tiles"], abs=2e-4)
        assert load.mean == pytest.approx(tokens * k / exact["active"], abs=2e-3)
        assert load.waste == pytest.approx(1 - tokens * k / (exact["tiles"] * tile), abs=2e-4)
        # Experts' rows are taken to be independent for this one; the fewer they are, the less they are.
        assert load.most == pytest.approx(exact["most"], rel=0.35)


@pytest.mark.parametrize("s", [0.0, 1.2])
def test_a_simulation_of_v3_s_router_agrees(s: float) -> None:
    """Top-8 of 256 by a race of exponential clocks, 200 steps of 64 tokens."""
    rng = np.random.default_rng(0)
    preference = np.arange(1, 257) ** -s
    ids = np.argsort(rng.exponential(size=(200 * 64, 256)) / preference, axis=1)[:, :8]
    seen = Trace(ids[None]).load(256, 8, 64, tile=16)
    said = (Zipf(s) if s else Uniform()).load(256, 8, 64, tile=16)
    assert said.active == pytest.approx(seen.active, rel=0.01)
    assert said.mean == pytest.approx(seen.mean, rel=0.01)
    assert said.most == pytest.approx(seen.most, rel=0.03)
    assert said.tiles == pytest.approx(seen.tiles, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, 8.0), (8, 57.4), (64, 222.4), (512, 256), (4096, 256), (16384, 256)]
)
def test_the_published_column_of_active_experts(tokens: int, experts: float) -> None:
    assert Uniform().active(256, 8, tokens) == pytest.approx(experts, abs=0.05)
    assert float(active(256, 8, tokens)) == pytest.approx(experts, abs=0.05)
    t = sympy.Symbol("T")
    assert float(active(256, 8, t).subs({t: tokens})) == pytest.approx(experts, abs=0.05)


def test_no_tokens_need_no_experts() -> None:
    for routing in (Uniform(), Zipf(1.0), Trace(np.zeros((1, 4, 1), int))):
        assert routing.load(4, 1, 0) == Load(4, 1, 0, 0.0, 0.0, 0.0, 64, 0.0, 0.0)
        assert routing.active(4, 1, 0) == 0
    assert Uniform().active(4, 4, 0) == 0


@given(st.integers(1, 40), st.floats(0, 10), st.data())
def test_chances_add_up_to_k_and_fall_with_preference(experts: int, s: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts))
    chosen = Zipf(s).chosen(experts, k)
    assert chosen.sum() == pytest.approx(k, rel=1e-9)
    assert (np.diff(chosen) <= 1e-9).all()
    assert chosen.min() >= 0 and chosen.max() <= 1


def test_two_drawn_of_three_by_hand() -> None:
    # Preferences 1/2, 1/3, 1/6: expert 2 is left out with 1/2·(1/3)/(1/2) + 1/3·(1/2)/(2/3) = 7/12.
    left_out = 1 / 2 * (1 / 3) / (1 / 2) + 1 / 3 * (1 / 2) / (2 / 3)
    assert chosen_in_turn((3.0, 2.0, 1.0), 2)[2] == pytest.approx(1 - left_out, abs=1e-10)


@given(st.integers(1, 200), st.floats(0, 1))
def test_binomials_are_torch_s_and_math_s(n: int, p: float) -> None:
    cdf = binomial_cdf(n, p)
    exact = np.cumsum([math.comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(n + 1)])
    assert np.allclose(cdf, exact[: len(cdf)], atol=1e-9)
    assert cdf[-1] == pytest.approx(1, abs=1e-9)


def test_a_trace_is_counted_run_by_run() -> None:
    ids = np.array([[[0, 1], [0, 2], [0, 1], [0, 1], [3, 2]]])  # the fifth token has no partner
    load = Trace(ids).load(4, 2, 2, tile=1)
    # Runs {0,1},{0,2} and {0,1},{0,1}: 3 and 2 experts, 2 rows at most, a tile a row.
    assert load == Load(4, 2, 2, 2.5, 1.6, 2.0, 1, 4.0, 0.0)
    assert Trace(ids).load(4, 2, 2, tile=2) == Load(4, 2, 2, 2.5, 1.6, 2.0, 2, 2.5, 1 - 4 / 5)
    two_layers = np.stack([ids[0], np.tile([2, 3], (5, 1))])
    assert Trace(two_layers).load(4, 2, 2).active == pytest.approx((2.5 + 2) / 2)
    padded = np.stack([ids[0], np.tile([2, -1], (5, 1))])  # a layer that chooses one expert
    assert Trace(padded).load(4, 2, 2).active == 2.5
    assert Trace(padded).load(4, 1, 2).active == 1


@pytest.mark.parametrize(
    ("experts", "k", "tokens", "why"),
    [
        (4, 3, 1, "no layer in it chooses 3 experts"),
        (3, 2, 1, "chooses expert 3, but the model has 3"),
        (4, 2, 6, "holds 5 tokens, fewer than a step's 6"),
    ],
)
def test_a_trace_of_another_model_or_too_short(experts: int, k: int, tokens: int, why: str) -> None:
    with pytest.raises(BadOption, match=why):
        Trace(np.array([[[0, 1], [0, 2], [0, 1], [0, 1], [3, 2]]])).load(experts, k, tokens)


def test_traces_are_read_without_pickle(tmp_path: Path) -> None:
    def saved(array: np.ndarray, name: str = "t.npy") -> Path:
        np.save(tmp_path / name, array, allow_pickle=True)
        return tmp_path / name

    ids = np.arange(12).reshape(2, 3, 2)
    assert (read_trace(saved(ids.astype(np.int16))) == ids).all()
    assert (read_trace(saved(ids[0])) == ids[:1]).all()
    records = np.zeros((2, 3), [("layer", "<i4"), ("id", "<i4", (2,)), ("w", "<f4", (2,))])
    records["id"] = ids
    assert (read_trace(saved(records)) == ids).all()
    for bad in (
        np.array([{"a": 1}], dtype=object),
        np.zeros((2, 3, 2)),
        np.zeros(4, int),
        np.zeros((0, 3, 2), int),
        np.zeros(3, [("w", "<f4")]),
    ):
        with pytest.raises(BadOption, match="trace"):
            read_trace(saved(bad))
    np.savez(tmp_path / "a.npz", ids=ids)
    (tmp_path / "cut.npy").write_bytes(saved(ids).read_bytes()[:100])
    for file in ("a.npz", "cut.npy", "absent.npy"):
        with pytest.raises(BadOption, match="can't read the trace"):
            read_trace(tmp_path / file)


def test_routings_are_parsed_and_printed() -> None:
    for text in ("uniform", "zipf:1.2", "zipf:0"):
        assert str(parse_routing(text)) == text
    for bad, why in [
        ("unifrom", "did you mean uniform"),
        ("zipf", "takes an exponent"),
        ("zipf:", "takes an exponent"),
        ("zipf:nan", "takes an exponent"),
        ("zipf:-1", "takes an exponent"),
        ("zipf:1e9", "takes an exponent"),
        ("", "no routing is called"),
        ("nowhere.npy", "can't read the trace"),
    ]:
        with pytest.raises(BadOption, match=why):
            parse_routing(bad)


def test_no_token_chooses_an_expert_twice(tmp_path: Path) -> None:
    file = tmp_path / "t.npy"
    np.save(file, np.array([[[0, 1], [2, 2]], [[1, 0], [-1, -1]]]))
    with pytest.raises(BadOption, match="token 1 of its layer 0 chooses an expert twice"):
        parse_routing(str(file))
