"""The kernel functions of a package: which there are, what they are called, and their files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moec.codegen.kernels import KERNELS, Templated
from moec.codegen.kernels.triton import TritonKernel, kernel_file
from moec.codegen.render import Names, identifier, render_python
from moec.ir.op import Op


class Kernels:
    """The kernel functions of one package, each rendered once and shared by equal ops."""

    def __init__(self, target: str, functions: set[str]) -> None:
        self.target = target
        self.files: dict[str, list[str]] = {}
        self.triton: dict[str, list[TritonKernel]] = {}  # the files that hold Triton, and whose
        # By file: which kernel functions of which files it calls.
        self.imports: dict[str, dict[str, str]] = {}
        self._names = Names(functions)
        self._by_constants: dict[str, str] = {}

    def function(self, op: Op, record: Templated | TritonKernel) -> str:
        """The name of the kernel function for ``op``."""
        if isinstance(record, TritonKernel):
            return self._triton(op, record)
        constants = record.constants(op)
        if record.calls:
            called = next(k for k in KERNELS if k.op == record.calls and isinstance(k, Templated))
            name = self._rendered(called, record.called(op))
            constants |= {record.calls: name}
            file = self._stem(op.name, self.triton)
            self.imports.setdefault(file, {})[name] = self._stem(called.op, self.triton)
        return self._rendered(record, constants)

    def _rendered(self, record: Templated, constants: dict[str, Any]) -> str:
        key = f"{record.template} {sorted(constants.items(), key=lambda c: c[0])}"
        if key not in self._by_constants:
            name = self._names.add(key, record.op)
            self._by_constants[key] = name
            source = render_python(record.template, name=name, **constants)
            parts = self.files.setdefault(self._stem(record.op, self.triton), [])
            # A function that another kernel of the op brought along is there already.
            parts += [part for part in source.strip("\n").split("\n\n\n") if part not in parts]
        return self._by_constants[key]

    def _triton(self, op: Op, record: TritonKernel) -> str:
        key = record.key(op, self.target)
        if key not in self._by_constants:
            name = self._names.add(key, op.name)
            self._by_constants[key] = name
            stem = self._stem(op.name, set(self.files) - set(self.triton))
            self.triton.setdefault(stem, []).append(record)
            self.files.setdefault(stem, []).append(record.render(op, name, self.target))
        return self._by_constants[key]

    @staticmethod
    def _stem(op: str, others: Iterable[str]) -> str:
        """The file of an op's kernels; Triton and PyTorch don't share one."""
        stem = identifier(op)
        return f"{stem}_more" if stem in others else stem  # _2 is what a second function is called

    def sources(self) -> dict[str, str]:
        """The kernel files, by path."""
        files = {}
        for stem, parts in self.files.items():
            if stem in self.triton:
                source = kernel_file(self.triton[stem], parts, self.target)
            else:
                imports = {n: file for n, file in self.imports.get(stem, {}).items() if file != stem}
                source = render_python("python/kernel_file.py.jinja", op=stem, parts=parts, imports=imports)
            files[f"kernels/{stem}.py"] = source
        return files

    @property
    def names(self) -> list[str]:
        return sorted(self._by_constants.values())
