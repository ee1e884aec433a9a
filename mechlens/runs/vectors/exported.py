"""Directions written for other tools, each as its own loader wants it: lm-eval, repeng and llama.cpp, steering-vectors.

All of them add the vector to a block's output at every token, which is what `Add` does by default. Block N's output is
level N + 1, so level 0 can't be taken out, and of llama.cpp, which leaves block 0 alone, level 1 neither. They hook
unprocessed Hugging Face weights, so directions of folded ones are refused.

lm-eval and steering-vectors read files of `torch.save`, which are pickles: this is the one place in mechlens that
writes any, and what it writes is tensors, numbers and text alone, so that `torch.load(weights_only=True)` reads it.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from mechlens.errors import UserError, many, quoted, require_extra
from mechlens.files import AnyPath, user_path, whole_file
from mechlens.methods.directions.direction import Direction, require_is_direction
from mechlens.methods.steering.interventions import Unit
from mechlens.registry import unknown_name

Format = Literal["gguf", "lm-eval", "steering-vectors"]
ENDINGS: dict[str, tuple[str, ...]] = {
    "gguf": (".gguf",),
    "lm-eval": (".pt", ".pth"),
    "steering-vectors": (".pt", ".pth"),
}
LOWEST: dict[str, int] = {"gguf": 2, "lm-eval": 1, "steering-vectors": 1}
"""The lowest level that each tool can add at."""
BLOCKS = "layers"
"""What the blocks are called within a Llama, Qwen, Gemma, Mistral, NeoX or OLMo; in GPT-2 it is h."""


def export_direction(
    direction: Direction | Sequence[Direction],
    path: AnyPath,
    format: Format,
    *,
    strength: float = 1.0,
    unit: Unit = "raw",
    blocks: str = BLOCKS,
) -> Path:
    """Writes a direction for another tool, which then steers as `Add` with this strength does at its own level.

    "gguf": repeng and llama.cpp (`--control-vector`); "steering-vectors": `SteeringVector(**torch.load(path))`;
    "lm-eval": `lm_eval --model steered --model_args pretrained=...,steer_path=PATH`. The first two take several
    directions of different levels; lm-eval one a file, as its older versions add the last one everywhere. `blocks`,
    for lm-eval, is what the model calls its list of blocks. Which model and template it was made with doesn't come
    along: `open` reads it as another tool's.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> direction = ml.mean_difference(ml.collect(model, prompts), "harmful", "harmless", level=2, position="last")
    >>> path = ml.export_direction(direction, "harm.gguf", "gguf")
    >>> again = ml.open(path)
    >>> bool((again.vector == direction.vector).all()), again.level, again.checkpoint.name
    (True, 2, 'foreign')
    """
    several = list(direction) if isinstance(direction, Sequence) else [direction]
    file = user_path(path)
    require_exportable(several, file, format)
    if not all(part.isidentifier() for part in blocks.split(".")):
        raise UserError(f"blocks is {quoted(blocks)}; give what the model calls its list of blocks, such as {BLOCKS}")
    if not math.isfinite(strength) or strength == 0:
        raise UserError(f"the strength is {strength:g}, with which nothing can be added; give another, such as 1")
    factors = [strength * length_of(one, unit) for one in several]
    # A direction of another type may be longer than float32, which all of them read, can say.
    if not all(bool(torch.isfinite(_scaled(one, times)).all()) for one, times in zip(several, factors, strict=True)):
        raise UserError(f"with a strength of {strength:g} the vector is too long for float32; give a smaller one")
    with whole_file(file) as partial:
        _WRITERS[format](partial, list(zip(several, factors, strict=True)), blocks)
    return file


def require_exportable(directions: Sequence[Direction], file: Path, format: str) -> None:
    """UserError for what a tool would refuse, or add where it doesn't belong."""
    if format not in get_args(Format):
        raise unknown_name("format", format, list(get_args(Format)))
    if file.suffix not in ENDINGS[format]:
        raise UserError(
            f"{file} doesn't end as a file of {format} does; name it {file.with_suffix(ENDINGS[format][0]).name}"
        )
    if not directions:
        raise UserError("no direction was given to export; give one")
    for one in directions:
        require_is_direction(one)
        if one.site != "resid":
            raise UserError(
                f"the direction was read at {one.site}, and {format} adds to the residual stream; take one read there"
            )
        if one.checkpoint.regime == "processed":
            raise UserError(
                "the direction was made with weights that TransformerLens folded, and other tools run a model as it "
                "is; make it anew with raw ones, as ml.load gives"
            )
        if one.level < LOWEST[format]:
            raise UserError(
                f"the direction is of level {one.level}, and {format} adds to the outputs of blocks, from level "
                f"{LOWEST[format]} on; take one of a higher level"
            )
        if one.norm == 0:
            raise UserError("the direction has length 0, so it points nowhere; make it from other prompts")
    levels = [one.level for one in directions]
    if len(set(levels)) < len(levels):
        raise UserError(f"two of the directions are of one level (they are of {levels}); add them first, or take one")
    if format == "lm-eval" and len(directions) > 1:
        raise UserError(
            f"{many(len(directions), 'direction')} were given, and a file of lm-eval holds one (of several, its older "
            "versions add the last one everywhere); write a file each"
        )


def length_of(direction: Direction, unit: Unit) -> float:
    """How many times the vector strength 1 is."""
    if unit != "share":
        return 1.0 if unit == "raw" else 1 / direction.norm
    if direction.residual_norm is None:
        raise UserError(
            "the direction doesn't carry the residual norm that a share is of; give the strength as unit or raw"
        )
    return direction.residual_norm / direction.norm


Pushes = Sequence[tuple[Direction, float]]
"""Directions, and how many times each is added."""


def _gguf(file: Path, pushes: Pushes, blocks: str) -> None:
    require_extra("gguf", "a control vector in GGUF")
    from gguf import GGUFWriter

    kind = "controlvector"
    writer = GGUFWriter(file, kind)
    writer.add_description("; ".join(map(_told, pushes)))
    writer.add_string(f"{kind}.model_hint", pushes[0][0].checkpoint.name)
    writer.add_uint32(f"{kind}.layer_count", len(pushes))
    for one, times in pushes:
        # llama.cpp takes rows of float32 only.
        writer.add_tensor(f"direction.{one.level - 1}", _scaled(one, times).numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _lm_eval(file: Path, pushes: Pushes, blocks: str) -> None:
    ((one, times),) = pushes
    steered = {
        "steering_vector": _scaled(one, 1.0), "steering_coefficient": times, "action": "add", "bias": None,
        "head_index": None, "description": _told((one, times)),
    }  # fmt: skip
    _save_plain({f"{blocks}.{one.level - 1}": steered}, file)


def _steering_vectors(file: Path, pushes: Pushes, blocks: str) -> None:
    by_layer = {one.level - 1: _scaled(one, times) for one, times in pushes}
    _save_plain({"layer_activations": by_layer, "layer_type": "decoder_block"}, file)


_WRITERS: dict[str, Callable[[Path, Pushes, str], None]] = {
    "gguf": _gguf, "lm-eval": _lm_eval, "steering-vectors": _steering_vectors,
}  # fmt: skip


def _scaled(direction: Direction, times: float) -> torch.Tensor:
    """A float32 vector of its own: of a slice, torch would save all that it was cut from."""
    return (times * direction.vector.detach().double()).float().cpu().clone()


def _told(push: tuple[Direction, float]) -> str:
    direction, times = push
    return f"{times:.6g} times {direction!r}, by mechlens"


def _save_plain(plain: dict[Any, Any], file: Path) -> None:
    torch.save(plain, file)
