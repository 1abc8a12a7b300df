"""The kernel functions of a package: which there are, what they are called, and their files."""

from __future__ import annotations

from typing import Any

from moec.codegen.kernels import KERNELS, Templated, cuda, triton
from moec.codegen.kernels.cuda import CudaKernel
from moec.codegen.kernels.triton import TritonKernel
from moec.codegen.render import Names, identifier, render_python
from moec.ir.op import Op


class Kernels:
    """The kernel functions of one package, each rendered once and shared by equal ops."""

    def __init__(self, target: str, functions: set[str]) -> None:
        self.target = target
        self.files: dict[str, list[str]] = {}
        self.triton: dict[str, list[TritonKernel]] = {}  # the files that hold Triton, and whose
        self.cuda: dict[str, str] = {}  # .cu files, by name
        # By file: which kernel functions of which files it calls.
        self.imports: dict[str, dict[str, str]] = {}
        self._families: dict[str, str] = {}  # of the files' kernels
        self._names = Names(functions)
        self._by_constants: dict[str, str] = {}

    def function(self, op: Op, record: Templated | TritonKernel | CudaKernel) -> str:
        """The name of the kernel function for ``op``."""
        if not isinstance(record, Templated):
            return self._compiled(op, record)
        constants = record.constants(op)
        if record.calls:
            called = next(k for k in KERNELS if k.op == record.calls and isinstance(k, Templated))
            name = self._rendered(called, record.called(op))
            constants |= {record.calls: name}
            file = self._stem(op.name, record)
            self.imports.setdefault(file, {})[name] = self._stem(called.op, record)
        return self._rendered(record, constants)

    def _rendered(self, record: Templated, constants: dict[str, Any]) -> str:
        key = f"{record.template} {sorted(constants.items(), key=lambda c: c[0])}"
        if key not in self._by_constants:
            name = self._names.add(key, record.op)
            self._by_constants[key] = name
            source = render_python(record.template, name=name, **constants)
            parts = self.files.setdefault(self._stem(record.op, record), [])
            # A function that another kernel of the op brought along is there already.
            parts += [part for part in source.strip("\n").split("\n\n\n") if part not in parts]
        return self._by_constants[key]

    def _compiled(self, op: Op, record: TritonKernel | CudaKernel) -> str:
        key = record.key(op, self.target)
        if key not in self._by_constants:
            name = self._names.add(key, op.name)
            self._by_constants[key] = name
            stem = self._stem(op.name, record)
            if isinstance(record, TritonKernel):
                self.triton.setdefault(stem, []).append(record)
            else:
                self.cuda[name] = record.render_source(op, name, self.target)
            self.files.setdefault(stem, []).append(record.render(op, name, self.target))
        return self._by_constants[key]

    def _stem(self, op: str, record: Templated | TritonKernel | CudaKernel) -> str:
        """The file of an op's kernels; Triton, CUDA and PyTorch share none."""
        stem, family = identifier(op), type(record).family
        while self._families.setdefault(stem, family) != family:
            stem += "_more"  # _2 is what a second function is called
        return stem

    def sources(self) -> dict[str, str]:
        """The kernel files, by path."""
        files = {f"kernels/{name}.cu": source for name, source in self.cuda.items()}
        for stem, parts in self.files.items():
            if stem in self.triton:
                source = triton.kernel_file(self.triton[stem], parts, self.target)
            elif self._families[stem] == CudaKernel.family:
                source = cuda.kernel_file(stem, parts, self.target)
            else:
                imports = {n: file for n, file in self.imports.get(stem, {}).items() if file != stem}
                source = render_python("python/kernel_file.py.jinja", op=stem, parts=parts, imports=imports)
            files[f"kernels/{stem}.py"] = source
        return files

    @property
    def names(self) -> list[str]:
        return sorted(self._by_constants.values())
