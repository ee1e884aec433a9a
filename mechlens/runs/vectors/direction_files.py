"""Whole stacks made by other tools: the seed paper's directions, centroids and states, refusal_direction's grid.

Read as safely as single vectors (see `foreign_vectors`), and like them of a checkpoint named "foreign" without
fingerprints, so that no check can find them fitting a model. Both tools hook the inputs of unprocessed Hugging Face
blocks; the seed paper adds the last block's output before the final norm, so its stacks have every level from 0 to L.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mechlens.errors import UserError, warn
from mechlens.files import AnyPath, user_path
from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import Direction, DirectionGrid
from mechlens.methods.probing.beliefs import Centroids
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.difference import FOREIGN
from mechlens.runs import artifacts
from mechlens.runs.run import RUN_FILE
from mechlens.runs.vectors.foreign_vectors import (
    load_numbers,
    load_tensors,
    read_refusal_direction,
    read_repeng,
    read_steering_vectors,
)
from mechlens.runs.vectors.lm_eval_vectors import is_lm_eval, read_lm_eval

_MADE_BY = "seed paper"


def read_stack(path: Path, position: str, contrast: tuple[str, str] = ("harmful", "harmless")) -> DirectionGrid:
    """Directions of the seed paper (Zhao et al. 2025), one a level: a tensor or array (level, d_model).

    The file doesn't say where they were read: their `hf` is "inst" and their `refuse` is "last".
    """
    values = _of_rank(path, STACK, "(level, d_model)")
    return _grid(values[:, None], (position,), _MADE_BY, contrast, last=position if position == "last" else "")


def read_stacked_centroids(
    positive: Path, negative: Path, position: str, contrast: tuple[str, str] = ("harmful", "harmless")
) -> Centroids:
    """The seed paper's centroids of two classes, each a stack (level, d_model); `position` as in `read_stack`."""
    both = [_of_rank(path, STACK, "(level, d_model)") for path in (positive, negative)]
    if both[0].shape != both[1].shape:
        raise UserError(
            f"{positive} holds {list(both[0].shape)} and {negative} {list(both[1].shape)} numbers; "
            "centroids need two stacks of one model"
        )
    return Centroids(
        positive=both[0], negative=both[1], levels=tuple(range(len(both[0]))), position=position, site="resid",
        contrast=contrast, checkpoint=Checkpoint(name=FOREIGN, path=FOREIGN), template="", train_ids=(),
    )  # fmt: skip


def read_states(paths: Mapping[str, Path]) -> Activations:
    """The seed paper's hidden states, by label: tensors (level, prompt, position, d_model).

    Positions are the two last tokens of the instruction and all template tokens after it, as their script stores them,
    or with two positions `inst` and `last`. `centroids` and `direction_grid` of what is read are theirs.
    """
    found = {label: _of_rank(path, STATES, "(level, prompt, position, d_model)") for label, path in paths.items()}
    shapes = {(len(values), *values.shape[2:]) for values in found.values()}
    if len(shapes) != 1:
        raise UserError(
            f"the files hold states of {len(shapes)} kinds {sorted(shapes)} (levels, positions, d_model); "
            "give files of one model and one template"
        )
    levels, n_positions, _ = shapes.pop()
    names = _stored_positions(n_positions)
    ids = [(label, f"{label} {i}") for label, values in found.items() for i in range(values.shape[1])]
    return Activations(
        values=torch.cat([values.transpose(0, 1) for values in found.values()]),
        levels=tuple(range(levels)),
        positions=names,
        ids=tuple(own for _, own in ids),
        labels=tuple(label for label, _ in ids),
        families=tuple(own for _, own in ids),
        site="resid",
        checkpoint=Checkpoint(name=FOREIGN, path=FOREIGN),
        template="",
        last=names[-1],
    )


def read_mean_differences(path: Path) -> DirectionGrid:
    """The whole grid of candidates of refusal_direction: its `mean_diffs.pt`, (position, layer, d_model).

    Their layer is a block's input, our level; their positions are the last tokens of the prompt, post[-n] to post[-1].
    """
    values = _of_rank(path, GRID, "(position, layer, d_model)")
    names = tuple(f"post[{k}]" for k in range(-len(values), 0))
    return _grid(values.transpose(0, 1), names, "refusal_direction", ("harmful", "harmless"), last="post[-1]")


def _grid(
    vectors: Tensor, positions: tuple[str, ...], method: str, contrast: tuple[str, str], last: str
) -> DirectionGrid:
    return DirectionGrid(
        vectors=vectors.contiguous(), levels=tuple(range(len(vectors))), positions=positions, site="resid",
        method=method, contrast=contrast, checkpoint=Checkpoint(name=FOREIGN, path=FOREIGN), template="",
        train_ids=(), last=last,
    )  # fmt: skip


def _stored_positions(n: int) -> tuple[str, ...]:
    if n < 2:
        raise UserError(f"the states have {n} position; the seed paper stores the instruction's end and the template")
    return ("inst", "last") if n == 2 else ("instruction[-2]", "inst", *(f"post[{k}]" for k in range(n - 2)))


STACK, GRID, STATES = 2, 3, 4
"""How many axes each kind of file has."""


def dimensions(path: Path) -> int | None:
    """How many axes the tensor or array of a file has; None where it holds something else."""
    found = load_tensors(path)
    return found.ndim if isinstance(found, Tensor | np.ndarray) else None


def _of_rank(path: Path, rank: int, axes: str) -> Tensor:
    values = load_numbers(path)
    if values.ndim != rank or not values.numel():
        raise UserError(f"{path} holds numbers of shape {list(values.shape)}; {axes} is needed")
    return values


_PICKLES = (".pt", ".pth", ".bin")


def read_direction(path: AnyPath, layer: int | None = None, position: str | None = None) -> Direction:
    """The one direction of a file at a level and position; either may be left out where the file has only one.

    The ending tells whose file it is, and of .pt files what lies beside it and what it holds. Of a run's folder it is
    the direction to use, or with a warning the strongest where there is none.
    """
    path = user_path(path)
    if (path / RUN_FILE).is_file():
        path = _of_run(path)
    found = _own(path, position) if path.suffix == ".safetensors" else _foreign(path, position)
    if len(found) == 1:
        return found[0]
    levels = [direction.level for direction in found]
    if layer not in levels:
        asked = "which isn't said" if layer is None else f"and not of level {layer}"
        raise UserError(
            f"{path} holds directions of levels {_listed(levels)} {asked}; name one of them as the "
            f"layer: --layer {levels[0]} (layer= in Python)"
        )
    return found[levels.index(layer)]


def _of_run(folder: Path) -> Path:
    """The file in a run's folder that holds its one direction."""
    if (best := folder / "direction.safetensors").is_file():
        return best
    if (strongest := folder / "strongest.safetensors").is_file():
        warn(f"the run {folder} has no best direction; this is its strongest, {strongest.name}")
        return strongest
    held = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))) or "no .safetensors file"
    raise UserError(f"the run {folder} has no one direction; give one of its files by its path (it holds {held})")


def _own(path: Path, position: str | None) -> tuple[Direction, ...]:
    """What `artifacts.save` wrote: one direction, or a grid of which one position is taken."""
    kind = artifacts.read_header(path)["class"]
    if kind == Direction.__name__:
        one = artifacts.load(path, Direction)
        if position not in (None, one.position):
            beside = path.parent / "directions.safetensors"
            others = f"; give {beside}, which holds those of all positions" if beside.is_file() else ""
            raise UserError(f"{path} holds the direction at {one.position!r}, not at {position!r}{others}")
        return (one,)
    if kind != DirectionGrid.__name__:
        raise UserError(f"{path} holds a {kind}, not a direction; give a direction of a run folder")
    return _of_grid(path, artifacts.load(path, DirectionGrid), position)


def _of_grid(path: Path, grid: DirectionGrid, position: str | None) -> tuple[Direction, ...]:
    if position is None and len(grid.positions) > 1:
        raise UserError(
            f"{path} holds directions at {', '.join(grid.positions)}; name one of them as the position: "
            f"--position {grid.positions[0]} (position= in Python)"
        )
    return tuple(grid.at(level, position or grid.positions[0]) for level in grid.levels)


def _foreign(path: Path, position: str | None) -> tuple[Direction, ...]:
    numbers = dimensions(path) if path.suffix in _PICKLES else None
    if numbers == GRID:
        return _of_grid(path, read_mean_differences(path), position)
    if numbers == STACK:
        if position is None:
            raise UserError(
                f"{path} is a stack of directions and doesn't say where they were read; name the position: "
                "--position inst or --position last (position= in Python)"
            )
        return _of_grid(path, read_stack(path, position), position)
    if position is not None:
        raise UserError(f"{path} holds one position only, so leave the position out")
    if path.suffix == ".gguf":
        return read_repeng(path)
    if path.is_dir() or (path.suffix == ".pt" and path.with_name("direction_metadata.json").exists()):
        return (read_refusal_direction(path),)
    if path.suffix in _PICKLES:
        return read_pickled(path)
    raise UserError(
        f"{path} has an unknown ending; give a .safetensors, .pt or .gguf file, or refusal_direction's folder"
    )


def read_pickled(path: Path) -> tuple[Direction, ...]:
    """The directions in a file of lm-eval's or steering-vectors', one a level."""
    return read_lm_eval(path) if is_lm_eval(load_tensors(path)) else read_steering_vectors(path)


def _listed(levels: list[int]) -> str:
    return f"{levels[0]} to {levels[-1]}" if levels == list(range(levels[0], levels[-1] + 1)) else str(levels)
