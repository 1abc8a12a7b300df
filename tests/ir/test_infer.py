"""Type inference: for every op one use that fits, and for every check the same use with one thing wrong."""

from __future__ import annotations

from typing import Any

import pytest

from moec.errors import AttributeMismatch, MoecError, SourceLoc, TypeMismatch
from moec.ir import OPS, Function, Module, Range, parse_module, verify
from moec.ir.op import Op, op_class
from moec.ir.types import DTYPES, bf16, f32, i32, parse_type, symbol

N = symbol("N")
CACHE = "cache<bf16[576], page=64>"
FP8 = "cache<f8e4m3[576], page=64, scale=0.5>"
PACKED = "cache<u8[656], page=64, rank=512>"
OTHER = "cache<u8[660], page=64, rank=508>"  # as many elements
F8 = DTYPES["f8e4m3"]

# op: (operand types, attributes, result types). A name before the type makes the operand that parameter;
# "_" leaves an optional one out.
GOOD: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "add": (["bf16[N,4]", "bf16[4]"], {}, "bf16[N,4]"),
    "add_rms_norm": (["bf16[N,64]", "bf16[N,64]", "f32[64]"], {"eps": 1e-6}, "bf16[N,64], bf16[N,64]"),
    "add_rms_norm_and_quant": (
        ["bf16[N,64]", "bf16[N,64]", "f32[64]"],
        {"eps": 1e-6, "quant": (1, 32)},
        "bf16[N,64], bf16[N,64], f8e4m3[N,64]@s1x32",
    ),
    "attention": (
        ["bf16[N,8,192]", "bf16[S,2,192]", "bf16[S,2,128]", "i32[B+1]", "i32[B+1]"],
        {"scale": 0.1},
        "bf16[N,8,128]",
    ),
    "bind": (["f32[4]"], {"param": "w"}, ""),
    "broadcast": (["bf16[N~3,64]"], {"axis": 1, "size": 16}, "bf16[N~3,16,64]"),
    "cache_read": ([CACHE, "index", "i32[B,P]", "i32[B]"], {}, "bf16[S,576]"),
    "cache_write": ([CACHE, "index", "bf16[N,576]", "i32[N]"], {}, CACHE),
    "call": (
        ["f32[N,4]", CACHE, "i32[N]"],
        {"callee": "f", "carry": 2, "layers": Range(0, 3)},
        f"f32[N,4], {CACHE}",
    ),
    "cast": (["bf16[8*N~4,4]"], {"to": f32}, "f32[8*N~4,4]"),
    "clamp": (["bf16[N]"], {"lo": -1.0, "hi": 1.0}, "bf16[N]"),
    "combine": (["bf16[8*N~256,64]", "i32[8*N]", "f32[N,8]", "bf16[N,64]"], {}, "bf16[N,64]"),
    "concat": (["bf16[N~2,4]", "bf16[N~2,5]"], {}, "bf16[N~2,9]"),
    "dequant": (["f8e4m3[576,7168]@s128x128"], {"to": bf16}, "bf16[576,7168]"),
    "embedding": (["i64[N]", "bf16[100,64]"], {}, "bf16[N,64]"),
    "expert_slots": (["i32[N,8]", "index"], {}, "i32[R]"),
    "for_each": (["f32[N,4]"], {"callee": "f", "carry": 1, "experts": Range(0, 3)}, "f32[N,4]"),
    "gather_grouped_linear": (
        ["bf16[N,64]", "bf16[256,32,64]", "i32[8*N~256]", "i32[257]"],
        {"per_row": 8, "epilogue": "swiglu", "act": "gelu"},
        "bf16[8*N~256,16]",
    ),
    "gather_rows": (["bf16[N,64]", "i32[8*N~256]"], {"per_row": 8}, "bf16[8*N~256,64]"),
    "grouped_linear": (["bf16[8*N~256,64]", "bf16[256,32,64]", "i32[257]"], {}, "bf16[8*N~256,32]"),
    "grouped_linear_combine": (
        ["bf16[8*N~256,64]", "bf16[256,32,64]", "i32[257]", "i32[8*N~256]", "f32[N,8]", "bf16[N,32]"],
        {},
        "bf16[N,32]",
    ),
    "experts": (
        [
            "bf16[N,64]",
            "bf16[256,64,64]",
            "bf16[256,48,32]",
            "i32[257]",
            "i32[8*N~256]",
            "f32[N,8]",
            "bf16[N,48]",
        ],
        {"limit": 7.0},
        "bf16[N,48]",
    ),
    "routed_experts": (
        ["bf16[N,64]", "bf16[257,64,64]", "bf16[257,48,32]", "f32[N,256]", "f32[256]", "bf16[N,48]"],
        {"score": "sigmoid", "k": 8, "shared": 1},
        "bf16[N,48]",
    ),
    "kv_cache_write": (
        [
            "cache<bf16[8,128], page=64>",
            "index",
            "bf16[N,4,128]",
            "bf16[N,4,128]",
            "f32[N,32]",
            "f32[N,32]",
            "i64[N]",
            "bf16[128]",
        ],
        {"layout": "half", "eps": 1e-6},
        "cache<bf16[8,128], page=64>",
    ),
    "hash_route": (
        ["bf16[N,256]", "i64[1000,6]", "i64[N]"],
        {"score": "sqrtsoftplus", "k": 6},
        "f32[N,6], i32[N,6]",
    ),
    "head_linear": (["bf16[N,16,64]", "bf16[16,32,64]"], {}, "bf16[N,16,32]"),
    "latent_attention": (
        ["bf16[N,16,576]", CACHE, "index", "i32[B,P]", "i32[B+1]", "i32[B]"],
        {"rank": 512, "scale": 0.1},
        "bf16[N,16,512]",
    ),
    "latent_cache_write": (
        [CACHE, "index", "bf16[N,576]", "bf16[512]", "f32[N,32]", "f32[N,32]", "i64[N]"],
        {"layout": "interleaved", "eps": 1e-6},
        CACHE,
    ),
    "linear": (["bf16[8*N~4,64]", "bf16[32,64]", "bf16[32]"], {"acc": f32}, "f32[8*N~4,32]"),
    "local_experts": (
        ["f32[N,8]", "i32[N,8]"],
        {"first": 64, "experts": 64},
        "f32[N,8], i32[N,8]",
    ),
    "local_sort": (
        ["f32[N,8]", "i32[N,8]"],
        {"first": 64, "experts": 64},
        "f32[N,8], i32[N,8], i32[8*N~64], i32[65]",
    ),
    "local_sort_and_quant": (
        ["f32[N,8]", "i32[N,8]", "bf16[N,7168]"],
        {"first": 64, "experts": 64, "quant": (1, 128)},
        "f32[N,8], i32[N,8], i32[8*N~64], i32[65], f8e4m3[N,7168]@s1x128",
    ),
    "merge_rows": (["bf16[M,4]", "i32[M]", "bf16[N-M,4]", "i32[N-M]"], {}, "bf16[N,4]"),
    "mul": (["bf16[1,4]", "bf16[N,1]"], {}, "bf16[N,4]"),
    "norm_rope": (
        ["bf16[N,8,64]", "f32[N,32]", "f32[N,32]", "f32[512]", "bf16[N,8,512]"],
        {"layout": "interleaved", "norm": "full", "eps": 1e-6},
        "bf16[N,8,576]",
    ),
    "paged_attention": (
        ["bf16[N,8,64]", "cache<bf16[4,64], page=16>", "index", "i32[B,P]", "i32[B+1]", "i32[B]"],
        {"scale": 0.1},
        "bf16[N,8,64]",
    ),
    "prefix_sum": (["i32[B]"], {}, "i32[B+1]"),
    "quant": (["bf16[N~2,7168]"], {"block": (1, 128)}, "f8e4m3[N~2,7168]@s1x128"),
    "refine": (["f8e4m3[576,7168]@s128x*"], {"block": (64, 32)}, "f8e4m3[576,7168]@s64x32"),
    "reshape": (["bf16[N~2,6]"], {"shape": (N, 2, 3)}, "bf16[N~2,2,3]"),
    "rms_norm": (["bf16[N,64]", "f32[64]"], {"eps": 1e-6}, "bf16[N,64]"),
    "rope": (["bf16[N,8,64]", "f32[N,32]", "f32[N,32]"], {"layout": "half"}, "bf16[N,8,64]"),
    "rope_table": (["i64[N]"], {"dim": 64, "theta": 1e4}, "f32[N,32], f32[N,32]"),
    "route": (["f32[N,256]", "f32[256]"], {"score": "sigmoid", "k": 8}, "f32[N,8], i32[N,8]"),
    "route_sort": (
        ["f32[N,256]", "f32[256]"],
        {"score": "sigmoid", "k": 8, "shared": 1},
        "f32[N,9], i32[N,9], i32[9*N~257], i32[258]",
    ),
    "route_sort_and_quant": (
        ["f32[N,256]", "_", "bf16[N,7168]"],
        {"score": "sigmoid", "k": 8, "quant": (1, 128), "quant_scale": "ue8m0"},
        "f32[N,8], i32[N,8], i32[8*N~256], i32[257], f8e4m3[N,7168]@s1x128",
    ),
    "scaled": (
        ["f8e4m3[2,576,7168]", "f32[2,5,56]"],
        {"block": (128, 128)},
        "f8e4m3[2,576,7168]@s128x128",
    ),
    "scatter_add": (["f32[N,64]", "bf16[R,64]", "i32[R]", "f32[N,8]"], {"per_row": 8}, "f32[N,64]"),
    "sigmoid": (["bf16[N~3,4]"], {}, "bf16[N~3,4]"),
    "sort_by_expert": (["i32[N,8]"], {"experts": 256}, "i32[8*N~256], i32[257]"),
    "sort_by_expert_and_quant": (
        ["i32[N,8]", "bf16[N,7168]"],
        {"experts": 256, "quant": (1, 128)},
        "i32[8*N~256], i32[257], f8e4m3[N,7168]@s1x128",
    ),
    "split": (["bf16[N~2,576]"], {"sizes": (512, 64)}, "bf16[N~2,512], bf16[N~2,64]"),
    "split_batch": (
        ["i64[N]", "i32[B+1]", "i32[B]", "i32[B,P]"],
        {"below": 171},
        "i32[N0], i32[B0+1], i32[B0], i32[B0,P], i32[N-N0], i32[B-B0+1], i32[B-B0], i32[B-B0,P]",
    ),
    "stack": (["$w.*.up: bf16[4,5]"], {"experts": Range(0, 7)}, "bf16[8,4,5]"),
    "swiglu": (["bf16[N~2,64]"], {}, "bf16[N~2,32]"),
    "take_rows": (["bf16[N~3,4,5]", "i32[M]"], {}, "bf16[M,4,5]"),
    "zeros_like": (["bf16[N,4]"], {"dtype": f32}, "f32[N,4]"),
}

# (op, what differs from its entry above, the message after "op: "). Operands by number, attributes by name.
BAD: list[tuple[str, dict[int | str, Any], str]] = [
    ("add", {1: "f32[4]"}, "the dtype is bf16 in %a but f32 in %b"),
    ("add", {1: "bf16[5]"}, "axis 1 of %a is 4 but axis 0 of %b is 5"),
    ("add", {0: "bf16[4]", 1: "bf16[M,5]"}, "axis 1 of %b is 5 but axis 0 of %a is 4"),
    ("add", {0: "index"}, "%a is index, not a tensor"),
    ("add_rms_norm", {1: "bf16[64]"}, "%x is bf16[N,64] but %residual is bf16[64]"),
    ("add_rms_norm", {2: "f32[63]"}, "K is 64 in %x but 63 in %w"),
    ("add_rms_norm_and_quant", {2: "f32[63]"}, "K is 64 in %x but 63 in %w"),
    ("add_rms_norm", {"eps": -1.0}, "eps is -1.0: it must be 0 or more, and finite"),
    ("add_rms_norm", {"scale": "ue8m0"}, "scale is ue8m0, but quant isn't given"),
    ("rms_norm", {"quant": (1, 4, 4, 4)}, "blocks of 1x4x4x4 don't fit %x, bf16[N,64]"),
    ("attention", {1: "bf16[S,2,64]"}, "D is 192 in %q but 64 in %k"),
    ("attention", {2: "bf16[M,2,128]"}, "S is S in %k but M in %v"),
    ("attention", {2: "bf16[S,4,128]"}, "kv_heads is 2 in %k but 4 in %v"),
    ("attention", {1: "f32[S,2,192]"}, "the dtype is bf16 in %q but f32 in %k"),
    ("attention", {2: "f32[S,2,128]"}, "the dtype is bf16 in %q but f32 in %v"),
    ("attention", {4: "i32[B]"}, "B+1 is B + 1 in %cu_q but B in %cu_k"),
    ("attention", {3: "f32[B+1]"}, "%cu_q is f32[B+1], not integers"),
    ("attention", {0: "bf16[N,3,192]"}, "3 query heads can't share 2 key heads equally"),
    ("attention", {0: "bf16[N,H,192]"}, "H query heads can't share 2 key heads equally"),
    ("attention", {1: "bf16[S,0,192]", 2: "bf16[S,0,128]"}, "8 query heads can't share 0 key heads equally"),
    ("attention", {0: "bf16[N,192]"}, "%q is bf16[N,192], not of rank 3"),
    ("attention", {"window": -1}, "window is -1"),
    ("bind", {0: CACHE}, f"%x is {CACHE}, not a tensor"),
    ("broadcast", {"axis": 3}, "axis 3 of a tensor of rank 3"),
    ("broadcast", {"size": 0}, "size is 0"),
    ("cache_read", {0: "bf16[4]"}, "%cache is bf16[4], not a cache"),
    ("cache_read", {1: "i32[1]"}, "%layer is i32[1], not an index"),
    ("cache_read", {3: "i32[M]"}, "B is B in %block_table but M in %seq_lens"),
    ("cache_read", {2: "f32[B,P]"}, "%block_table is f32[B,P], not integers"),
    ("cache_read", {3: "bf16[B]"}, "%seq_lens is bf16[B], not integers"),
    ("cache_read", {0: FP8}, f"%cache is {FP8}: to must say a dtype of its entries"),
    ("cache_read", {0: FP8, "to": i32}, f"%cache is {FP8}: to must say a dtype of its entries"),
    ("cache_read", {"to": f32}, f"%cache is {CACHE}, but to is f32"),
    ("cache_write", {0: FP8, 2: "i32[N,576]"}, f"%entry is i32[N,576], which doesn't fit {FP8}"),
    ("cache_write", {0: PACKED, 2: "bf16[N,656]"}, f"%entry is bf16[N,656], which doesn't fit {PACKED}"),
    (
        "latent_attention",
        {0: "bf16[N,16,656]", 1: PACKED},
        f"%q is bf16[N,16,656], which doesn't fit {PACKED}",
    ),
    ("latent_attention", {1: PACKED, "rank": 511}, f"rank is 511, but %cache is {PACKED}"),
    ("latent_cache_write", {0: OTHER}, f"c is 512 wide in %w, but %cache is {OTHER}"),
    ("paged_attention", {1: PACKED}, f"%q is bf16[N,8,64], which doesn't fit {PACKED}"),
    ("cache_write", {0: "bf16[4]"}, "%cache is bf16[4], not a cache"),
    ("cache_write", {1: "i32[1]"}, "%layer is i32[1], not an index"),
    ("cache_write", {2: "bf16[N,512]"}, f"%entry is bf16[N,512], which doesn't fit {CACHE}"),
    ("cache_write", {2: "f32[N,576]"}, f"%entry is f32[N,576], which doesn't fit {CACHE}"),
    ("cache_write", {2: "bf16[]"}, "%entry is bf16[], but needs an axis"),
    ("cache_write", {3: "i32[M]"}, "N is N in %entry but M in %slot_mapping"),
    ("cache_write", {3: "f32[N]"}, "%slot_mapping is f32[N], not integers"),
    ("call", {"carry": 4}, "returns 4 values but takes 3"),
    ("clamp", {"lo": 2.0}, "lo is 2.0, above hi, 1.0"),
    ("combine", {2: "f32[N,4]"}, "T·k is 8*N in %rows but 4*N in %w"),
    ("combine", {1: "i32[N]"}, "T·k is 8*N in %rows but N in %slot"),
    ("combine", {1: "f32[8*N]"}, "%slot is f32[8*N], not integers"),
    ("combine", {3: "bf16[N,63]"}, "%plus is bf16[N,63] but the result bf16[N,64]"),
    (
        "combine",
        {1: "_"},
        "%rows is bf16[8*N~256,64], by expert, but no slot says whose rows they are",
    ),
    ("concat", {1: "f32[N,5]"}, "the dtype is bf16 in %xs.0 but f32 in %xs.1"),
    ("concat", {1: "bf16[M,5]"}, "axis 0 is N in %xs.0 but M in %xs.1"),
    ("concat", {1: "bf16[N]"}, "%xs.1 is bf16[N], not of rank 2"),
    ("concat", {"axis": 2}, "axis 2 of a tensor of rank 2"),
    ("quant", {0: "f8e4m3[N,7168]@s1x128"}, "%x is f8e4m3[N,7168]@s1x128: this op doesn't read block scales"),
    ("quant", {0: "f8e4m3[N,7168]"}, "%x is f8e4m3[N,7168], no floats to quantise"),
    ("quant", {0: "i32[N,7168]"}, "%x is i32[N,7168], no floats to quantise"),
    ("quant", {0: "bf16[N]"}, "blocks of 1x128 don't fit %x, bf16[N]"),
    ("refine", {0: "f8e4m3[576,7168]"}, "%x is f8e4m3[576,7168], which has no scales"),
    ("refine", {"block": (64,)}, "blocks of 64 don't divide those of f8e4m3[576,7168]@s128x*"),
    ("refine", {"block": (96, 32)}, "blocks of 96x32 don't divide those of f8e4m3[576,7168]@s128x*"),
    ("refine", {"block": (0, 0)}, "blocks of *x* don't divide those of f8e4m3[576,7168]@s128x*"),
    (
        "scaled",
        {1: "f32[2,4,56]"},
        "%scale is f32[2,4,56], not the f32[2,5,56] that f8e4m3[2,576,7168]@s128x128 asks for",
    ),
    (
        "scaled",
        {1: "bf16[2,5,56]"},
        "%scale is bf16[2,5,56], not the f32[2,5,56] that f8e4m3[2,576,7168]@s128x128 asks for",
    ),
    ("scaled", {0: "bf16[2,576,7168]"}, "%q is bf16[2,576,7168], not fp8"),
    ("scaled", {0: "f8e4m3[7168]"}, "blocks of 128x128 don't fit %q, f8e4m3[7168]"),
    # Scaled operands, where plain ones would do.
    ("linear", {0: "f8e4m3[8*N~4,64]@s1x32"}, "%w is bf16[32,64], but %x has scales: both must, or neither"),
    ("linear", {1: "f8e4m3[32,64]@s32x32"}, "%x is bf16[8*N~4,64], but %w has scales: both must, or neither"),
    (
        "linear",
        {0: "f8e4m3[8*N~4,64]@s32", 1: "f8e4m3[32,64]@s32x32"},
        "%x is f8e4m3[8*N~4,64]@s32: a product takes fp8 with scales of rows x columns",
    ),
    (
        "linear",
        {0: "f8e4m3[8*N~4,64]@s2x32", 1: "f8e4m3[32,64]@s32x32"},
        "%x is f8e4m3[8*N~4,64]@s2x32: a block of x is one row or all (1x.. or *x..)",
    ),
    (
        "linear",
        {0: "i8[8*N~4,64]@s1x32", 1: "f8e4m3[32,64]@s32x32"},
        "%x is i8[8*N~4,64]@s1x32: a product takes fp8 with scales of rows x columns",
    ),
    ("grouped_linear", {"to": f32}, "to is f32, but only a product of scaled operands leaves their dtype"),
    (
        "grouped_linear",
        {0: "f8e4m3[8*N~256,64]@s1x32"},
        "%w is bf16[256,32,64], but %x has scales: both must, or neither",
    ),
    ("gather_grouped_linear", {"limit": -1.0}, "limit is -1.0; it must be a positive number in float32"),
    (
        "gather_grouped_linear",
        {"epilogue": "none", "act": "silu", "limit": 7.0},
        "limit is 7.0, but no epilogue applies it",
    ),
    ("gather_grouped_linear", {"scale": "ue8m0"}, "scale is ue8m0, but quant isn't given"),
    (
        "gather_grouped_linear",
        {0: "f8e4m3[N,64]@s1x32", 1: "f8e4m3[256,32,64]@s32x32", "quant": (1, 8), "to": bf16},
        "to is bf16, but quant makes the result fp8",
    ),
    ("gather_grouped_linear", {"quant": (1, 1, 1)}, "blocks of 1x1x1 don't fit %x, bf16[8*N~256,16]"),
    (
        "gather_rows",
        {0: "f8e4m3[N,64]@s2x32"},
        "%x is f8e4m3[N,64]@s2x32: rows that share scales can't be gathered one by one",
    ),
    (
        "concat",
        {0: "f8e4m3[N,4]@s1x4", 1: "f8e4m3[N,4]@s1x2"},
        "the block of scales is 1x4 in %xs.0 but 1x2 in %xs.1",
    ),
    (
        "concat",
        {0: "f8e4m3[N,6]@s1x4", 1: "f8e4m3[N,4]@s1x4"},
        "%xs.0 is f8e4m3[N,6]@s1x4: a part of 6 along axis 1 would end within a block of 4; "
        "refine the scales first",
    ),
    (
        "concat",
        {0: "f8e4m3[N,6]@s1x*", 1: "f8e4m3[N,4]@s1x*"},
        "%xs.0 is f8e4m3[N,6]@s1x*: parts with a scale each, along axis 1, can't share one; "
        "refine the scales first",
    ),
    (
        "split",
        {0: "f8e4m3[N,576]@s1x128", "sizes": (448, 128)},
        "%x is f8e4m3[N,576]@s1x128: a part of 448 along axis 1 would end within a block of 128; "
        "refine the scales first",
    ),
    (
        "reshape",
        {0: "f8e4m3[N,6]@s1x4"},
        "%x is f8e4m3[N,6]@s1x4: in shape [N,2,3] blocks of 1x4 would hold other elements; "
        "refine the scales first",
    ),
    ("dequant", {0: "index"}, "%x is index, not a tensor"),
    ("dequant", {0: "bf16[576,7168]"}, "%x is bf16[576,7168], which has no scales"),
    ("embedding", {0: "f32[N]"}, "%ids is f32[N], not integers"),
    ("embedding", {1: "bf16[64]"}, "%table is bf16[64], not of rank 2"),
    ("expert_slots", {0: "f32[N,8]"}, "%id is f32[N,8], not integers"),
    ("expert_slots", {1: "i32[1]"}, "%expert is i32[1], not an index"),
    ("for_each", {"carry": 2}, "returns 2 values but takes 1"),
    ("gather_grouped_linear", {0: "bf16[64]"}, "%x is bf16[64], not of rank 2"),
    ("gather_grouped_linear", {1: "bf16[32,64]"}, "%w is bf16[32,64], not of rank 3"),
    ("gather_grouped_linear", {1: "bf16[256,32,63]"}, "K is 64 in %x but 63 in %w"),
    ("gather_grouped_linear", {1: "f32[256,32,64]"}, "the dtype is bf16 in %x but f32 in %w"),
    ("gather_grouped_linear", {2: "f32[8*N]"}, "%slot is f32[8*N], not integers"),
    ("gather_grouped_linear", {2: "i32[N,8]"}, "%slot is i32[N,8], not of rank 1"),
    ("gather_grouped_linear", {2: "i32[8*N~8]"}, "the number of groups is 8 in %slot but 256 in %w"),
    ("gather_grouped_linear", {3: "i32[256]"}, "E+1 is 257 in %w but 256 in %off"),
    ("gather_grouped_linear", {3: "f32[257]"}, "%off is f32[257], not integers"),
    ("gather_grouped_linear", {"per_row": 0}, "per_row is 0"),
    (
        "gather_grouped_linear",
        {1: "bf16[256,33,64]"},
        "%w is bf16[256,33,64]: gate and up need an even number of rows",
    ),
    (
        "gather_grouped_linear",
        {1: "bf16[256,N,64]"},
        "%w is bf16[256,N,64]: gate and up need an even number of rows",
    ),
    ("gather_grouped_linear", {"epilogue": "none"}, "act is gelu, but no epilogue applies it"),
    ("gather_rows", {0: "bf16[N]"}, "%x is bf16[N], not of rank 2"),
    ("gather_rows", {1: "f32[N]"}, "%slot is f32[N], not integers"),
    ("gather_rows", {"per_row": 0}, "per_row is 0"),
    ("grouped_linear", {1: "bf16[256,32,63]"}, "K is 64 in %x but 63 in %w"),
    ("grouped_linear", {1: "f32[256,32,64]"}, "the dtype is bf16 in %x but f32 in %w"),
    ("grouped_linear", {2: "i32[256]"}, "E+1 is 257 in %w but 256 in %off"),
    ("grouped_linear", {2: "f32[257]"}, "%off is f32[257], not integers"),
    ("grouped_linear", {0: "bf16[N~8,64]"}, "the number of groups is 8 in %x but 256 in %w"),
    ("grouped_linear", {3: "i32[N]"}, "R is 8*N in %x but N in %slot"),
    ("grouped_linear", {3: "f32[8*N]"}, "%slot is f32[8*N], not integers"),
    ("hash_route", {"k": 8}, "k is 8, but %table names 6 experts a token"),
    ("hash_route", {1: "f32[1000,6]"}, "%table is f32[1000,6], not integers"),
    ("hash_route", {2: "i64[T]"}, "T is N in %logits but T in %tokens"),
    ("grouped_linear_combine", {1: "bf16[256,32,63]"}, "K is 64 in %x but 63 in %w"),
    ("grouped_linear_combine", {2: "i32[256]"}, "E+1 is 257 in %w but 256 in %off"),
    ("grouped_linear_combine", {3: "i32[N]"}, "R is 8*N in %x but N in %slot"),
    ("grouped_linear_combine", {3: "f32[8*N]"}, "%slot is f32[8*N], not integers"),
    ("grouped_linear_combine", {4: "f32[N,4]"}, "T·k is 8*N in %x but 4*N in %weights"),
    ("grouped_linear_combine", {5: "bf16[N,31]"}, "%plus is bf16[N,31] but the result bf16[N,32]"),
    (
        "grouped_linear_combine",
        {"rows": f32},
        "to is f32, but only a product of scaled operands leaves their dtype",
    ),
    ("experts", {1: "bf16[256,63,64]"}, "%w13 is bf16[256,63,64]: gate and up need an even number of rows"),
    ("experts", {2: "bf16[256,48,31]"}, "K is 32 in %h but 31 in %w2"),
    ("experts", {3: "i32[256]"}, "E+1 is 257 in %w13 but 256 in %off"),
    ("experts", {5: "f32[N,4]"}, "T·k is 8*N in %h but 4*N in %weights"),
    ("experts", {5: "f32[N,K]"}, "%weights is f32[N,K]: k isn't known"),
    ("experts", {"limit": -1.0}, "limit is -1.0; it must be a positive number in float32"),
    ("routed_experts", {1: "bf16[256,64,64]"}, "E + shared is 257 in %logits but 256 in %w13"),
    ("routed_experts", {"k": 300}, "k is 300 of 256 experts"),
    ("routed_experts", {5: "bf16[N,47]"}, "%plus is bf16[N,47] but the result bf16[N,48]"),
    ("head_linear", {0: "bf16[N,64]"}, "%x is bf16[N,64], not of rank 3"),
    ("head_linear", {1: "bf16[32,64]"}, "%w is bf16[32,64], not of rank 3"),
    (
        "head_linear",
        {0: "f8e4m3[N,16,64]@s1x64"},
        "%x is f8e4m3[N,16,64]@s1x64: this op doesn't read block scales",
    ),
    ("head_linear", {1: "f32[16,32,64]"}, "the dtype is bf16 in %x but f32 in %w"),
    ("head_linear", {1: "bf16[8,32,64]"}, "heads is 16 in %x but 8 in %w"),
    ("head_linear", {1: "bf16[16,32,63]"}, "K is 64 in %x but 63 in %w"),
    ("head_linear", {"transposed": True}, "K is 64 in %x but 32 in %w"),
    ("latent_attention", {0: "bf16[N,576]"}, "%q is bf16[N,576], not of rank 3"),
    ("latent_attention", {0: "bf16[N,H,576]"}, "%q is bf16[N,H,576]: its heads must be known"),
    ("latent_attention", {0: "bf16[N,16,512]"}, f"%q is bf16[N,16,512], which doesn't fit {CACHE}"),
    ("latent_attention", {0: "f32[N,16,576]"}, "the dtype is f32 in %q but bf16 in %cache"),
    ("latent_attention", {1: "bf16[4,576]"}, "%cache is bf16[4,576], not a cache"),
    (
        "latent_attention",
        {1: "cache<bf16[1,576], page=64>"},
        "%q is bf16[N,16,576], which doesn't fit cache<bf16[1,576], page=64>",
    ),
    ("latent_attention", {2: "i32[1]"}, "%layer is i32[1], not an index"),
    ("latent_attention", {3: "i32[M,P]"}, "B is M in %block_table but B in %seq_lens"),
    ("latent_attention", {4: "i32[B]"}, "B+1 is B in %cu_q but B + 1 in %seq_lens"),
    ("latent_attention", {4: "f32[B+1]"}, "%cu_q is f32[B+1], not integers"),
    ("latent_attention", {5: "f32[B]"}, "%seq_lens is f32[B], not integers"),
    ("latent_attention", {"rank": 0}, "rank is 0, of entries that are 576 wide"),
    ("latent_attention", {"rank": 577}, "rank is 577, of entries that are 576 wide"),
    ("latent_attention", {"window": -1}, "window is -1"),
    ("kv_cache_write", {3: "bf16[N,4,64]"}, "k and v is bf16[N,4,128] in %k but bf16[N,4,64] in %v"),
    ("kv_cache_write", {0: "bf16[N,4]"}, "%cache is bf16[N,4], not a cache"),
    ("kv_cache_write", {1: "i32[N]"}, "%layer is i32[N], not an index"),
    ("kv_cache_write", {6: "i64[M]"}, "N is N, but %slot_mapping is i64[M]"),
    ("kv_cache_write", {0: CACHE}, f"the entries are bf16[N,8,128], which doesn't fit {CACHE}"),
    ("latent_cache_write", {3: "bf16[448]"}, "C+R is 576 in %kv_a but 512 in %w"),
    ("latent_cache_write", {5: "f32[N,16]"}, "the table is f32[N,32] in %cos but f32[N,16] in %sin"),
    ("latent_cache_write", {"eps": float("inf")}, "eps is inf: it must be 0 or more, and finite"),
    ("latent_attention", {2: "i32[1]"}, "%layer is i32[1], not an index"),
    ("latent_attention", {3: "i32[M,P]"}, "B is M in %block_table but B in %seq_lens"),
    ("latent_attention", {4: "i32[B]"}, "B+1 is B in %cu_q but B + 1 in %seq_lens"),
    ("latent_attention", {4: "f32[B+1]"}, "%cu_q is f32[B+1], not integers"),
    ("latent_attention", {5: "f32[B]"}, "%seq_lens is f32[B], not integers"),
    ("latent_attention", {"rank": 0}, "rank is 0, of entries that are 576 wide"),
    ("latent_attention", {"rank": 577}, "rank is 577, of entries that are 576 wide"),
    ("latent_attention", {"window": -1}, "window is -1"),
    ("linear", {1: "bf16[32,63]"}, "K is 64 in %x but 63 in %w"),
    ("linear", {1: "f32[32,64]"}, "the dtype is bf16 in %x but f32 in %w"),
    ("linear", {2: "bf16[31]"}, "N is 31 in %bias but 32 in %w"),
    ("linear", {0: "bf16[]"}, "%x is bf16[], but needs an axis"),
    ("rms_norm", {0: "f8e4m3[N,64]@s1x64"}, "%x is f8e4m3[N,64]@s1x64: this op doesn't read block scales"),
    ("local_experts", {1: "f32[N,8]"}, "%id is f32[N,8], not integers"),
    ("local_experts", {1: "i32[M,8]"}, "T is N in %w but M in %id"),
    ("local_experts", {1: "i32[N,4]"}, "k is 8 in %w but 4 in %id"),
    ("local_experts", {0: "f32[N]"}, "%w is f32[N], not of rank 2"),
    ("local_experts", {"experts": 0}, "experts is 0 and first 64"),
    ("local_experts", {"first": -1}, "experts is 64 and first -1"),
    ("local_sort", {1: "f32[N,8]"}, "%id is f32[N,8], not integers"),
    ("local_sort", {"experts": 0}, "experts is 0 and first 64"),
    ("local_sort_and_quant", {2: "bf16[M,7168]"}, "T is N in %w but M in %x"),
    ("local_sort_and_quant", {"experts": 0}, "experts is 0 and first 64"),
    ("merge_rows", {2: "f32[N-M,4]"}, "the dtype is bf16 in %a but f32 in %b"),
    ("merge_rows", {2: "bf16[N-M,5]"}, "a row is bf16[4] in %a but bf16[5] in %b"),
    ("merge_rows", {1: "i32[N]"}, "M is M in %a but N in %a_rows"),
    ("merge_rows", {3: "i32[N]"}, "M is -M + N in %b but N in %b_rows"),
    ("merge_rows", {1: "f32[M]"}, "%a_rows is f32[M], not integers"),
    ("mul", {1: "bf16[N,2]"}, "axis 1 of %a is 4 but axis 1 of %b is 2"),
    ("norm_rope", {"start": 1}, "%x is bf16[N,8,64]: columns 1..64 aren't all there"),
    ("norm_rope", {"start": -1}, "%x is bf16[N,8,64]: columns -1..62 aren't all there"),
    ("norm_rope", {"lo": 1.0, "hi": 0.0}, "lo is 1.0, above hi, 0.0"),
    ("norm_rope", {"norm": "head"}, "norm is head, of 64 columns, but %w is f32[512]"),
    ("norm_rope", {3: "_"}, "norm is full and eps 1e-06, but there is no w"),
    ("norm_rope", {1: "bf16[N,32]", 2: "bf16[N,32]"}, "the table is bf16[N,32], not f32 of a known width"),
    ("norm_rope", {0: "bf16[M,8,64]"}, "N is M, but the table is f32[N,32]"),
    ("norm_rope", {4: "bf16[N,4,512]"}, "%before is bf16[N,4,512], but %x is bf16[N,8,64]"),
    (
        "paged_attention",
        {0: "bf16[N,8,32]"},
        "%q is bf16[N,8,32], which doesn't fit cache<bf16[4,64], page=16>",
    ),
    (
        "paged_attention",
        {1: CACHE},
        f"%q is bf16[N,8,64], which doesn't fit {CACHE}",
    ),
    (
        "paged_attention",
        {1: "cache<bf16[3,64], page=16>"},
        "8 query heads can't share the keys of cache<bf16[3,64], page=16>",
    ),
    (
        "paged_attention",
        {1: "cache<bf16[6,64], page=16>"},
        "8 query heads can't share the keys of cache<bf16[6,64], page=16>",
    ),
    ("paged_attention", {"window": -1}, "window is -1"),
    ("prefix_sum", {0: "f32[B]"}, "%n is f32[B], not integers"),
    ("prefix_sum", {0: "i32[B,2]"}, "%n is i32[B,2], not of rank 1"),
    ("reshape", {"shape": (N, 7)}, "%x is bf16[N~2,6], which has another number of elements than [N,7]"),
    ("rms_norm", {1: "f32[63]"}, "K is 64 in %x but 63 in %w"),
    ("rms_norm", {0: "bf16[]"}, "%x is bf16[], but needs an axis"),
    ("rope", {2: "f32[N,31]"}, "the table is f32[N,32] in %cos but f32[N,31] in %sin"),
    ("rope", {1: "bf16[N,32]", 2: "bf16[N,32]"}, "the table is bf16[N,32], not f32"),
    ("rope", {0: "bf16[N,8,63]"}, "%x is bf16[N,8,63], which doesn't fit the table's f32[N,32]"),
    ("rope", {0: "bf16[M,8,64]"}, "%x is bf16[M,8,64], which doesn't fit the table's f32[N,32]"),
    ("rope", {0: "bf16[N,1,8,64]"}, "%x is bf16[N,1,8,64], which doesn't fit the table's f32[N,32]"),
    ("rope_table", {0: "f32[N]"}, "%positions is f32[N], not integers"),
    ("rope_table", {"dim": 63}, "dim is 63, not a positive even number"),
    ("rope_table", {"dim": 0}, "dim is 0, not a positive even number"),
    ("rope_table", {"theta": 1.0}, "theta is 1.0 (it must exceed 1), factor 1.0 (it must exceed 0)"),
    ("rope_table", {"factor": 0.0}, "theta is 10000.0 (it must exceed 1), factor 0.0 (it must exceed 0)"),
    ("rope_table", {"scaling": "yarn"}, "yarn needs original, the positions trained on, not 0"),
    (
        "rope_table",
        {"scaling": "yarn", "original": 64, "beta_slow": 0.0},
        "beta_fast is 32.0, beta_slow 0.0: both must exceed 0",
    ),
    ("rope_table", {"scaling": "llama3", "original": 64, "low": 4.0}, "low is 4.0, not below high, 4.0"),
    ("route", {1: "f32[255]"}, "E is 256 in %logits but 255 in %bias"),
    ("route", {"shared": -1}, "shared is -1"),
    ("route", {"k": 257}, "k is 257 of 256 experts"),
    ("route", {"k": 0}, "k is 0 of 256 experts"),
    ("route", {0: "f32[N,E]", 1: "_"}, "k is 8 of E experts"),
    ("route", {"groups": 3}, "can't part 256 experts into 3 groups and keep 1"),
    ("route", {"groups": 0}, "can't part 256 experts into 0 groups and keep 1"),
    ("route", {"groups": 8, "topk_groups": 9}, "can't part 256 experts into 8 groups and keep 9"),
    (
        "route",
        {"groups": 256, "topk_groups": 8, "group_score": "top2sum"},
        "a group of one expert has no two best",
    ),
    ("route", {"groups": 64, "topk_groups": 1}, "k is 8, but the groups allow 4"),
    ("route_sort", {"k": 0}, "k is 0 of 256 experts"),
    ("route_sort", {"shared": -1}, "shared is -1"),
    ("route_sort_and_quant", {2: "i32[N,7168]"}, "%x is i32[N,7168], no floats to quantise"),
    ("route_sort_and_quant", {2: "bf16[N]"}, "%x is bf16[N], not of rank 2"),
    ("route_sort_and_quant", {"k": 0}, "k is 0 of 256 experts"),
    ("scatter_add", {0: "bf16[N,64]"}, "%acc is bf16[N,64], but sums are f32"),
    ("scatter_add", {0: "f32[N,63]"}, "H is 63 in %acc but 64 in %rows"),
    ("scatter_add", {0: "f32[M,64]"}, "T is M in %acc but N in %w"),
    ("scatter_add", {2: "i32[M]"}, "R is R in %rows but M in %slot"),
    ("scatter_add", {2: "f32[R]"}, "%slot is f32[R], not integers"),
    ("scatter_add", {"per_row": 4}, "per_row is 4 but %w is f32[N,8]"),
    ("sort_by_expert", {0: "f32[N,8]"}, "%id is f32[N,8], not integers"),
    ("sort_by_expert", {0: "i32[N]"}, "%id is i32[N], not of rank 2"),
    ("sort_by_expert", {"experts": 0}, "experts is 0"),
    ("sort_by_expert_and_quant", {"quant": (1, 1, 128)}, "blocks of 1x1x128 don't fit %x, bf16[N,7168]"),
    ("sort_by_expert_and_quant", {1: "bf16[N,7168,1]"}, "%x is bf16[N,7168,1], not of rank 2"),
    ("split", {"sizes": (512, 63)}, "axis 1 of %x is 576, sizes add up to 575"),
    ("split", {"sizes": (577, -1)}, "sizes are [577, -1]: they must be positive"),
    ("split", {"sizes": ()}, "sizes are []: they must be positive"),
    ("split", {"axis": -3}, "axis -3 of a tensor of rank 2"),
    ("split_batch", {0: "i64[]"}, "%like is i64[], but needs an axis"),
    ("split_batch", {1: "i32[B]"}, "B+1 is B in %cu_q but B + 1 in %seq_lens"),
    ("split_batch", {1: "f32[B+1]"}, "%cu_q is f32[B+1], not integers"),
    ("split_batch", {3: "i32[M,P]"}, "B is M in %block_table but B in %seq_lens"),
    ("split_batch", {"below": 0}, "below is 0"),
    ("stack", {0: "$w.up: bf16[4,5]"}, "$w.up is no family of parameters"),
    ("stack", {0: "bf16[4,5]"}, "%family is no family of parameters"),
    ("swiglu", {0: "bf16[N,63]"}, "%gate is bf16[N,63]: its last axis must be even"),
    ("swiglu", {0: "bf16[]"}, "%gate is bf16[], but needs an axis"),
    ("swiglu", {"limit": 0.0}, "limit is 0.0; it must be a positive number in float32"),
    ("swiglu", {"limit": 1e39}, "limit is 1e+39; it must be a positive number in float32"),
    ("swiglu", {1: "bf16[N,32]"}, "%gate is bf16[N~2,64] but %up is bf16[N,32]"),
    ("take_rows", {0: "bf16[]"}, "%x is bf16[], but needs an axis"),
    ("take_rows", {1: "f32[M]"}, "%rows is f32[M], not integers"),
    ("zeros_like", {0: "index"}, "%x is index, not a tensor"),
]


def build(name: str, operands: list[str], attrs: dict[str, Any]) -> Op:
    """The op, in a function whose arguments are called as the op declares its operands."""
    function = Function("f")
    specs = op_class(name).operand_specs
    values: list[Any] = []
    for i, text in enumerate(operands):
        spec = specs[min(i, len(specs) - 1)]
        if text == "_":
            values.append(None)
        elif text.startswith("$"):
            param, _, type_text = text[1:].partition(": ")
            values.append(function.param(param, parse_type(type_text)))
        else:
            arg_name = f"{spec.name}.{i}" if spec.variadic else spec.name
            values.append(function.add_argument(arg_name, parse_type(text)))
    return function.create(op_class(name)(values, attrs, SourceLoc("model.py", 41)))


def test_every_op_has_a_use_that_fits_and_a_check() -> None:
    assert set(GOOD) == set(OPS) - {"return"}
    unchecked = set(GOOD) - {name for name, *_ in BAD}
    # These take a tensor of any shape; zeros_like, of their class, is tried with what is no tensor.
    assert unchecked == {"cast", "sigmoid"}


@pytest.mark.parametrize("name", GOOD)
def test_what_fits(name: str) -> None:
    operands, attrs, expected = GOOD[name]
    op = build(name, operands, attrs)
    assert ", ".join(str(r.type) for r in op.results) == expected


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=[f"{n}: {m}" for n, _, m in BAD])
def test_what_does_not(name: str, change: dict[int | str, Any], message: str) -> None:
    operands, attrs, _ = GOOD[name]
    changed = list(operands)
    for key, value in change.items():
        if isinstance(key, int):
            changed[key:] = [value, *changed[key + 1 :]]
    with pytest.raises(TypeMismatch) as caught:
        build(name, changed, attrs | {k: v for k, v in change.items() if isinstance(k, str)})
    assert str(caught.value) == f"error[M0203] {name}: {message}\n  --> model.py:41"


@pytest.mark.parametrize(("eps", "good"), [(0.0, True), (1e-6, True), (-1e-6, False), (float("inf"), False)])
def test_a_norms_eps_keeps_the_root_real(eps: float, good: bool) -> None:
    operands, attrs, _ = GOOD["rms_norm"]
    if good:
        build("rms_norm", operands, attrs | {"eps": eps})
    else:
        with pytest.raises(TypeMismatch, match=f"eps is {eps}: it must be 0 or more"):
            build("rms_norm", operands, attrs | {"eps": eps})


def test_an_operand_left_out_or_an_epilogue_changes_the_result() -> None:
    grouped = ["bf16[8*N~256,64]", "bf16[256,32,64]", "i32[257]", "i32[8*N~256]"]
    assert str(build("grouped_linear", grouped, {}).results[0].type) == "bf16[8*N,32]"
    in_slot_order = ["bf16[8*N,64]", "_", "f32[N,8]", "bf16[N,64]"]
    assert str(build("combine", in_slot_order, {"to": f32}).results[0].type) == "f32[N,64]"
    operands, attrs, _ = GOOD["gather_grouped_linear"]
    plain = build("gather_grouped_linear", operands, {"per_row": attrs["per_row"]})
    assert str(plain.results[0].type) == "bf16[8*N~256,32]"


def test_grouping_ends_where_rows_are_cut_or_joined() -> None:
    assert str(build("split", ["bf16[4~2,6]"], {"sizes": (1, 3), "axis": 0}).results[0].type) == "bf16[1,6]"
    assert str(build("concat", ["bf16[N~2,6]"] * 2, {"axis": 0}).results[0].type) == "bf16[2*N,6]"
    assert str(build("broadcast", ["bf16[N~2]"], {"axis": 0, "size": 3}).results[0].type) == "bf16[3,N]"
    assert str(build("reshape", ["bf16[N~2,6]"], {"shape": (6 * N,)}).results[0].type) == "bf16[6*N]"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("linear", {"ac": f32}, "linear: no attribute is called 'ac'; did you mean acc"),
        ("linear", {"acc": "f32"}, "linear: acc must be dtype, not 'f32'"),
        ("clamp", {"lo": 1}, "clamp: lo must be float, not 1"),
        ("route", {"score": "tanh"}, "route: score must be softmax|sigmoid|sqrtsoftplus, not 'tanh'"),
        ("route", {"k": True}, "route: k must be int, not True"),
        ("quant", {"block": (-1, 128)}, "quant: block must be block, not (-1, 128)"),
        ("quant", {"scale": "e4m3"}, "quant: scale must be fp32|ue8m0, not 'e4m3'"),
        ("cache_read", {"rows": "a b"}, "cache_read: rows must be symbol, not 'a b'"),
        ("stack", {"experts": Range(3, 1)}, "stack: experts must be range, not Range(first=3, last=1)"),
    ],
)
def test_attributes_of_another_name_or_kind(name: str, change: dict[str, Any], message: str) -> None:
    operands, attrs, _ = GOOD[name]
    with pytest.raises(AttributeMismatch) as caught:
        build(name, operands, attrs | change)
    assert caught.value.message.startswith(message) and caught.value.code == "M0204"


@pytest.mark.parametrize("name", GOOD)
def test_what_is_missing_or_too_much(name: str) -> None:
    operands, attrs, _ = GOOD[name]
    specs = op_class(name).operand_specs
    for i, spec in enumerate(specs):
        if not spec.optional and i < len(operands):
            with pytest.raises(TypeMismatch, match=f"{name}: operand {spec.name} is missing"):
                build(name, [*operands[:i], "_", *operands[i + 1 :]], attrs)
    if not specs[-1].variadic:
        with pytest.raises(TypeMismatch, match=f"{name}: takes {len(specs)} operands, got {len(specs) + 1}"):
            build(name, [*operands, *["_"] * (len(specs) + 1 - len(operands))], attrs)
    for key, spec in op_class(name).attr_specs.items():
        if spec.required:
            with pytest.raises(AttributeMismatch, match=f"{name}: attribute {key} is missing"):
                build(name, operands, {k: v for k, v in attrs.items() if k != key})


def test_a_message_names_the_line_of_the_text() -> None:
    text = """\
moec.ir 1 func @f(%xp: bf16[8*T~256,7168], %off: i32[257]) -> bf16[8*T~256,4096]
  param $experts.w13: bf16[256,4096,7186]
  %gu = grouped_linear(%xp, $experts.w13, %off) : bf16[8*T~256,4096] ; 1.92TF deepseek.py:50
  return %gu
end
"""
    with pytest.raises(MoecError) as caught:
        parse_module(text, "001.moec")
    message = "error[M0203] grouped_linear: K is 7168 in %xp but 7186 in $experts.w13\n  --> 001.moec:3:24\n"
    assert str(caught.value).startswith(message)
    module = parse_module(text.replace("7186", "7168"))
    verify(module)
    assert isinstance(module, Module) and module["f"].ops[0].loc == SourceLoc("deepseek.py", 50)
