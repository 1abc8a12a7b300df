"""What test_sanitizer.py runs under compute-sanitizer: ``python sanitized.py cuda``. Small, and checked."""

from __future__ import annotations

import sys

import torch

from moec.ops import fused_experts, grouped_experts, route, routed_experts
from tests.gpu import reference
from tests.gpu.device import Device
from tests.moec.experts import close, layer
from tests.moec.fp8_experts import BLOCKS, LEAST, FP8Layer, fp8_layer, ratio


def main(device: Device) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (1, 5, 70):
            one = device.layer(layer(tokens, k=3, experts=8, hidden=72, width=40, dtype=dtype))
            one.ids[-1, 0] = -1
            close(fused_experts(*one.args), reference.experts(one), dtype)
            counts = torch.tensor([0, tokens - 1, 0, 0, 1, 0, 0, 0, 0])
            off = counts.cumsum(0).to(device.type, torch.int32)
            close(
                grouped_experts(one.x, off, one.w13, one.w2),
                reference.grouped(one, one.x, off),
                dtype,
            )
    # K in parts, of the first product and of the second; who ends last adds them up.
    for experts, hidden, width in ((16, 4096, 32), (4, 256, 4096)):
        one = device.layer(layer(3, k=2, experts=experts, hidden=hidden, width=width, dtype=torch.bfloat16))
        close(fused_experts(*one.args), reference.experts(one), torch.bfloat16)
    for block in BLOCKS:
        for tokens in (1, 70):
            one8 = fp8_layer(block, tokens=tokens, k=3, experts=8, hidden=136, width=36)
            one8 = FP8Layer(*(t if t is None else t.to(device.type) for t in vars(one8).values()))
            found = fused_experts(*one8.args, **one8.scales)
            assert ratio(found, reference.experts(one8.meant())) > LEAST
            off = torch.tensor([0, tokens - 1, *[tokens] * 7]).to(device.type, torch.int32)
            rows = grouped_experts(one8.x, off, one8.w13, one8.w2, **one8.scales)
            meant = one8.meant()
            assert ratio(rows, reference.grouped(meant, meant.x, off)) > LEAST
    for experts, k in ((60, 6), (256, 8)):
        logits = torch.randn(70, experts, device=device.type)
        weights, ids = route(logits, k=k, score="sqrtsoftplus", renorm=True, groups=4, topk_groups=2)
        assert bool((weights > 0).all()) and int(ids.min()) >= 0 and int(ids.max()) < experts
    for tokens in (1, 17, 300):  # a block alone, and blocks that wait for each other
        one = device.layer(layer(tokens, k=3, experts=60, hidden=72, width=40, dtype=torch.bfloat16))
        logits, how = torch.randn(tokens, 60, device=device.type), {"score": "sigmoid", "renorm": True}
        y = routed_experts(one.x, logits, one.w13, one.w2, k=3, **how)
        assert torch.equal(y, fused_experts(one.x, one.w13, one.w2, *route(logits, k=3, **how)))


if __name__ == "__main__":
    main(Device(sys.argv[1]))
    print("checked")
