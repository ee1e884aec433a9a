"""`mechlens checkpoints`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from mechlens.errors import UserError
from mechlens.studies.registry import Command


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Show a series of checkpoints: steps, order, kind, and what can't be used and why."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Training output folders, folders of adapters or models, single ones, hub ids, or id@revision."""
    base: str = "smollm2"
    """The model that the checkpoints were trained from: step 0."""
    revision: str | None = None
    """Branch, tag or commit of a base on the hub."""
    json: bool = False
    """Print one JSON object, for machines."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UserError(
                "there are no checkpoints; name a training run's output folder, an adapter, a model or id@revision, "
                "such as mechlens checkpoints runs/benign"
            )


COMMAND = Command(
    "checkpoints",
    Checkpoints,
    "mechlens.studies.checkpoints.study:execute",
    ("mechlens checkpoints runs/benign --base smollm2-refuser",),
)
