"""`mechlens wandb`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mechlens.studies.registry import Command


@dataclass(frozen=True, kw_only=True)
class SyncRuns:
    """Upload what was logged offline, by W&B's own `wandb sync`, and link each run to its inputs."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Folder that holds run folders, or one of them."""


@dataclass(frozen=True, kw_only=True)
class SaveWorkspace:
    """Save a view of the runs' project in W&B: sentences, main figures, numbers, tables (extra [workspaces])."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Folder that holds run folders of one W&B project, or one of them."""
    name: str = "mechlens"
    """Name of the view."""


SYNC = Command("wandb sync", SyncRuns, "mechlens.studies.wandb.study:sync_runs", ("mechlens wandb sync runs",))
WORKSPACE = Command(
    "wandb workspace",
    SaveWorkspace,
    "mechlens.studies.wandb.study:save_workspace",
    ("mechlens wandb workspace runs --name first",),
)
