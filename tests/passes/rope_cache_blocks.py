"""Attention's heads as a user could write them, and edits of them that rope-cache-fusion must not mind."""

from __future__ import annotations

# What a user could write by hand. The tests below change a line or two.
TABLE = "%cos: f32[N,2], %sin: f32[N,2]"
PAGES, HEADS = "cache<f32[9], page=4>", "cache<f32[4,6], page=4>"
LATENT = f"""\
moec.ir 1 module @test target=cpu
func @forward(%l: index, %kv: {PAGES}, %x: f32[N,9], {TABLE}, %at: i64[N]) -> {PAGES}
  param $scale: f32[5]
  %a, %b = split(%x) {{sizes=[5,4]}} : f32[N,5], f32[N,4] ; mine.py:3
  %a.n = rms_norm(%a, $scale) {{eps=0.01}} : f32[N,5] ; mine.py:4
  %b.r = rope(%b, %cos, %sin) {{layout=half}} : f32[N,4] ; mine.py:5
  %e = concat(%a.n, %b.r) : f32[N,9] ; mine.py:6
  %kv.1 = cache_write(%kv, %l, %e, %at) : cache<f32[9], page=4> ; mine.py:7
  return %kv.1
end
"""
KEYS = f"""\
moec.ir 1 module @test target=cpu
func @forward(%l: index, %kv: {HEADS}, %k: f32[N,12], %v: f32[N,12], {TABLE}, %at: i64[N]) -> {HEADS}
  param $scale: f32[6]
  %k.c = clamp(%k) {{hi=0.5, lo=-0.5}} : f32[N,12]
  %k.h = reshape(%k.c) {{shape=[N,2,6]}} : f32[N,2,6]
  %k.n = rms_norm(%k.h, $scale) {{eps=0.01}} : f32[N,2,6]
  %k.r = rope(%k.n, %cos, %sin) {{layout=interleaved}} : f32[N,2,6]
  %v.c = clamp(%v) {{hi=0.5, lo=-0.5}} : f32[N,12]
  %v.h = reshape(%v.c) {{shape=[N,2,6]}} : f32[N,2,6]
  %e = concat(%k.r, %v.h) {{axis=1}} : f32[N,4,6]
  %kv.1 = cache_write(%kv, %l, %e, %at) : cache<f32[4,6], page=4>
  return %kv.1
end
""".replace("f32[N,2], %sin: f32[N,2]", "f32[N,3], %sin: f32[N,3]")
QUERIES = f"""\
moec.ir 1 func @forward(%x: f32[N,2,7], {TABLE}) -> f32[N,2,7] target=cpu
  param $scale: f32[7]
  %x.n = rms_norm(%x, $scale) {{eps=0.01}} : f32[N,2,7]
  %a, %b = split(%x.n) {{sizes=[4,3]}} : f32[N,2,4], f32[N,2,3]
  %a.r = rope(%a, %cos, %sin) {{layout=half}} : f32[N,2,4]
  %q = concat(%a.r, %b) : f32[N,2,7]
  return %q
end
"""
LAST = f"""\
moec.ir 1 func @forward(%x: f32[N,2,7], {TABLE}) -> f32[N,2,7] target=cpu
  %a, %b = split(%x) {{sizes=[3,4]}} : f32[N,2,3], f32[N,2,4]
  %b.r = rope(%b, %cos, %sin) {{layout=interleaved}} : f32[N,2,4]
  %q = concat(%a, %b.r) : f32[N,2,7]
  return %q
end
"""
ABSORBED = f"""\
moec.ir 1 func @forward(%x: f32[N,2,4], %lat: f32[N,2,5], {TABLE}) -> f32[N,2,9] target=cpu
  %x.r = rope(%x, %cos, %sin) {{layout=interleaved}} : f32[N,2,4]
  %q = concat(%lat, %x.r) : f32[N,2,9]
  return %q
end
"""
FULL = f"""\
moec.ir 1 func @forward(%x: f32[N,8], {TABLE}) -> f32[N,2,4] target=cpu
  param $scale: f32[8]
  %x.n = rms_norm(%x, $scale) {{eps=0.01}} : f32[N,8]
  %x.h = reshape(%x.n) {{shape=[N,2,4]}} : f32[N,2,4]
  %x.c = clamp(%x.h) {{hi=0.5, lo=-0.25}} : f32[N,2,4]
  %q = rope(%x.c, %cos, %sin) {{layout=half}} : f32[N,2,4]
  return %q
end
"""
VALUES = KEYS.replace("  %v.c = clamp(%v) {hi=0.5, lo=-0.5} : f32[N,12]\n", "").replace(
    "  %v.h = reshape(%v.c) {shape=[N,2,6]}",
    "  %v.r = reshape(%v) {shape=[N,2,6]} : f32[N,2,6]\n  %v.h = clamp(%v.r) {hi=0.5, lo=-0.5}",
)
SOURCES = {
    "latent": LATENT,
    "keys": KEYS,
    "queries": QUERIES,
    "last": LAST,
    "absorbed": ABSORBED,
    "full": FULL,
    "values": VALUES,
}

# Block, rule, edits, and why the rule then doesn't fire.
MISSES: list[tuple[str, str, list[tuple[str, str]], str]] = [
    ("latent", "rope", [], "%b is f32[N,4], not heads"),
    (
        "latent",
        "latent",
        [
            ("return %kv.1", "return %kv.1, %e"),
            ("-> cache<f32[9], page=4>", "-> (cache<f32[9], page=4>, f32[N,9])"),
        ],
        "%e is used more than once, by cache_write and return",
    ),
    ("latent", "latent", [("concat(%a.n, %b.r)", "concat(%a, %b.r)")], "%a comes from split, not rms_norm"),
    (
        "latent",
        "latent",
        [("rope(%b,", "rope(%z,"), ("%at: i64[N])", "%at: i64[N], %z: f32[N,4])")],
        "an operand is %z, an argument, not the result of split",
    ),
    (
        "latent",
        "latent",
        [
            ("%x: f32[N,9]", "%x: f32[N,10]"),
            (
                "%a, %b = split(%x) {sizes=[5,4]} : f32[N,5], f32[N,4]",
                "%a, %o, %b = split(%x) {sizes=[5,1,4]} : f32[N,5], f32[N,1], f32[N,4]",
            ),
        ],
        "%b is result 2 of split",
    ),
    (
        "latent",
        "latent",
        [
            (
                "%a, %b = split(%x) {sizes=[5,4]} : f32[N,5], f32[N,4]",
                "%a, %c = split(%x) {sizes=[5,4]} : f32[N,5], f32[N,4]\n"
                "  %d, %b = split(%y) {sizes=[5,4]} : f32[N,5], f32[N,4]",
            ),
            ("%at: i64[N])", "%at: i64[N], %y: f32[N,9])"),
        ],
        "%y and %x are not the same",
    ),
    (
        "keys",
        "head-norm",
        [("%k.r = rope(%k.n", "%k.r = rope(%k.h")],
        "%k.h comes from reshape, not rms_norm",
    ),
    (
        "keys",
        "keys-and-values",
        [("%k.r = rope(%k.n, %cos, %sin) {layout=interleaved}", "%k.r = sigmoid(%k.n)")],
        "%k.r comes from sigmoid, not norm_rope",
    ),
    (
        "keys",
        "keys-and-values",
        [("concat(%k.r, %v.h)", "concat(%v.h, %k.r)")],
        "%v.h comes from reshape, not norm_rope",
    ),
    (
        "keys",
        "clamp-value-rows",
        [("%v.c = clamp(%v) {hi=0.5", "%v.c = clamp(%v) {hi=0.4")],
        "values are clamped to -0.5..0.4, keys to -0.5..0.5",
    ),
    (
        "values",
        "clamp-values",
        [("%v.h = clamp(%v.r) {hi=0.5", "%v.h = clamp(%v.r) {hi=0.4")],
        "values are clamped to -0.5..0.4, keys to -0.5..0.5",
    ),
    (
        "keys",
        "clamp-rows",
        [
            ("return %kv.1", "return %kv.1, %k.c"),
            ("-> cache<f32[4,6], page=4>", "-> (cache<f32[4,6], page=4>, f32[N,12])"),
        ],
        "%k.c is used more than once, by reshape and return",
    ),
    (
        "queries",
        "partial",
        [("concat(%a.r, %b)", "concat(%a.r, %z)"), (f"{TABLE})", f"{TABLE}, %z: f32[N,2,3])")],
        "an operand is %z, an argument, not the result of split",
    ),
    (
        "queries",
        "partial",
        [
            ("%q = concat(%a.r, %b) : f32[N,2,7]", "%q = concat(%a.r, %a) : f32[N,2,8]"),
            ("-> f32[N,2,7]", "-> f32[N,2,8]"),
        ],
        "%a is result 0 of split",
    ),
    (
        "last",
        "partial-last",
        [
            ("%a, %b = split", "%a, %c = split"),
            ("  %b.r", "  %d, %b = split(%z) {sizes=[3,4]} : f32[N,2,3], f32[N,2,4]\n  %b.r"),
            (f"{TABLE})", f"{TABLE}, %z: f32[N,2,7])"),
        ],
        "what is joined was cut from %z and %x, or otherwise",
    ),
    (
        "absorbed",
        "before",
        [
            ("%q = concat(%lat, %x.r) : f32[N,2,9]", "%q = concat(%y, %x.r) {axis=1} : f32[N,4,4]"),
            ("-> f32[N,2,9]", "-> f32[N,4,4]"),
            ("%lat: f32[N,2,5]", "%y: f32[N,2,4]"),
        ],
        "the heads' columns are not what is joined",
    ),
    (
        "absorbed",
        "before",
        [("return %q", "return %q, %x.r"), ("-> f32[N,2,9]", "-> (f32[N,2,9], f32[N,2,4])")],
        "%x.r is used more than once, by concat and return",
    ),
    (
        "full",
        "full-norm",
        [("%x.h = reshape(%x.n)", "%x.s = sigmoid(%x.n) : f32[N,8]\n  %x.h = reshape(%x.s)")],
        "%x.s comes from sigmoid, not rms_norm",
    ),
    (
        "full",
        "full-norm",
        [("f32[N,8]", "f32[2*N,4]"), ("$scale: f32[8]", "$scale: f32[4]")],
        "%x is f32[2*N,4], not all heads of f32[N,2,4] in a row",
    ),
    (
        "full",
        "clamp",
        [
            (
                "%x.h = reshape(%x.n) {shape=[N,2,4]} : f32[N,2,4]",
                "%x.1 = reshape(%x.n) {shape=[N,2,4]} : f32[N,2,4]\n"
                "  %x.h = clamp(%x.1) {hi=1.0, lo=0.0} : f32[N,2,4]",
            )
        ],
        "there is a clamp already",
    ),
    (
        "full",
        "clamp-rows",
        [
            ("%x: f32[N,8]", "%y: f32[N,8]"),
            ("  %x.n", "  %x = clamp(%y) {hi=1.0, lo=0.0} : f32[N,8]\n  %x.n"),
        ],
        "all heads are normed behind it",
    ),
]
