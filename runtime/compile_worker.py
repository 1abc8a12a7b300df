"""A process that compiles Triton and CUDA kernels: one request a line in, one reply a line out, both JSON.

``runtime/compile.py`` starts it by path and with an environment of its own, because Triton fixes its mode
when it is imported and because a compiler that crashes must take nothing else with it. It imports nothing
of moec.
"""

from __future__ import annotations

import base64
import json
import linecache
import os
import sys
from typing import Any

# What a launch must know, of all that Triton records about a compilation.
RECORDED = (
    "name",
    "num_warps",
    "shared",
    "tmem_size",
    "global_scratch_size",
    "global_scratch_align",
    "profile_scratch_size",
    "profile_scratch_align",
    "tensordesc_meta",
)


def jit_function(source: str, function: str, kernel: str) -> Any:
    """The JITFunction that ``source`` defines; it needs no file, only lines that inspect can find."""
    name = f"<{kernel}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)
    return namespace[function]


def with_layout(kind: str) -> str:
    """Gluon's name of a type: a tensor descriptor's has its tiles' layout, of the widest swizzle."""
    if not kind.startswith("tensordesc<"):
        return kind
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.language import str_to_ty

    block = str_to_ty(kind, None).block_type
    layout = NVMMASharedLayout.get_default_for(list(block.shape), block.element_ty)
    return f"{kind.removesuffix('>')},{layout!r}>"


def compile_request(request: dict[str, Any]) -> dict[str, Any]:
    """The cubin, in base 64, and what Triton says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = jit_function(request["source"], request["function"], request["kernel"])
    names = list(request["signature"])
    if names != list(function.arg_names):
        raise TypeError(f"the signature names {names}, but the function takes {list(function.arg_names)}")
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in request["divisible"]}
    signature = request["signature"]
    if request.get("language") == "gluon":
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource

        signature = {name: with_layout(kind) for name, kind in signature.items()}
    source = ASTSource(function, signature, request["constants"], attributes)
    target = GPUTarget("cuda", request["number"], 32)
    compiled = triton.compile(source, target=target, options=request["options"])
    metadata = {key: getattr(compiled.metadata, key, None) for key in RECORDED}
    return {"cubin": base64.b64encode(compiled.asm["cubin"]).decode("ascii"), "metadata": metadata}


def compile_cuda(request: dict[str, Any]) -> dict[str, Any]:
    """The cubin, in base 64, and what NVRTC printed. ``file`` is what its messages call the source."""
    from cuda.bindings import nvrtc

    def call(function: Any, *args: Any) -> Any:
        code, *results = function(*args)
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{function.__name__}: {nvrtc.nvrtcGetErrorString(code)[1].decode()}")
        return results[0] if results else None

    def read(size: Any, into: Any) -> bytes:
        data = bytes(call(size, program))
        call(into, program, data)  # it fills the bytes
        return data

    source, file = request["source"].encode(), request["file"].encode()
    program = call(nvrtc.nvrtcCreateProgram, source, file, 0, [], [])
    options = [option.encode() for option in request["options"]]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode().strip()
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return {"error": log or nvrtc.nvrtcGetErrorString(code)[1].decode()}
    cubin = read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    return {"cubin": base64.b64encode(cubin).decode("ascii"), "log": log}


def explain(error: BaseException | None) -> str:
    """An error and what caused it: Triton raises one for each function that it was in."""
    told = []
    while error is not None:
        told.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return "\n".join(told)


def main() -> None:
    # Triton and ptxas print to standard output; replies keep it for themselves.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            request = json.loads(line)
            reply = compile_cuda(request) if request.get("language") == "cuda" else compile_request(request)
        except Exception as error:  # whatever a compiler raises is an answer
            reply = {"error": explain(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
