"""`mechlens runs`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mechlens.studies.registry import Command


@dataclass(frozen=True, kw_only=True)
class ListRuns:
    """List the runs below a folder."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Folder that holds run folders."""
    study: str | None = None
    """Only runs of this study, such as separate or "guard fit"."""
    model: str | None = None
    """Only runs of this model or base, by its short name or as it was given."""
    status: Literal["running", "interrupted", "success", "error"] | None = None
    """Only runs that are this far."""
    since: str | None = None
    """Only runs begun on this day (UTC) or later, such as 2026-11-27."""
    until: str | None = None
    """Only runs begun on this day or earlier."""
    json: bool = False
    """Print one JSON object a run, for machines."""


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


@dataclass(frozen=True, kw_only=True)
class IndexRuns:
    """Write one page, index.html, that links all reports below a folder, each with its sentence."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Folder that holds run folders; the page goes into it."""


@dataclass(frozen=True, kw_only=True)
class PruneRuns:
    """Remove what finished runs no longer need: cache/, and W&B's offline logs that have been uploaded."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Folder that holds run folders, or one of them."""
    dry_run: bool = False
    """Only say what would be removed."""


@dataclass(frozen=True, kw_only=True)
class CompareRuns:
    """Set runs of one study side by side: their numbers, the differences from the first, and what they differ in."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The runs' folders, two or more."""
    out: Path | None = None
    """Folder for one page and the tables; None only prints what decides."""


LIST = Command(
    "runs list",
    ListRuns,
    "mechlens.studies.runs.study:list_all",
    (
        "mechlens runs list",
        "mechlens runs list runs --study separate --status success --since 2026-11-01",
        "mechlens runs list runs --json",
    ),
)
SHOW = Command("runs show", ShowRun, "mechlens.studies.runs.study:show", ("mechlens runs show runs/first",))
RERUN = Command("runs rerun", Rerun, "mechlens.studies.runs.study:again", ("mechlens runs rerun runs/first",))
INDEX = Command("runs index", IndexRuns, "mechlens.studies.runs.study:index", ("mechlens runs index runs",))
PRUNE = Command(
    "runs prune", PruneRuns, "mechlens.studies.runs.study:remove_superfluous", ("mechlens runs prune runs --dry-run",)
)
COMPARE = Command(
    "runs compare",
    CompareRuns,
    "mechlens.studies.runs.study:compare",
    (
        "mechlens runs compare runs/seed-0 runs/seed-1",
        "mechlens runs compare runs/a runs/b runs/c --out runs/compared",
    ),
)
