"""What of ours can be saved to a file of its own, and opened again without saying what it is.

The format is that of `mechlens.runs.artifacts`. A file names its class, which is looked up in `KINDS`: nothing that a
file says is ever imported or built otherwise.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.methods.directions.direction import Direction, DirectionGrid
from mechlens.methods.guard.guard import GuardEstimator
from mechlens.registry import loaded
from mechlens.runs import artifacts
from mechlens.runs.vectors.direction_files import GRID, STACK, dimensions, read_mean_differences, read_pickled
from mechlens.runs.vectors.foreign_vectors import read_refusal_direction, read_repeng

KINDS = {
    "Direction": "mechlens.methods.directions.direction:Direction",
    "DirectionGrid": "mechlens.methods.directions.direction:DirectionGrid",
    "Activations": "mechlens.methods.activations.activations:Activations",
    "Answers": "mechlens.methods.behaviour.answers:Answers",
    "Centroids": "mechlens.methods.probing.beliefs:Centroids",
    "Detection": "mechlens.methods.probing.detect:Detection",
    "FittedGuard": "mechlens.methods.guard.fitted:FittedGuard",
    "Controller": "mechlens.methods.steering.controllers.controller:Controller",
    "PatchResult": "mechlens.methods.patching.result:PatchResult",
    "Checkpoint": "mechlens.models.checkpoint:Checkpoint",
    "Split": "mechlens.prompts.split:Split",
    "TokenBatch": "mechlens.prompts.batch:TokenBatch",
}
ENDING = ".safetensors"
_PICKLES = (".pt", ".pth", ".bin")


def save(thing: object, path: str | os.PathLike[str]) -> Path:
    """Writes a result to one safetensors file, whole or not at all; `open` gives an equal one back, bit by bit.

    Such as a Direction, DirectionGrid, Activations, Answers, PatchResult, or a guard, of which its FittedGuard is
    written. UserError for anything else.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> path = ml.save(direction, "direction.safetensors")
    >>> again = ml.open("direction.safetensors")
    >>> again == direction, again.contrast
    (True, ('harmful', 'harmless'))
    """
    held = thing.fitted_ if isinstance(thing, GuardEstimator) and hasattr(thing, "fitted_") else thing
    kind = type(held).__name__
    if kind not in KINDS or type(held) is not loaded(KINDS[kind]):
        unfitted = "a guard that isn't fitted" if isinstance(thing, GuardEstimator) else f"a {kind}"
        raise UserError(f"{unfitted} can't be saved; save one of {', '.join(KINDS)}, or a fitted guard")
    file = user_path(path)
    if file.suffix != ENDING:
        raise UserError(f"{file} doesn't end in {ENDING}, by which `open` knows it; name it {file.name}{ENDING}")
    artifacts.require_loadable(held)
    artifacts.save(held, file)
    return file


def open_file(file: Path) -> Any:
    """What a file holds: what `save` wrote, or another tool's directions (.gguf, .pt)."""
    if file.suffix == ENDING:
        kind = artifacts.read_header(file)["class"]
        if kind not in KINDS:
            raise UserError(f"{file} holds a {kind:.80}, which `open` doesn't know; it opens {', '.join(KINDS)}")
        return artifacts.load(file, loaded(KINDS[kind]))
    if file.suffix == ".gguf":
        return _together(read_repeng(file))
    if file.suffix in _PICKLES:
        return _foreign(file)
    raise UserError(
        f"{file} is nothing that can be opened; give a run folder, a {ENDING} file of ours, or another tool's "
        "directions (.gguf, .pt)"
    )


def _foreign(file: Path) -> Direction | DirectionGrid:
    if file.with_name("direction_metadata.json").exists():
        return read_refusal_direction(file)
    axes = dimensions(file)
    if axes == GRID:
        return read_mean_differences(file)
    if axes == STACK:
        raise UserError(
            f"{file} is a stack of directions and doesn't say where they were read; give the position too: "
            "mechlens.runs.vectors.direction_files.read_stack(path, position)"
        )
    return _together(read_pickled(file))


def _together(found: Sequence[Direction]) -> Direction | DirectionGrid:
    """Directions of one file, one a level, as one thing."""
    if len(found) == 1:
        return found[0]
    import torch

    one = found[0]
    return DirectionGrid(
        vectors=torch.stack([direction.vector for direction in found])[:, None],
        levels=tuple(direction.level for direction in found), positions=(one.position,), site=one.site,
        method=one.method, contrast=one.contrast, checkpoint=one.checkpoint, template=one.template,
        train_ids=one.train_ids, last=one.position if one.position == "last" else "",
    )  # fmt: skip
