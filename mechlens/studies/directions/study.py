"""`mechlens directions`: out to other tools and in from them."""

from pathlib import Path

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering.controllers.controller import Controller
from mechlens.runs import artifacts
from mechlens.runs.results.saved import save
from mechlens.runs.vectors.direction_files import read_direction
from mechlens.runs.vectors.exported import export_direction
from mechlens.studies.directions.config import ExportDirection, ImportDirection
from mechlens.studies.registry import Screen

CONTROLLER = "controller.safetensors"


def export(config: ExportDirection, screen: Screen) -> None:
    """Writes the file and says what is in it."""
    given = _directions(config)
    file = export_direction(
        given, config.out, config.format, strength=config.strength, unit=config.unit, blocks=config.blocks
    )
    for one in given:
        screen.show(f"{file}: {one!r}, to be added to the output of block {one.level - 1}")


def take_in(config: ImportDirection, screen: Screen) -> None:
    """Writes our file and says what is in it."""
    direction = read_direction(config.direction, config.layer, config.position)
    screen.show(f"{save(direction, config.out)}: {direction!r}")


def _directions(config: ExportDirection) -> list[Direction]:
    """The one direction that is asked for, or what a controller adds at each of its layers when its gate is open."""
    path = user_path(config.direction)
    file = path / CONTROLLER if (path / CONTROLLER).is_file() else path
    if not _is_controller(file):
        return [read_direction(config.direction, config.layer, config.position)]
    controller = artifacts.load(file, Controller)
    found = controller.constant(controller.evidence.get("strength", 1.0))
    levels = [one.level for one in found]
    if config.layer is not None and config.layer not in levels:
        raise UserError(f"the controller adds at levels {levels}, and not at {config.layer}; name one of them")
    return [one for one in found if config.layer in (None, one.level)]


def _is_controller(file: Path) -> bool:
    is_ours = file.suffix == ".safetensors" and file.is_file()
    return is_ours and artifacts.read_header(file)["class"] == Controller.__name__
