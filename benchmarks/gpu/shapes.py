"""The layers that are measured, and how fast one could be at best."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Router:
    """How a layer chooses, in the words of ``moec.ops.route``."""

    score: str = "softmax"
    renorm: bool = True
    scale: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    biased: bool = False  # a bias takes part in choosing; a group's score is then its two best summed

    @property
    def group_score(self) -> str:
        return "top2sum" if self.biased else "max"


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer, as one GPU holds them, and how they are chosen."""

    name: str
    experts: int
    intermediate: int
    hidden: int
    top_k: int
    router: Router = Router()

    @property
    def weights(self) -> int:
        """Elements of all experts."""
        return self.experts * self.expert

    @property
    def expert(self) -> int:
        """Elements of one expert: gate, up and down."""
        return 3 * self.intermediate * self.hidden

    def active(self, tokens: int) -> float:
        """How many experts ``tokens`` tokens choose between them, when every choice is as likely."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)

    def flops(self, tokens: int) -> float:
        return 2.0 * tokens * self.top_k * self.expert

    def bytes(self, tokens: int, size: int) -> float:
        """What must move: chosen experts once, x and y, and what passes between the products both ways.

        ``size`` bytes an element; of fp8, x and y have two.
        """
        between = 2 * tokens * self.top_k * self.intermediate
        return size * (self.active(tokens) * self.expert + between) + max(2, size) * 2 * tokens * self.hidden


V3 = Router("sigmoid", scale=2.5, groups=8, topk_groups=4, biased=True)
V2_LITE = Router(renorm=False)

SHAPES = {
    shape.name: shape
    for shape in [
        Shape("mixtral", 8, 14336, 4096, 2),
        Shape("qwen3-30b", 128, 768, 2048, 8),
        Shape("deepseek-v3", 256, 2048, 7168, 8, V3),
        Shape("deepseek-v3-tp4", 256, 512, 7168, 8, V3),
        Shape("deepseek-v3-tp8", 256, 256, 7168, 8, V3),
        Shape("qwen3-235b", 128, 1536, 4096, 8),
        Shape("qwen3-next", 512, 512, 2048, 10),
        Shape("v2-lite", 64, 1408, 2048, 6, V2_LITE),
        Shape("sonic-n2048", 64, 2048, 4096, 4),  # one of those that SonicMoE's authors give figures for
    ]
}
TOKENS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]

QUICK_SHAPES = ["qwen3-30b", "deepseek-v3-tp8"]
QUICK_TOKENS = [1, 8, 64, 512, 4096]

# On a CPU: enough to run every line.
TINY_V3 = Router("sigmoid", scale=2.5, groups=4, topk_groups=2, biased=True)
SELF_TEST_SHAPES = {
    shape.name: shape for shape in [Shape("tiny", 8, 24, 32, 2), Shape("tiny-top6", 16, 16, 40, 6, TINY_V3)]
}
SELF_TEST_TOKENS = [1, 4, 17]
