"""Every error that moec reports to a user, one class a mistake, each with a stable code.

``str(error)`` is the whole report::

    error[M0203] linear: K is 7168 in %x but 7186 in $gate.weight
      --> my_model.py:88  MoE.lower
      note: ...

The hundreds say where a mistake was made: 01 the DSL, 02 the IR, 03 a configuration, 04 weights,
05 a package, 06 a call at run time, 07 passes and options, 08 compiling and launching kernels.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

_UNSAFE = re.compile(r"[^\w.+-]")  # in the text of the IR, where a space or a < ends the file's name

_EXCERPT = 96  # characters of a line that are shown


@dataclass(frozen=True)
class SourceLoc:
    """A line of the user's that an error or an op points at.

    ``column`` counts from 1; with it, ``text`` is the line itself, to be shown with a caret.
    """

    file: str
    line: int
    where: str = ""
    column: int = field(default=0, compare=False)
    text: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        if self.line and self.column:
            place += f":{self.column}"
        return f"{place}  {self.where}" if self.where else place

    @property
    def excerpt(self) -> list[str]:
        """The line (of a long one what is around the column) with a caret below; nothing without a column."""
        if not self.column or not self.text.strip():
            return []
        text = self.text.expandtabs(1)
        first = max(0, self.column - 1 - _EXCERPT // 2) if len(text) > _EXCERPT else 0
        shown = ("…" if first else "") + text[first : first + _EXCERPT].rstrip()
        caret = self.column - 1 - first + bool(first)
        return [f"   | {shown}", f"   | {' ' * caret}^"]

    @property
    def short(self) -> str:
        """``file.py:41``, the form that IR dumps carry."""
        return f"{_UNSAFE.sub('_', Path(self.file).name)}:{self.line}"


class MoecError(Exception):
    """A user's mistake. ``exit_code`` is what the command line exits with."""

    code: ClassVar[str] = "M0000"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, loc: SourceLoc | None = None, notes: Iterable[str] = ()) -> None:
        self.message = message
        self.loc = loc
        self.notes = tuple(notes)
        super().__init__(message)

    def at(self, loc: SourceLoc | None) -> MoecError:
        """The same error, pointing at ``loc`` unless it already points somewhere."""
        if self.loc is None:
            self.loc = loc
        return self

    def note(self, text: str) -> MoecError:
        self.notes += (text,)
        return self

    def __str__(self) -> str:
        lines = [f"error[{self.code}] {self.message}"]
        if self.loc is not None:
            lines += [f"  --> {self.loc}", *self.loc.excerpt]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean mixtral-8x7b?`` or nothing."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


class InternalError(MoecError):
    """A bug in moec, never the user's doing."""

    code = "M0001"
    exit_code = 70


# 01: the DSL
class SpecError(MoecError):
    """A block of the user's model contradicts itself or its neighbour."""

    code = "M0101"


class UnknownPreset(MoecError):
    """The name is no preset, no file and no folder."""

    code = "M0102"


class ModelFileError(MoecError):
    """A user's model file can't be read, or has no such name in it."""

    code = "M0103"


# 02: the IR
class IRError(MoecError):
    """The IR is not well formed: undefined or doubled names, broken use of state, unknown symbols."""

    code = "M0201"


class ParseError(MoecError):
    """IR text that can't be read."""

    code = "M0202"


class TypeMismatch(MoecError):
    """An op's operands don't fit each other."""

    code = "M0203"


class AttributeMismatch(MoecError):
    """An op's attribute is missing, unknown or of another kind."""

    code = "M0204"


class UnknownOp(MoecError):
    code = "M0205"


# 03: configurations
class ConfigUnreadable(MoecError):
    """config.json is missing, is no JSON or is no object."""

    code = "M0301"


class ConfigContradiction(MoecError):
    """Two fields of config.json, or a field and its legal range, contradict each other."""

    code = "M0302"


class UnsupportedModel(MoecError):
    """The architecture, or a feature of it, isn't one that moec compiles."""

    code = "M0303"


# 04: weights
class WeightsUnreadable(MoecError):
    """A weight folder or file that can't be read: absent, truncated, no safetensors."""

    code = "M0401"


class WeightsMissing(MoecError):
    code = "M0402"


class WeightsExtra(MoecError):
    code = "M0403"


class WeightsMisshapen(MoecError):
    """A tensor has another shape, or a dtype that can't be converted."""

    code = "M0404"


class PickleRefused(MoecError):
    """Pickled weights execute code when read; moec reads safetensors only."""

    code = "M0405"


class WeightsBroken(MoecError):
    """Values that no model can have: a scale that is NaN or infinite, which would hide in whole blocks."""

    code = "M0406"


# 05: packages
class OutputExists(MoecError):
    code = "M0501"


class OutputUnwritable(MoecError):
    code = "M0502"


class NotAPackage(MoecError):
    code = "M0503"


class PackageTampered(MoecError):
    """A generated file is not the one whose hash the manifest holds."""

    code = "M0504"


class DeviceUnavailable(MoecError):
    """The package was built for a device that this process can't use."""

    code = "M0505"


# 06: calls at run time
class BadInput(MoecError):
    """Ids outside the vocabulary, an empty or too long prompt, tensors of the wrong shape or dtype."""

    code = "M0601"


class CacheFull(MoecError):
    """The KV cache has no free block for what was asked."""

    code = "M0602"


class NotDifferentiable(MoecError):
    """A backward pass through an operator that is for inference only."""

    code = "M0603"


# 07: passes and options
class BadOption(MoecError):
    code = "M0701"


class UnknownPass(MoecError):
    code = "M0702"


class UnknownTarget(MoecError):
    code = "M0703"


class UnknownKernel(MoecError):
    """No kernel of that name emits the op for the target."""

    code = "M0704"


class BadSchedule(MoecError):
    """A schedule that can't be read, or that the op's kernel or the device can't take."""

    code = "M0705"


class ToleranceExceeded(MoecError):
    """A pass changed an output by more than the tolerance that its run was given."""

    code = "M0706"


class BadTuning(MoecError):
    """A tuning file that can't be read: absent, no JSON, or not what `moec tune` writes."""

    code = "M0707"


# 08: compiling and launching kernels
class CompileFailed(MoecError):
    """A kernel's variant that its compiler refuses; the message is the compiler's."""

    code = "M0801"


class TooMuchSharedMemory(MoecError):
    """A block needs more shared memory, or tensor memory, than the device has."""

    code = "M0802"


class CompilerMissing(MoecError):
    """Triton, or one of the tools that its wheel carries, isn't there or can't run."""

    code = "M0803"


class Misaligned(MoecError):
    """An argument breaks a promise of divisibility that its kernel was compiled with."""

    code = "M0804"


class BadArgument(MoecError):
    """A launch with too many or too few arguments, or one of the wrong kind, dtype or range."""

    code = "M0805"


class NotCompiled(MoecError):
    """There is no such variant of the kernel, or the package holds no cubin of it for this device."""

    code = "M0806"


class InterpreterOff(MoecError):
    """A kernel is to run on the CPU, but Triton's interpreter wasn't on before the process started."""

    code = "M0807"


class LaunchFailed(MoecError):
    """The CUDA driver refuses to load or launch a kernel."""

    code = "M0808"
