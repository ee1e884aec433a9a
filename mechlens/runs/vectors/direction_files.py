"""Directions from any file that holds some: mechlens', refusal_direction's, repeng's, steering-vectors', a stack."""

from pathlib import Path

from mechlens.errors import UserError
from mechlens.methods.directions.direction import Direction, DirectionGrid
from mechlens.runs import artifacts
from mechlens.runs.vectors.foreign_grids import GRID, STACK, dimensions, read_mean_differences, read_stack
from mechlens.runs.vectors.foreign_vectors import read_refusal_direction, read_repeng, read_steering_vectors

_PICKLES = (".pt", ".pth", ".bin")


def read_direction(path: Path, layer: int | None = None, position: str | None = None) -> Direction:
    """The one direction of a file at a level and position; either may be left out where the file has only one.

    The ending tells whose file it is, and of .pt files what lies beside it and what it holds.
    """
    found = _own(path, position) if path.suffix == ".safetensors" else _foreign(path, position)
    if len(found) == 1:
        return found[0]
    levels = [direction.level for direction in found]
    if layer not in levels:
        asked = "which isn't said" if layer is None else f"and not of level {layer}"
        raise UserError(f"{path} holds directions of levels {_listed(levels)} {asked}; name one of them as the layer")
    return found[levels.index(layer)]


def _own(path: Path, position: str | None) -> tuple[Direction, ...]:
    """What `artifacts.save` wrote: one direction, or a grid of which one position is taken."""
    kind = artifacts.read_header(path)["class"]
    if kind == Direction.__name__:
        one = artifacts.load(path, Direction)
        if position not in (None, one.position):
            raise UserError(f"{path} holds the direction at {one.position!r}, not at {position!r}")
        return (one,)
    if kind != DirectionGrid.__name__:
        raise UserError(f"{path} holds a {kind}, not a direction; give a direction of a run folder")
    return _of_grid(path, artifacts.load(path, DirectionGrid), position)


def _of_grid(path: Path, grid: DirectionGrid, position: str | None) -> tuple[Direction, ...]:
    if position is None and len(grid.positions) > 1:
        raise UserError(f"{path} holds directions at {', '.join(grid.positions)}; name one of them as the position")
    return tuple(grid.at(level, position or grid.positions[0]) for level in grid.levels)


def _foreign(path: Path, position: str | None) -> tuple[Direction, ...]:
    numbers = dimensions(path) if path.suffix in _PICKLES else None
    if numbers == GRID:
        return _of_grid(path, read_mean_differences(path), position)
    if numbers == STACK:
        if position is None:
            raise UserError(f"{path} is a stack of directions and doesn't say where they were read; name the position")
        return _of_grid(path, read_stack(path, position), position)
    if position is not None:
        raise UserError(f"{path} holds one position only, so leave the position out")
    if path.suffix == ".gguf":
        return read_repeng(path)
    if path.is_dir() or (path.suffix == ".pt" and path.with_name("direction_metadata.json").exists()):
        return (read_refusal_direction(path),)
    if path.suffix in _PICKLES:
        return read_steering_vectors(path)
    raise UserError(
        f"{path} has an unknown ending; give a .safetensors, .pt or .gguf file, or refusal_direction's folder"
    )


def _listed(levels: list[int]) -> str:
    return f"{levels[0]} to {levels[-1]}" if levels == list(range(levels[0], levels[-1] + 1)) else str(levels)
