"""`mechlens sweep`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mechlens.settings import Options, PositiveInt
from mechlens.studies.registry import Command


@dataclass(frozen=True, kw_only=True)
class Slurm(Options):
    """What a job of Slurm asks for."""

    partition: str | None = None
    """Partition; None is the cluster's default."""
    minutes: PositiveInt = 240
    """Time limit. A job that reaches it is queued again, at most three times, and goes on where it was."""
    cpus: PositiveInt = 4
    """Processors."""
    setup: tuple[str, ...] = ()
    """Shell lines before the worker starts, such as "module load cuda"."""
    cluster: Literal["slurm", "local"] = "slurm"
    """local tries the same without Slurm: processes that submitit starts on this machine, all at once."""


@dataclass(frozen=True, kw_only=True)
class Ray(Options):
    """A Ray cluster, and what a task of it asks for."""

    address: str = "local"
    """Cluster: auto, head:6379 or ray://head:10001; local is one on this machine that ends with the command."""
    cpus: PositiveInt = 1
    """Processors of a task."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Options):
    """Do one study many times: every combination of options that a plan names, each in a run folder of its own.

    The plan is a YAML file with `study`, `options` (the same for all) and `over` (lists, every combination of which is
    a job). Finished jobs are skipped and killed ones go on, so the same command again is how a sweep is repaired, or
    made larger.
    """

    plan: Annotated[Path, tyro.conf.Positional]
    """YAML file; `studies/sweep/README.md` has one."""
    out: Path
    """Folder of the sweep: a run folder for each job, and what was made of them together."""
    dry_run: bool = False
    """Only show the jobs, and how long what is left may take; nothing is written."""
    engine: Literal["local", "slurm", "ray"] = "local"
    """Where jobs run: processes on this machine, Slurm (extra `slurm`), or a Ray cluster (extra `ray`)."""
    workers: PositiveInt = 1
    """Processes at a time."""
    slurm: Slurm = field(default_factory=Slurm)
    """For --engine slurm."""
    ray: Ray = field(default_factory=Ray)
    """For --engine ray."""


COMMAND = Command(
    "sweep",
    Sweep,
    "mechlens.studies.sweep.study:sweep",
    (
        "mechlens sweep plan.yaml --out runs/sweep --dry-run",
        "mechlens sweep plan.yaml --out runs/sweep --workers 2",
        "mechlens sweep plan.yaml --out runs/sweep --workers 16 --engine slurm --slurm.partition gpu",
        "mechlens sweep plan.yaml --out /shared/sweep --workers 16 --engine ray --ray.address auto",
    ),
)
