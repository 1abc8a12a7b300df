"""moec.ops.route: against transformers' routers, against a sort in Python, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig

from moec.errors import BadInput, NotDifferentiable
from moec.ops import compiled, fused_experts, hash_route, route
from tests.moec.experts import layer, strided

HIDDEN = 32
V3 = {"score": "sigmoid", "renorm": True, "scale": 2.5, "group_score": "top2sum"}
# Family, its router, fields of its configuration, and what route takes; at the published numbers of experts.
ROUTERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "V2": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
        {"score": "softmax", "renorm": False, "scale": 16.0, "groups": 8, "topk_groups": 3, "masked": "zero"},
    ),
    "V2-Lite": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
        {"score": "softmax", "renorm": False},
    ),
    "V3": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
        },
        V3 | {"groups": 8, "topk_groups": 4},
    ),
    "V3, 60 experts in 5 groups": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {
            "n_routed_experts": 60,
            "num_experts_per_tok": 7,
            "n_group": 5,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
        V3 | {"groups": 5, "topk_groups": 2},
    ),
    "V4": (
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        {"n_routed_experts": 256, "num_experts_per_tok": 6, "routed_scaling_factor": 1.5},
        {"score": "sqrtsoftplus", "renorm": True, "scale": 1.5},
    ),
    "Mixtral": (
        "mixtral",
        "MixtralTopKRouter",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        {"score": "softmax", "renorm": True},
    ),
    "Qwen3-Next": (
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        {"num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True},
        {"score": "softmax", "renorm": True},
    ),
    "OLMoE": (
        "olmoe",
        "OlmoeTopKRouter",
        {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
        {"score": "softmax", "renorm": False},
    ),
    "Qwen2": (
        "qwen2_moe",
        "Qwen2MoeTopKRouter",
        {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False},
        {"score": "softmax", "renorm": False},
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_the_routers_of_transformers(name: str) -> None:
    family, router, fields, how = ROUTERS[name]
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[router])
    theirs = getattr(module, router)(AutoConfig.for_model(family, hidden_size=HIDDEN, **fields))
    generator = torch.Generator().manual_seed(1)
    theirs.weight.normal_(generator=generator)
    bias = getattr(theirs, "e_score_correction_bias", None)
    if bias is not None:
        bias.normal_(std=0.3, generator=generator)
    logits, w, id = theirs(torch.randn(50, HIDDEN, generator=generator))
    weights, ids = route(logits, bias, k=fields["num_experts_per_tok"], **how)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    torch.testing.assert_close(spread(weights, ids, logits), spread(w, id, logits))
    if bias is not None:  # which chose: without it others are picked
        assert not torch.equal(route(logits, k=fields["num_experts_per_tok"], **how)[1], ids)


def spread(w: Tensor, id: Tensor, logits: Tensor) -> Tensor:
    """[T, E]: whatever the order in which a router lists its choices."""
    return torch.zeros_like(logits).scatter(1, id.long(), w.float())


SCORE: dict[str, Any] = {
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "sqrtsoftplus": lambda x: math.sqrt(math.log1p(math.exp(x))),
}


@given(st.data())
def test_a_sort_of_lists_agrees(data: st.DataObject) -> None:
    """Many ties, groups of any size, k up to all that may be chosen; a strided bias and strided logits."""
    draw = data.draw
    groups, size = draw(st.sampled_from([(1, 1), (1, 7), (3, 2), (4, 3), (1, 512)]))
    kept = draw(st.integers(1, groups))
    group_score, masked = draw(st.sampled_from(["max", "top2sum"])), draw(st.sampled_from(["zero", "neginf"]))
    k = draw(st.integers(1, min(16, kept * size)))
    score, renorm = draw(st.sampled_from(["sigmoid", "sqrtsoftplus"])), draw(st.booleans())
    seed, experts = draw(st.integers(0, 99)), groups * size
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    logits = torch.randint(-2, 3, (draw(st.integers(0, 4)), experts), generator=generator).to(dtype)
    bias = torch.randint(-1, 2, (experts,), generator=generator) / 4 if draw(st.booleans()) else None
    how: dict[str, Any] = {"k": k, "score": score, "renorm": renorm, "scale": 1.5}
    how |= {"groups": groups, "topk_groups": kept, "group_score": group_score, "masked": masked}
    weights, ids = route(strided(logits), None if bias is None else strided(bias), **how)
    for t, row in enumerate(logits.tolist()):
        scores = [SCORE[score](x) for x in row]
        choice = [s + (0 if bias is None else bias[e].item()) for e, s in enumerate(scores)]
        if groups > 1:
            members = [range(g * size, (g + 1) * size) for g in range(groups)]
            counted = 2 if group_score == "top2sum" else 1
            best = [sorted((choice[e] for e in m), reverse=True)[:counted] for m in members]
            order = sorted(range(groups), key=lambda g: (-round(sum(best[g]), 5), g))
            for g in order[kept:]:
                for e in members[g]:
                    choice[e] = 0.0 if masked == "zero" else -math.inf
                    scores[e] = 0.0 if masked == "zero" else scores[e]
        chosen = sorted(range(experts), key=lambda e: (-round(choice[e], 5), e))[:k]
        assert ids[t].tolist() == chosen
        total = sum(scores[e] for e in chosen) if renorm else 1.0
        expected = torch.tensor([1.5 * scores[e] / total for e in chosen])
        torch.testing.assert_close(weights[t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_a_bad_token_goes_to_k_experts_and_changes_no_other(bad: float, score: str) -> None:
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"k": 5, "score": score, "renorm": True, "groups": 4, "topk_groups": 2}
    clean = route(logits, **how)
    logits[1, 3] = bad
    weights, ids = route(logits, **how)
    assert len(set(ids[1].tolist())) == 5 and int(ids.min()) >= 0 and int(ids.max()) < 12
    assert not math.isnan(bad) or (weights[1].isnan().any() and 3 in ids[1])
    rest = [0, 2, 3]
    assert torch.equal(weights[rest], clean[0][rest]) and torch.equal(ids[rest], clean[1][rest])


def test_what_it_gives_is_what_fused_experts_takes() -> None:
    one = layer(9, experts=8)
    weights, ids = route(torch.randn(9, 8), k=3, score="softmax", renorm=True)
    assert fused_experts(one.x, one.w13, one.w2, weights, ids).shape == one.x.shape


def test_as_a_pytorch_operator() -> None:
    args = (torch.randn(5, 8), torch.randn(8), 3, "sigmoid", 2, 1, "top2sum", "neginf", True, 2.5)
    torch.library.opcheck(torch.ops.moec.route.default, args)

    def block(logits: Tensor) -> tuple[Tensor, Tensor]:
        return route(logits * 2, k=3, score="softmax", renorm=True)

    fast = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 4, 2):
        given = torch.randn(tokens, 16)
        assert all(map(torch.equal, fast(given), block(given)))
    trained = torch.randn(3, 4, requires_grad=True)
    weights, _ = route(trained, k=1, score="softmax", renorm=False)
    with pytest.raises(NotDifferentiable, match="route has no derivative"):
        weights.sum().backward()


def test_the_number_of_tokens_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[compiled.Key] = []
    build = compiled._build
    monkeypatch.setattr(compiled, "_build", lambda key: built.append(key) or build(key))
    for tokens in (1, 2, 100):
        route(torch.randn(tokens, 11), k=3, score="softmax", renorm=True, scale=1.25)
    assert len(built) == 1


FITS: dict[str, Any] = {"k": 2, "score": "softmax", "renorm": True}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"k": 0}, "k is 0; it must be 1 to 8"),
    ({"k": -1}, "k is -1"),
    ({"k": 9}, r"k is 9; it must be 1 to 8, the number of experts: logits is float32 \[5, 8\]"),
    ({"score": "tanh"}, "score is 'tanh'; it must be one of softmax, sigmoid, sqrtsoftplus"),
    ({"groups": 0}, "groups is 0"),
    ({"groups": 3}, "groups is 3; 8 experts can't be parted into so many equal groups"),
    ({"groups": -2}, "groups is -2"),
    ({"groups": 2, "topk_groups": 3}, "topk_groups is 3; it must be 1 to 2"),
    ({"groups": 2, "topk_groups": 0}, "topk_groups is 0"),
    ({"topk_groups": 2}, "topk_groups is 2; it must be 1 to 1"),
    ({"groups": 2, "group_score": "sum"}, "group_score is 'sum'; it must be one of max, top2sum"),
    ({"groups": 2, "masked": "inf"}, "masked is 'inf'; it must be one of zero, neginf"),
    (
        {"groups": 8, "topk_groups": 4, "group_score": "top2sum"},
        "8 groups of 8 experts have one each",
    ),
    ({"groups": 4, "topk_groups": 1, "k": 3}, "k is 3, but 1 groups of 2 experts allow 2"),
    ({"k": 2.0}, "k is 2.0; it must be an integer"),
    ({"k": True}, "k is True; it must be an integer"),
    ({"k": None}, "k is None; it must be an integer"),
    ({"score": None}, "score is None; it must be a word"),
    ({"groups": "8"}, "groups is '8'; it must be an integer"),
    ({"renorm": 1}, "renorm is 1; it must be True or False"),
    ({"scale": "2.5"}, "scale is '2.5'; it must be a finite number"),
    ({"scale": math.nan}, "scale is nan; it must be a finite number"),
    ({"scale": 1e300}, "scale is 1e\\+300; it must be a finite number in float32"),
    ({"scale": math.inf}, "scale is inf"),
    ({"logits": torch.zeros(8)}, r"logits must be .* \[T, E\] = \[\*, \*\], not float32 \[8\]"),
    ({"logits": torch.zeros(5, 8).double()}, "logits must be .* not float64"),
    ({"logits": torch.zeros(5, 8, dtype=torch.int32)}, "logits must be .* not int32"),
    ({"logits": torch.zeros(5, 0)}, "k is 2; it must be 1 to 0"),
    ({"bias": torch.zeros(7)}, r"bias must be float32 \[E\] = \[8\], not float32 \[7\]"),
    ({"bias": torch.zeros(8).half()}, "bias must be float32"),
    ({"bias": torch.zeros(8, device="meta")}, "logits is on cpu, but bias on meta"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{i}-{min(c)}" for i, (c, _) in enumerate(BAD)])
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    given = {"logits": torch.randn(5, 8), **FITS} | changes
    with pytest.raises(BadInput, match=message):
        route(**given)


def test_it_fits_unchanged() -> None:
    route(torch.randn(5, 8), **FITS)
    zero = {"k": 3, "groups": 4, "masked": "zero"}  # V2's: the third is of another group and weighs nothing
    assert (route(torch.randn(5, 8), **FITS | zero)[0] == 0).sum(1).tolist() == [1] * 5


# By a table.
def by_table(experts: int = 8, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    table = torch.rand(20, experts, generator=generator).argsort(1)[:, :k]
    logits = torch.randn(9, experts, generator=generator)
    return logits, table, torch.randint(20, (9,), generator=generator)


@torch.no_grad()
def test_a_table_of_transformers() -> None:
    name = "DeepseekV4HashRouter"
    module = __import__("transformers.models.deepseek_v4.modeling_deepseek_v4", fromlist=[name])
    fields = {"n_routed_experts": 256, "num_experts_per_tok": 6, "vocab_size": 50, "hidden_size": HIDDEN}
    theirs = getattr(module, name)(AutoConfig.for_model("deepseek_v4", **fields))
    generator = torch.Generator().manual_seed(1)
    theirs.weight.normal_(generator=generator)
    theirs.tid2eid.copy_(torch.rand(50, 256, generator=generator).argsort(1)[:, :6])
    tokens = torch.randint(50, (30,), generator=generator)
    logits, w, id = theirs(torch.randn(30, HIDDEN, generator=generator), tokens)
    weights, ids = hash_route(logits, theirs.tid2eid, tokens, score="sqrtsoftplus", renorm=True, scale=1.5)
    torch.testing.assert_close(weights, w)
    assert torch.equal(ids.long(), id)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_what_no_table_names_is_skipped(score: str, integers: torch.dtype) -> None:
    logits, table, tokens = by_table()
    clean = hash_route(logits, table, tokens, score=score, renorm=False)
    tokens[2], tokens[3] = -1, 20
    table[tokens[0], 1] = 8
    given = strided(logits), table.to(integers), tokens.to(integers)
    weights, ids = hash_route(*given, score=score, renorm=False)
    assert ids[2:4].eq(8).all() and weights[2:4].eq(0).all()
    assert ids[0, 1] == 8 and weights[0, 1] == 0
    rest = [t for t in range(9) if t not in (2, 3) and tokens[t] != tokens[0]]
    assert rest and torch.equal(weights[rest], clean[0][rest]) and torch.equal(ids[rest], clean[1][rest])
    one = layer(9, experts=8)
    assert fused_experts(one.x, one.w13, one.w2, weights, ids)[2].eq(0).all()


def test_a_table_as_a_pytorch_operator() -> None:
    torch.library.opcheck(torch.ops.moec.hash_route.default, (*by_table(), "sqrtsoftplus", True, 1.5))
    logits, table, tokens = by_table()
    fast = torch.compile(hash_route, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (9, 4):
        given = (logits[:n], table, tokens[:n])
        wanted = hash_route(*given, score="sigmoid", renorm=True)
        assert all(map(torch.equal, fast(*given, score="sigmoid", renorm=True), wanted))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "softmax"}, "score is 'softmax'; it must be one of sigmoid, sqrtsoftplus"),
        ({"scale": math.nan}, "scale is nan"),
        ({"scale": None}, "scale is None; it must be a finite number"),
        ({"renorm": None}, "renorm is None; it must be True or False"),
        ({"table": torch.zeros(20, 3)}, r"table must be int32 or int64 \[vocab, k\] = .*, not float32"),
        ({"table": torch.zeros(20, 0, dtype=torch.int64)}, "there is nothing to choose"),
        ({"tokens": torch.zeros(8, dtype=torch.int64)}, r"tokens must be int32 or int64 \[T\] = \[9\]"),
        ({"logits": torch.zeros(9)}, "logits must be"),
    ],
)
def test_a_table_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    logits, table, tokens = by_table()
    given = {"logits": logits, "table": table, "tokens": tokens, "score": "sigmoid", "renorm": True}
    with pytest.raises(BadInput, match=message):
        hash_route(**given | changes)
