"""Directions made by other tools: refusal_direction, repeng and steering-vectors files.

Others save with `torch.save`, which writes pickles, and a pickle may run any code when it is read. This is the one
place in mechlens that opens such a file, and it does so with `weights_only=True` only: PyTorch then builds tensors,
plain containers and, by an allow-list, NumPy arrays of numbers, and refuses everything else. Whatever can't be read so
is a UserError; there is no way around it.

None of these files says which model or chat template it belongs to. The directions read from them name the checkpoint
"foreign", with an empty weight fingerprint, an empty template fingerprint and no training prompts, so that no check
can find them fitting: whoever uses one on a model must say so explicitly. All three tools hook unprocessed Hugging
Face weights, hence the regime "raw".
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechlens.errors import UserError, kind_of, require_extra
from mechlens.files import require_regular
from mechlens.methods.directions.direction import Direction
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.difference import FOREIGN

# What a pickled array of numbers is made of, under its names in NumPy 1 and 2. None of it runs what the file says.
_REBUILD: Any = np.zeros(0).__reduce__()[0]
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8")),
    (_REBUILD, "numpy._core.multiarray._reconstruct"),
    (_REBUILD, "numpy.core.multiarray._reconstruct"),
]
# Wider than any model: a hostile file can claim a size that its few bytes don't fill.
_MAX_SIZE = 1 << 20
_TENSOR = re.compile(r"direction\.(0|[1-9]\d{0,5})")


def is_foreign(direction: Direction) -> bool:
    """True for a direction read from another tool's file, whose model and template nobody recorded."""
    return direction.checkpoint.name == FOREIGN and not direction.checkpoint.fingerprint


def read_refusal_direction(path: Path) -> Direction:
    """The direction that andyrdt/refusal_direction selected: `direction.pt` with `direction_metadata.json` beside it.

    `path` is the .pt file or its folder. Their layer is the input of a block, so it is our level. Their position -k
    counts from the end of the formatted prompt and becomes "post[-k]"; their templates are written by hand and can
    differ from the tokenizer's own, so compare the tokens there (`mechlens positions`). The vector is the raw
    difference of means, harmful minus harmless.
    """
    file = path / "direction.pt" if path.is_dir() else path
    beside = file.with_name("direction_metadata.json")
    vector = _vector(load_tensors(file), file)
    position, layer = _metadata(beside)
    return _foreign(vector, layer, f"post[{position}]", "refusal_direction", ("harmful", "harmless"))


def read_repeng(path: Path) -> tuple[Direction, ...]:
    """The control vector that repeng (or llama.cpp's generator) saved as GGUF, one direction a layer, by level.

    Their layer N is the output of block N, which is our level N + 1. Read at the last token of whatever text was
    given, with or without a chat template, hence "last". By repeng's default they have length 1: choose strengths
    anew. Caution: repeng reads the last block after the final norm and adds before it, so the highest level's vector
    is of another space.
    """
    reader = _open_gguf(path)
    architecture = _text(reader, "general.architecture")
    if architecture != "controlvector":
        raise UserError(
            f"{path} is a GGUF file of architecture {architecture!r}, not of a control vector; "
            "give what repeng's export_gguf wrote"
        )
    by_layer = {}
    for tensor in reader.tensors:
        match = _TENSOR.fullmatch(tensor.name)
        if match is None or tensor.data.dtype.kind != "f":
            raise UserError(
                f"{path} holds the tensor {tensor.name!r} of type {tensor.tensor_type.name}; a control vector has "
                "tensors direction.0, direction.1, ... of type F16, F32 or F64"
            )
        by_layer[int(match[1])] = torch.from_numpy(np.array(tensor.data, dtype=np.float64))
    hint = _text(reader, "controlvector.model_hint") or "unknown model type"
    return by_level(by_layer, f"repeng ({hint[:40]})", path)


def read_steering_vectors(path: Path) -> tuple[Direction, ...]:
    """A vector of the steering-vectors library saved by `torch.save`, one direction a layer, by level.

    The library has no save method. Read are its `layer_activations` (a dict from layer number to tensor) and a dict
    with that and `layer_type`, as `dataclasses.asdict` makes it; a pickled SteeringVector itself needs code to be run
    and is refused. Layer N of type decoder_block is the output of block N, our level N + 1; other layer types aren't
    the residual stream and are refused. Read at the last token of the given text unless its maker chose another, which
    isn't recorded; hence "last".
    """
    saved = load_tensors(path)
    if isinstance(saved, Tensor | np.ndarray):
        raise UserError(
            f"{path} holds {_described(saved)} and not a dict from layer numbers to vectors, so its layer isn't known; "
            "save {12: vector} in its place, with the layer's own number"
        )
    if isinstance(saved, Mapping) and "layer_activations" in saved:
        kind = saved.get("layer_type", "decoder_block")
        if kind != "decoder_block":
            raise UserError(f"{path} holds vectors for {kind!r}; only decoder_block is the residual stream")
        saved = saved["layer_activations"]
    if not isinstance(saved, Mapping) or not all(_is_layer(layer) for layer in saved):
        raise UserError(f"{path} is not a dict from layer numbers (0, 1, ...) to tensors; save layer_activations")
    return by_level(saved, "steering-vectors", path)


def _foreign(vector: Tensor, level: int, position: str, method: str, contrast: tuple[str, str]) -> Direction:
    return Direction(
        vector=vector,
        level=level,
        position=position,
        site="resid",
        method=method,
        contrast=contrast,
        checkpoint=Checkpoint(name=FOREIGN, path=FOREIGN),
        template="",
        train_ids=(),
    )


def by_level(by_layer: Mapping[int, object], method: str, path: Path) -> tuple[Direction, ...]:
    """A direction for every block's output, lowest first; UserError for none, or for unequal sizes."""
    vectors = {layer: _vector(by_layer[layer], path) for layer in sorted(by_layer)}
    sizes = sorted({len(vector) for vector in vectors.values()})
    if len(sizes) != 1:
        found = f"vectors of sizes {sizes}" if sizes else "no vectors"
        raise UserError(f"{path} holds {found}; it needs one vector a layer, all of one size")
    return tuple(
        _foreign(vector, layer + 1, "last", method, ("positive", "negative")) for layer, vector in vectors.items()
    )


def _vector(value: object, path: Path) -> Tensor:
    """A float32 copy of what should be one finite vector of plain numbers."""
    vector = plain_numbers(value, path)
    if vector.ndim != 1 or not 0 < len(vector) <= _MAX_SIZE:
        raise UserError(f"{path} holds {_described(value)} where one vector of d_model numbers is needed")
    return vector


def load_numbers(path: Path) -> Tensor:
    """The one tensor or NumPy array of a file made by `torch.save`, as float32; UserError unless all is finite."""
    return plain_numbers(load_tensors(path), path)


def plain_numbers(value: object, path: Path) -> Tensor:
    """A float32 copy of plain, finite, real numbers."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value.astype(np.float32))
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise UserError(f"{path} holds {_described(value)} where a plain tensor is needed; make it again")
    if not value.is_floating_point():
        raise UserError(f"{path} holds {_described(value)} where real numbers are needed; make it again")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{path} holds {_described(value)} and fewer numbers than that; make it again")
    # A slice is saved with the whole tensor that it was cut from; the copy lets that go.
    numbers = value.detach().to(torch.float32, copy=True)
    if not bool(torch.isfinite(numbers).all()):
        raise UserError(f"{path} holds numbers that are not finite; make it again")
    return numbers


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.device.type} tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of {value.dtype} {list(value.shape)}"
    return kind_of(value)


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, if it is made of tensors, plain containers and arrays of numbers."""
    _require_readable(path)
    try:
        with torch.serialization.safe_globals(_NUMPY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about a pickle that it may not be able to read
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may fail in any way, and only this call is inside
        raise UserError(
            f"{path} is damaged or holds more than tensors and arrays of floats in torch.save's format, so it was not "
            "read (code in it was not run); of an array save torch.tensor(array), of a pickled SteeringVector save "
            "vector.layer_activations in its place"
        ) from error


def _is_layer(layer: object) -> bool:
    return isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0


def _metadata(path: Path) -> tuple[int, int]:
    """Position and layer from refusal_direction's metadata."""
    _require_readable(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON; it needs the position and layer of the direction beside it") from error
    position, layer = (found.get(name) for name in ("pos", "layer")) if isinstance(found, dict) else (None, None)
    if not isinstance(position, int) or position >= 0 or not isinstance(layer, int) or not _is_layer(layer):
        raise UserError(f'{path} holds {str(found)[:80]}; it needs {{"pos": -k, "layer": l}}, k from 1 and l from 0')
    return position, layer


def _open_gguf(path: Path) -> Any:
    """The gguf package's reader, made to stop where the file ends."""
    require_extra("gguf", "a GGUF file")
    from gguf import GGUFReader

    class StrictReader(GGUFReader):  # type: ignore[misc]
        def _get(self, offset: Any, dtype: Any, count: Any = 1, *rest: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *rest, **named)
            # The reader gives empty arrays behind the end, and would go on through a list of any claimed length.
            if len(found) < int(count):
                raise ValueError("the file ends early")
            return found

    _require_readable(path)
    try:
        return StrictReader(path)
    except Exception as error:  # as in load_tensors
        raise UserError(f"{path} is damaged or not a GGUF file; export it again") from error


def _text(reader: Any, name: str) -> str:
    """A text field of a GGUF file; "" where it is missing or no text."""
    field = reader.get_field(name)
    return "" if field is None else bytes(field.parts[-1]).decode("utf-8", errors="replace")


def _require_readable(path: Path) -> None:
    require_regular(path)
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; check the path") from error
    except OSError as error:
        raise UserError(
            f"{path} could not be read ({error.strerror or error}); check the path and its permissions"
        ) from error
