"""IR as text, both ways. One op a line; ``;`` starts derived information::

    moec.ir 1 module @tiny target=cpu sym={N<=8192}
    func @step(%ids: i64[N]) -> bf16[N,64]
      param $embed.weight: bf16[256,64]
      %h = embedding(%ids, $embed.weight) : bf16[N,64] ; 2.10MB model.py:12
      return %h
    end

A module of one function has its two header lines in one: ``moec.ir 1 func @moe(...) -> ... target=...``.
Costs are given at the symbols' bounds. The parser takes no meaning from what follows ``;`` but keeps an op's
source line and the rule that made it, and from a dump's header the passes behind it and before it
(``; ran=[canonicalise] to_run=[mla-absorb,select]``), so that print, parse, print is the identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moec.errors import IRError, MoecError, ParseError, SourceLoc
from moec.ir.blame import pointing
from moec.ir.cost import describe, op_cost
from moec.ir.graph import Function, Module
from moec.ir.op import ANNOTATIONS, Op, Value, op_class
from moec.ir.ops.control import Loop, Return
from moec.ir.types import Type, parse_type

VERSION = 1
_NAME = r"[A-Za-z_][\w.-]*"
_HEADER = re.compile(
    rf"moec\.ir (\d+) (?:module @({_NAME})|(func .*?))((?: target=\S+)?)((?: sym=\{{[^}}]*\}})?)"
)
_FUNC = re.compile(rf"func @({_NAME})\((.*)\) -> (.*)")
_OP = re.compile(rf"(?:(%.*?) = )?({_NAME})(?: @({_NAME}))?\((.*)\)")
_RESULT = re.compile(rf"%{_NAME}")
_ARGUMENT = re.compile(rf"(%{_NAME}): *(.+)")
_PARAMETER = re.compile(r"(\$[\w.*-]+): *(.+)")
_BOUND = re.compile(r"([A-Za-z_]\w*)<=(\d{1,18})")

_PASSES = re.compile(r"ran=\[(.*)\] to_run=\[(.*)\]$")


# Printing.
def print_module(module: Module, derived: bool = True) -> str:
    """The whole module; without ``derived``, what stands behind ``;`` is left out."""
    header = f"moec.ir {VERSION} "
    tail = f" target={module.target}" if module.target else ""
    if module.bounds:
        tail += " sym={" + ",".join(f"{n}<={v}" for n, v in sorted(module.bounds.items())) + "}"
    if derived and (module.ran or module.to_run):
        tail += f" ; ran=[{module.ran}] to_run=[{module.to_run}]"
    functions = list(module)
    if len(functions) == 1 and functions[0].name == module.name:
        lines = _function_lines(functions[0], module, derived)
        return header + lines[0] + tail + "\n" + "\n".join(lines[1:]) + "\n"
    blocks = [header + f"module @{module.name}" + tail]
    blocks += ["\n".join(_function_lines(f, module, derived)) for f in functions]
    return "\n\n".join(blocks) + "\n"


def print_function(function: Function, module: Module | None = None, derived: bool = True) -> str:
    return "\n".join(_function_lines(function, module, derived)) + "\n"


def print_op(op: Op) -> str:
    """One op without what is derived."""
    if isinstance(op, Return):
        return " ".join(["return", ", ".join(_operand(v) for v in op.operands)]).rstrip()
    left = ", ".join(r.text for r in op.results)
    target = f"{op.name} @{op.callee}" if isinstance(op, Loop) else op.name
    operands = list(op.operands)
    while operands and operands[-1] is None:
        operands.pop()
    text = f"{left} = " if left else ""
    text += f"{target}({', '.join(_operand(v) for v in operands)})"
    shown = {
        key: spec.kind.print(op.attrs[key])
        for key, spec in op.attr_specs.items()
        if key != "callee" and not spec.hidden and (spec.required or op.attrs[key] != spec.default)
    }
    shown |= {key: ANNOTATIONS[key].kind.print(value) for key, value in op.annotations.items()}
    if shown:
        text += " {" + ", ".join(f"{k}={v}" for k, v in sorted(shown.items())) + "}"
    if op.results:
        text += " : " + ", ".join(str(r.type) for r in op.results)
    return text


def _operand(value: Value | None) -> str:
    return "_" if value is None else value.text


def _function_lines(function: Function, module: Module | None, derived: bool) -> list[str]:
    args = ", ".join(f"{a.text}: {a.type}" for a in function.args)
    outputs = [str(v.type) for v in function.outputs]
    result = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
    lines = [f"func @{function.name}({args}) -> {result}"]
    lines += [f"  param {p.text}: {p.type}" for p in function.params.values()]
    bounds = module.bound_values() if module is not None else {}
    for op in function.ops:
        notes = _derived(op, module, bounds) if derived else []
        lines.append(f"  {print_op(op)}" + (f" ; {' '.join(notes)}" if notes else ""))
    if function.terminator is not None:
        lines.append(f"  {print_op(function.terminator)}")
    return [*lines, "end"]


def _derived(op: Op, module: Module | None, bounds: dict[Any, Any]) -> list[str]:
    notes = describe(op_cost(op, module), bounds)
    if op.loc is not None and op.loc.line:
        notes.append(op.loc.short)
    if op.origin:
        notes.append(f"<{' '.join(op.origin.split())}")
    return notes


# Parsing.
def parse_module(text: str, file: str = "<ir>") -> Module:
    """The module that the text describes. Raises a MoecError that names the line and the column."""
    return _Parser(text, file).module()


def read_module(path: Path | str) -> Module:
    """The module in a file. Raises ParseError where it can't be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ParseError(f"can't read the IR: {error.strerror}", loc=SourceLoc(str(path), 0)) from None
    except UnicodeDecodeError:
        raise ParseError("can't read the IR: it is no text", loc=SourceLoc(str(path), 0)) from None
    return parse_module(text, str(path))


class _Parser:
    def __init__(self, text: str, file: str) -> None:
        self.file, self.raw = file, text.split("\n")
        lines = [(i, *strip_derived(line.strip())) for i, line in enumerate(self.raw, start=1)]
        self.lines = [(number, body, derived) for number, body, derived in lines if body]
        self.at = 0
        self.line_number = 0

    def next(self) -> tuple[str, str]:
        """The next line's meaning, and what stands behind its ``;``."""
        if self.at == len(self.lines):
            raise self.error("the text ends inside a function: no 'end'")
        self.line_number, body, derived = self.lines[self.at]
        self.at += 1
        return body, derived

    def error(self, message: str, token: str = "") -> ParseError:
        return ParseError(message, loc=pointing(self.here, message, token))

    @property
    def here(self) -> SourceLoc:
        """The line that is being read."""
        text = self.raw[self.line_number - 1] if self.line_number else ""
        return SourceLoc(self.file, self.line_number, text=text)

    def read_type(self, text: str) -> Type:
        try:
            return parse_type(text)
        except MoecError as error:
            raise error.at(pointing(self.here, error.message, text)) from None

    def module(self) -> Module:
        try:
            return self._module()
        except MoecError as error:
            raise error.at(pointing(self.here, error.message)) from None

    def _module(self) -> Module:
        if not self.lines:
            raise self.error("empty: IR starts with 'moec.ir 1'")
        line, derived = self.next()
        header = _HEADER.fullmatch(line)
        if header is None:
            raise self.error("IR starts with 'moec.ir 1 module @name' or 'moec.ir 1 func @name(...) -> ...'")
        version, name, single, target, bounds = header.groups()
        if version != str(VERSION):
            raise self.error(f"this is IR version {version}; this moec reads version {VERSION}")
        module = Module(name or "", target.removeprefix(" target="))
        if passes := _PASSES.search(derived):
            module.ran, module.to_run = passes.groups()
        for part in split_top(bounds.removeprefix(" sym=")[1:-1]):
            bound = _BOUND.fullmatch(part)
            if bound is None:
                raise self.error(f"{part!r} is no bound of a symbol: 'N<=8192' is")
            module.bounds[bound[1]] = int(bound[2])
        if single:
            module.name = module.add(self._function(single)).name
        while self.at < len(self.lines):
            module.add(self._function(self.next()[0]))
        return module

    def _function(self, line: str) -> Function:
        match = _FUNC.fullmatch(line)
        if match is None:
            raise self.error("expected 'func @name(%arg: type, ...) -> type'")
        name, args, result = match.groups()
        values: dict[str, Value] = {}
        function = Function(name)
        function.written = self.here
        for part in split_top(args):
            arg, type_text = self._declaration(part, _ARGUMENT, "argument: '%name: type' is")
            self._new([arg], values)
            values[arg] = function.add_argument(arg[1:], self.read_type(type_text))
        while True:
            body, derived = self.next()
            if body == "end":
                break
            if function.terminator is not None:
                raise self.error("'return' is followed by 'end'")
            if body.startswith("param "):
                text = body.removeprefix("param ")
                param, type_text = self._declaration(text, _PARAMETER, "parameter: '$name: type' is")
                self._new([param], values)
                values[param] = function.param(param[1:], self.read_type(type_text))
            elif body == "return" or body.startswith("return "):
                function.ret(*self._operands(body.removeprefix("return"), values))  # type: ignore[arg-type]
            else:
                self._op(function, body, derived, values)
        end, self.line_number = self.line_number, function.written.line
        written = [self.read_type(t) for t in split_top(result[1:-1] if result[:1] == "(" else result)]
        returned = [v.type for v in function.outputs]
        if written != returned:
            message = f"@{name} says it returns {result}, but returns ({', '.join(map(str, returned))})"
            raise IRError(message, loc=pointing(self.here, message, f"-> {result}"))
        self.line_number = end
        return function

    def _declaration(self, text: str, pattern: re.Pattern[str], wanted: str) -> tuple[str, str]:
        match = pattern.fullmatch(text)
        if match is None:
            raise self.error(f"{text!r} is no {wanted}")
        return match[1], match[2]

    def _new(self, names: list[str], values: dict[str, Value]) -> None:
        for i, name in enumerate(names):
            if name in values or name in names[:i]:
                raise self.error(f"{name} is defined twice", name)

    def _operands(self, text: str, values: dict[str, Value]) -> list[Value | None]:
        found: list[Value | None] = []
        for part in split_top(text):
            if part != "_" and part not in values:
                raise self.error(f"{part} isn't defined above", part)
            found.append(None if part == "_" else values[part])
        return found

    def _op(self, function: Function, body: str, derived: str, values: dict[str, Value]) -> None:
        rest, types = _cut_outside(body, " : ")
        rest, attrs_text = self._cut_attrs(rest)
        match = _OP.fullmatch(rest)
        if match is None:
            raise self.error(
                f"{body!r} is no op: '%result = name(%operand, ...) {{attribute=value}} : type' is"
            )
        left, op_name, callee, args = match.groups()
        names = split_top(left or "")
        for name in names:
            if not _RESULT.fullmatch(name):
                raise self.error(f"{name!r} is no result: '%name' is")
        self._new(names, values)
        cls = op_class(op_name)
        if cls is Return:
            raise self.error("'return %value, ...' ends a function")
        attrs = self._attrs(cls, attrs_text)
        if issubclass(cls, Loop):
            if callee is None or "callee" in attrs or "carry" in attrs:
                raise self.error(f"a loop names its body: '{op_name} @body(...)'")
            attrs |= {"callee": callee, "carry": len(names)}
        elif callee is not None:
            raise self.error(f"{op_name} runs no body: @{callee} has no place here")
        op = function.create(cls(self._operands(args, values), attrs), [n[1:] for n in names])
        if len(op.results) != len(names):
            raise self.error(f"{op_name} has {len(op.results)} results, not {len(names)}")
        written = [self.read_type(t) for t in split_top(types)]
        if len(written) != len(names):
            raise self.error(f"{len(names)} results but {len(written)} types")
        for res, type, type_text in zip(op.results, written, split_top(types), strict=True):
            if res.type != type:
                error = op.mismatch(f"{res.text} is written as {type} but is {res.type}")
                raise error.at(pointing(self.here, error.message, type_text))
        op.loc, op.origin = _parse_derived(derived)  # last: a mistake above is one in this text
        op.written = self.here
        values.update((r.text, r) for r in op.results)

    def _cut_attrs(self, text: str) -> tuple[str, str]:
        for i, c, depth in _characters(text):
            if c == "{" and depth == 1:
                if not text.endswith("}"):
                    raise self.error(f"{text[i:]!r} are no attributes: '{{name=value, ...}}' are")
                return text[:i].rstrip(), text[i + 1 : -1]
        return text, ""

    def _attrs(self, cls: type[Op], text: str) -> dict[str, Any]:
        attrs: dict[str, Any] = {}
        for part in split_top(text):
            key, equals, value = part.partition("=")
            if not equals:
                raise self.error(f"{part!r} is no attribute: 'name=value' is")
            if key in attrs:
                raise self.error(f"{cls.name}: {key} is given twice", part)
            spec = cls.attr_specs.get(key) or ANNOTATIONS.get(key)
            if spec is None:
                attrs[key] = value  # the op refuses it, naming the nearest
                continue
            try:
                attrs[key] = spec.kind.parse(value)
            except (ValueError, KeyError, IndexError):
                raise self.error(f"{cls.name}: {key}={value} is no {spec.kind.name}", part) from None
        return attrs


def _characters(text: str) -> Iterator[tuple[int, str, int]]:
    """Position, character and bracket depth of what lies outside quotes."""
    depth, quoted, escaped = 0, False, False
    for i, c in enumerate(text):
        if quoted:
            quoted = escaped or c != '"'
            escaped = c == "\\" and not escaped
            continue
        if c == '"':
            quoted = True
            continue
        if c in "([{<" and text[i : i + 2] != "<=":
            depth += 1
        elif c in ")]}>" and text[i - 1 : i + 1] != "->":
            depth -= 1
        yield i, c, depth


def split_top(text: str) -> list[str]:
    """Parts between commas that no bracket or quote encloses."""
    cuts = [i for i, c, depth in _characters(text) if c == "," and depth == 0]
    parts = [text[a:b].strip() for a, b in zip([0, *(c + 1 for c in cuts)], [*cuts, len(text)], strict=True)]
    return [p for p in parts if p]


def strip_derived(line: str) -> tuple[str, str]:
    """The line's meaning, and what follows its ``;``."""
    for i, c, _ in _characters(line):
        if c == ";":
            return line[:i].rstrip(), line[i + 1 :].strip()
    return line, ""


def _cut_outside(text: str, mark: str) -> tuple[str, str]:
    for i, _, depth in _characters(text):
        if depth == 0 and text.startswith(mark, i):
            return text[:i], text[i + len(mark) :]
    return text, ""


_LINE = re.compile(r"(?:^|\s)([^\s<]+):(\d+)$")


def _parse_derived(text: str) -> tuple[SourceLoc | None, str]:
    notes, _, origin = text.partition("<")
    match = _LINE.search(notes.rstrip())
    return (SourceLoc(match[1], int(match[2])) if match else None), origin.strip()
