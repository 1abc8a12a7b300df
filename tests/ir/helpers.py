"""What the op tests share: running a reference with the declared defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from moec.ir.op import op_class


def reference(name: str, *operands: Any, **attrs: Any) -> Any:
    """The op's reference; attributes that aren't given have their defaults."""
    cls = op_class(name)
    unknown = set(attrs) - set(cls.attr_specs)
    assert not unknown, unknown
    defaults = {key: spec.default for key, spec in cls.attr_specs.items() if not spec.required}
    return cls.reference(*operands, **defaults | attrs)


def offsets(lengths: Iterable[int]) -> torch.Tensor:
    """0, n0, n0+n1, ..."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
