"""`mechlens runs`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mechlens.studies.registry import Command


@dataclass(frozen=True, kw_only=True)
class ListRuns:
    """List the runs below a folder."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Folder that holds run folders."""


@dataclass(frozen=True, kw_only=True)
class ShowRun:
    """Show one run: status, configuration, metrics, artefacts."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """Make a run again from its record and compare the numbers."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    out: Path | None = None
    """Where the new run goes; None makes it in a temporary folder and keeps only the comparison."""


LIST = Command("runs list", ListRuns, "mechlens.studies.runs.study:list_all")
SHOW = Command("runs show", ShowRun, "mechlens.studies.runs.study:show")
RERUN = Command("runs rerun", Rerun, "mechlens.studies.runs.study:again")
