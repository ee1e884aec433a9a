"""Results on disk: one safetensors file each, its labels as JSON in the header, never a pickle.

Frozen dataclasses become JSON with their tensors put aside, and back again, types intact. Version 2 seals the header,
and with it the digest of the tensors: a changed byte is noticed. Files of version 1 are read as well; they have no
digest, so of them only types, shapes and finite values are checked.
"""

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from jaxtyping import jaxtyped
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from mechlens.checked_json import checked, parse_json, sealed, unsealed
from mechlens.errors import UserError
from mechlens.files import as_os_error, file_sha256, require_regular, whole_file
from mechlens.methods.shown import cut

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


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes: the file format itself does not notice a changed byte."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.flatten()
        if flat.stride(0) != 1:  # one number of a row that was repeated, which torch calls contiguous and can't view
            flat = flat.clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# One entry holds all, as safetensors writes several in an order that changes from file to file, and equal
# results should have equal sha256.
ENTRY = "mechlens"
VERSION = SEALED_FROM = 2

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class _Version:
    version: int


@dataclasses.dataclass(frozen=True)
class _Header1(_Version):
    kind: Annotated[str, Field(alias="class")]
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Header2(_Header1):
    tensors: str
    """Digest of the tensors."""


_HEADERS = {1: _Header1, 2: _Header2}
RENAMED = {("PatchResult", "direction"): "mode"}
"""Fields, by class, that older files know by another name."""
IN_WORDS = {
    "FittedGuard": "guard",
    "Direction": "direction",
    "Controller": "controller",
    "DirectionGrid": "grid of directions",
}
"""What a class of files is called where people read it; others by their names."""
WRITTEN_AS = {
    "FittedGuard": "the guard.safetensors that `guard fit` writes",
    "Direction": "the direction.safetensors that `direction` writes",
    "Controller": "the controller.safetensors that `steer train` writes",
}
REMEDY = "make it again, or take it from where it came from"


MAY_LACK = {"Activations": ("values",)}
"""By class, the tensors that hold NaN where something isn't there, as a position that a prompt doesn't have."""


def save(obj: object, path: Path) -> None:
    """Writes a frozen dataclass to `path`, whole or not at all; `load` gives an equal one back."""
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"{type(obj).__name__} is not a dataclass object")
    tensors: dict[str, Tensor] = {}
    fields = encode_fields(obj, "", tensors)
    header = {
        "version": VERSION, "class": type(obj).__name__, "fields": fields, "tensors": tensor_digest(tensors),
    }  # fmt: skip
    write_tensors(tensors, {ENTRY: json.dumps(sealed(header), ensure_ascii=False, allow_nan=False)}, path)


def write_tensors(tensors: dict[str, Tensor], header: dict[str, str], path: Path) -> None:
    """One safetensors file of tensors and header, whole or not at all."""
    with whole_file(path) as partial:
        try:
            save_file(_separate(tensors), partial, metadata=header)
        except SafetensorError as error:
            raise as_os_error(error) or OSError(str(error)) from error


def load(path: Path, cls: type[Result]) -> Result:
    """The object of class `cls` that `save` wrote to `path`.

    UserError for anything else: another class, a changed byte, a field of another type or shape, a tensor that isn't
    finite. A file of version 1 has no digest: there a changed byte that leaves the value finite isn't noticed.
    """
    header = read_header(path)
    if header["class"] != cls.__name__:
        found, wanted = (IN_WORDS.get(name, name) for name in (header["class"], cls.__name__))
        raise UserError(f"{path} holds a {found}, not a {wanted}; give {WRITTEN_AS.get(cls.__name__, 'such a file')}")
    fields = {RENAMED.get((cls.__name__, name), name): value for name, value in header["fields"].items()}
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(fields.keys() - known):
        raise UserError(
            f"{path} has the field {unknown[0]!r}, which this version's {cls.__name__} does not know; "
            "update mechlens or make the file again"
        )
    tensors = read_tensors(path)
    if header.get("tensors") not in (None, tensor_digest(tensors)):
        raise UserError(f"{path} is damaged: its numbers aren't those that were written; {REMEDY}")
    return _built(cls, fields, tensors, str(path))


def require_loadable(obj: object) -> None:
    """UserError for an object that `load` would refuse, such as one with a field of another type, before it's saved."""
    tensors: dict[str, Tensor] = {}
    fields = encode_fields(obj, "", tensors)
    _built(type(obj), json.loads(json.dumps(fields)), tensors, f"this {type(obj).__name__}, which `open` would refuse,")


def _built(cls: type[Result], fields: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Result:
    for name, tensor in tensors.items():
        missing = tensor.isnan() if name in MAY_LACK.get(cls.__name__, ()) else torch.tensor(False)
        if not bool((tensor.isfinite() | missing).all()):
            raise UserError(f"{where} holds numbers in {name!r} that are not finite; {REMEDY}")
    try:
        built: Result = decode_fields(cls, fields, tensors, classes_within(cls))
        getattr(built, "require_consistent", lambda: None)()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, TypeCheckError) as error:
        said = cut(str(error), 200)
        raise UserError(f"{where} is not a complete {cls.__name__} ({said}); make it again") from error
    return built


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file that `save` wrote: version, class name, fields, and since version 2 the tensors' digest."""
    entry = open_tensors(path)[0].get(ENTRY)
    if entry is None:
        raise UserError(f"{path} was not written by mechlens; give a file from a mechlens run folder")
    version: int = parse_json(entry, _Version, f"the header of {path}", REMEDY).version
    if version not in _HEADERS:
        raise UserError(
            f"{path} has format version {version}, this mechlens reads versions {min(_HEADERS)} to {VERSION}; "
            "update mechlens or make the file again"
        )
    header: dict[str, Any] = parse_json(entry, dict[str, Any], f"the header of {path}", REMEDY)
    if version >= SEALED_FROM:
        header = unsealed(header, f"the header of {path}", REMEDY)
    checked(header, _HEADERS[version], f"the header of {path}", REMEDY, extra="forbid")
    return header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor in a safetensors file, on the CPU."""
    return open_tensors(path, tensors=True)[1]


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, by which records name their inputs."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def open_tensors(path: Path, tensors: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and, where asked for, tensors of any safetensors file."""
    require_regular(path)
    try:
        # safetensors says "No such file" for a file that it may not read; opening it first tells them apart.
        with path.open("rb"):
            pass
        with safe_open(path, framework="pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
            return dict(file.metadata() or {}), values
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file; make it again") from error


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"there is no file {path}; check the path")
    reason = error.strerror or error
    return UserError(f"{path} could not be read ({reason}); check the path and its permissions")


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each with memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    return separate
