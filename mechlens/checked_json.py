"""JSON from files, checked against the type that it should have; the one reader of everything of ours in JSON.

What a file holds may be damaged, hostile or somebody else's. Whatever it is, the answer is a value of the type that was
asked for, or a UserError that names the file, the place in it and what to do.

Records of ours are sealed: they hold the sha256 of everything else in them, so that one changed byte is noticed and no
other number is read. Records from before that have no seal; they are checked by type only.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mechlens.errors import UserError, quoted

SEAL = "sha256"
LARGEST = 1 << 28
"""Bytes of a file; no record is nearly as large."""
Extra = Literal["forbid", "ignore"]


def read_json(path: Path, shape: Any, remedy: str, *, extra: Extra = "ignore") -> Any:
    """A file's JSON as a value of the type `shape`; `remedy` says what to do about a file that is no such thing.

    FileNotFoundError where there is none, since only the caller knows what that means.
    """
    return parse_json(_content(path), shape, str(path), remedy, extra=extra)


def parse_json(text: str | bytes, shape: Any, name: str, remedy: str, *, extra: Extra = "ignore") -> Any:
    """JSON as a value of the type `shape`, nothing converted; `name` is what an error calls it.

    `extra` decides what becomes of fields that a dataclass doesn't have.
    """
    from pydantic import ValidationError

    try:
        return _adapter(shape).validate_json(text, strict=True, extra=extra)
    except ValidationError as error:
        raise UserError(f"{name} {_reason(error)}; {remedy}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds half a character (an unpaired surrogate); {remedy}") from error


def read_sealed(path: Path, shape: Any, remedy: str, *, sealed_from: int, extra: Extra = "ignore") -> Any:
    """A record that `sealed` made; formats below `sealed_from` had no seal."""
    return parse_sealed(_content(path), shape, str(path), remedy, sealed_from=sealed_from, extra=extra)


def parse_sealed(
    text: str | bytes, shape: Any, name: str, remedy: str, *, sealed_from: int, extra: Extra = "ignore"
) -> Any:
    """As `read_sealed`, of a text."""
    record: dict[str, Any] = parse_json(text, dict[str, Any], name, remedy)
    form = record.get("format", 0)
    if SEAL in record or not isinstance(form, int) or form >= sealed_from:
        record = unsealed(record, name, remedy)
    return checked(record, shape, name, remedy, extra=extra)


def unsealed(record: dict[str, Any], name: str, remedy: str) -> dict[str, Any]:
    """What `sealed` was given; UserError where it is no longer that."""
    inside = {key: value for key, value in record.items() if key != SEAL}
    if record.get(SEAL) != _digest(inside):
        raise UserError(f"{name} was changed by hand or damaged (its {SEAL} is of other contents); {remedy}")
    return inside


def checked(value: object, shape: Any, name: str, remedy: str, *, extra: Extra = "ignore") -> Any:
    """A plain JSON value as a value of the type `shape`."""
    return parse_json(json.dumps(value), shape, name, remedy, extra=extra)


def require_types(given: Any, plain: object) -> None:
    """UserError for the first value of a dataclass, here as plain JSON too, that is of another type than its field."""
    from pydantic import PydanticUserError, ValidationError

    shape: Any = type(given)
    try:
        _adapter(shape).validate_json(json.dumps(plain), strict=True)
    except PydanticUserError:  # a type of another package's that can't be checked
        return
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if not first["loc"]:
            return
        name, said = str(first["loc"][0]), str(first["msg"]).replace("Input", "it")
        value = getattr(given, name, None)
        raise UserError(f"{name} is {quoted(value)} (of type {type(value).__name__}); {said}") from error


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record, a plain JSON object, with the sha256 of what is in it."""
    return {**record, SEAL: _digest(json.loads(json.dumps(record)))}


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def _content(path: Path) -> bytes:
    try:
        if not path.is_file() and path.exists():  # a pipe or a device would never end
            raise UserError(f"{path} is not a regular file; check the path")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST >> 20} MB, which no record is; check the path")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except ValueError as error:  # no name that a file can have, such as one with a NUL
        raise error if isinstance(error, UserError) else FileNotFoundError(str(error)) from error
    except OSError as error:
        raise UserError(
            f"{path} could not be read ({error.strerror or error}); check the path and its permissions"
        ) from error


def _reason(error: Any) -> str:
    """What is wrong, and where, by the first of what may be many things."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    said = str(first["msg"])
    if first["type"] == "json_invalid":
        return f"is not JSON ({said.removeprefix('Invalid JSON: ')})"
    place = ".".join(str(part) for part in first["loc"])
    return f"holds something else than it should ({f'{place[:80]!a}: ' if place else ''}{said[0].lower()}{said[1:]})"
