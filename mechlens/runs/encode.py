"""Frozen dataclasses as JSON with their tensors put aside, and back again, types intact."""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import jaxtyped
from torch import Tensor
from typeguard import CollectionCheckStrategy, check_type

# JSON has no tuples, no tensors, no NaN and only text as keys; an object with one of these keys says
# what was meant.
TUPLE, DICT, TENSOR, FLOAT, CLASS = "$tuple", "$dict", "$tensor", "$float", "$class"


def encode(value: object, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors are added to `tensors` under their field path."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {FLOAT: str(value)}
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if isinstance(value, list | tuple):
        items = [encode(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {TUPLE: items}
    if isinstance(value, dict):
        return {DICT: [_encode_item(item, path, tensors) for item in value.items()]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {CLASS: type(value).__name__, "fields": encode_fields(value, f"{path}.", tensors)}
    raise TypeError(f"field {path!r} holds a {type(value).__name__}, which cannot be saved")


def encode_fields(obj: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """JSON for each field of a dataclass."""
    names = [field.name for field in dataclasses.fields(obj)]
    return {name: encode(getattr(obj, name), f"{prefix}{name}", tensors) for name in names}


def _encode_item(item: tuple[object, object], path: str, tensors: dict[str, Tensor]) -> list[Any]:
    key, value = item
    if isinstance(key, Tensor):
        raise TypeError(f"field {path!r} has a tensor as a key, which cannot be saved")
    return [encode(key, f"{path}.key", tensors), encode(value, f"{path}[{key!r}]", tensors)]


def decode(value: Any, tensors: Mapping[str, Tensor], classes: Mapping[str, type]) -> Any:
    """What `encode` was given; only the named classes are ever built."""
    if isinstance(value, list):
        return [decode(item, tensors, classes) for item in value]
    if not isinstance(value, dict):
        return value
    if CLASS in value:
        return decode_fields(classes[value[CLASS]], value["fields"], tensors, classes)
    ((kind, content),) = value.items()
    if kind == DICT:
        return {decode(k, tensors, classes): decode(v, tensors, classes) for k, v in content}
    decoders: dict[str, Callable[[Any], Any]] = {
        TUPLE: lambda items: tuple(decode(item, tensors, classes) for item in items),
        TENSOR: lambda name: tensors[name],
        FLOAT: float,
    }
    return decoders[kind](content)


def decode_fields(
    cls: type, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], classes: Mapping[str, type]
) -> Any:
    """An object of `cls`, each field of the type that its hint says; what the file lacks takes the class's default."""
    values = {name: decode(value, tensors, classes) for name, value in fields.items()}
    hints = typing.get_type_hints(cls)
    # One name of an axis has one length within an object.
    with jaxtyped("context"):
        for name, value in values.items():
            check_type(value, hints[name], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    return cls(**values)


def classes_within(cls: type) -> dict[str, type]:
    """Every dataclass that an object of `cls` may hold, by name, found from the type hints.

    A file names its classes, and a name from a file must never choose what is imported or built.
    """
    found: dict[str, type] = {}
    waiting: list[Any] = [cls]
    while waiting:
        hint = waiting.pop()
        waiting.extend(typing.get_args(hint))
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint.__name__ not in found:
            found[hint.__name__] = hint
            waiting.extend(typing.get_type_hints(hint).values())
    return found
