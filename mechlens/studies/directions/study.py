"""`mechlens directions`: out to other tools and in from them."""

from mechlens.runs.results.saved import save
from mechlens.runs.vectors.direction_files import read_direction
from mechlens.runs.vectors.exported import export_direction
from mechlens.studies.directions.config import ExportDirection, ImportDirection
from mechlens.studies.registry import Screen


def export(config: ExportDirection, screen: Screen) -> None:
    """Writes the file and says what is in it."""
    direction = read_direction(config.direction, config.layer, config.position)
    file = export_direction(
        direction, config.out, config.format, strength=config.strength, unit=config.unit, blocks=config.blocks
    )
    screen.show(f"{file}: {direction!r}, to be added to the output of block {direction.level - 1}")


def take_in(config: ImportDirection, screen: Screen) -> None:
    """Writes our file and says what is in it."""
    direction = read_direction(config.direction, config.layer, config.position)
    screen.show(f"{save(direction, config.out)}: {direction!r}")
