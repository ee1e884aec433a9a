"""Equality of results that hold tensors, whose own `==` gives a tensor."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


class Comparable:
    """A frozen dataclass (of `eq=False`) that equals another one with the same values, NaN standing equal to NaN."""

    def __eq__(self, other: object) -> bool:
        return same(self, other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return hash((type(self).__name__, *(value for value in values if isinstance(value, str | int))))


def same(a: Any, b: Any) -> bool:
    """Whether two values agree: tensors in type, shape and every number, on whichever device each is."""
    if a is b:
        return True
    if type(a) is not type(b) and not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a == b) if isinstance(a, int | float) and isinstance(b, int | float) else False
    if isinstance(a, Tensor):
        return _same_tensors(a, b)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    return bool(a == b)


def digest(value: Any) -> str:
    """sha256 of all that a value holds: of its fields and items, and of every number of its tensors."""
    return hashlib.sha256("\n".join(_parts(value)).encode()).hexdigest()


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        numbers = hashlib.sha256(plain.flatten().view(torch.uint8).numpy().tobytes())
        yield f"{plain.dtype} {tuple(plain.shape)} {numbers.hexdigest()}"
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__
        for field in fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        yield str(len(value))
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value)


def _same_tensors(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = a.detach().cpu(), b.detach().cpu()
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
