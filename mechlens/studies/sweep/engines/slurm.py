"""Jobs of a Slurm cluster, as arrays, by submitit."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechlens.errors import UserError, require_extra
from mechlens.studies.sweep.engines.engine import Groups, Look, Resources
from mechlens.studies.sweep.worker import work_on

POLL = 2.0
"""Seconds between two looks at the folders."""


@dataclass(frozen=True)
class Work:
    """Does jobs in their folders; preempted or out of time, it is queued again and goes on where the folders are."""

    def __call__(self, folders: Sequence[Path]) -> None:
        work_on(list(folders))

    def checkpoint(self, folders: Sequence[Path]) -> Any:
        """Called by submitit when the process is about to be stopped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, folders)


def require(resources: Resources) -> None:
    """UserError where submitit is not installed, or this is no machine of a Slurm cluster."""
    require_extra("slurm", "--engine slurm")
    if resources.slurm.cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here; sweep on a machine that submits to Slurm, or with --engine local")


def run(groups: Groups, resources: Resources, look: Look) -> None:
    """Submits groups of jobs as one array, `workers` of them at a time, and waits; stopped by hand, it cancels them."""
    import submitit

    how = resources.slurm
    executor = submitit.AutoExecutor(folder=resources.logs, cluster=how.cluster)
    executor.update_parameters(
        name="mechlens-sweep", timeout_min=how.minutes, gpus_per_node=resources.gpus, tasks_per_node=1,
        cpus_per_task=how.cpus, slurm_array_parallelism=resources.workers, slurm_setup=list(how.setup),
        **({"slurm_partition": how.partition} if how.partition else {}),
    )  # fmt: skip
    jobs = executor.map_array(Work(), [list(group) for group in groups]) if groups else []
    try:
        while not all(job.done() for job in jobs):
            time.sleep(POLL)
            look([folder for group in groups for folder in group])
    except BaseException:
        for job in jobs:
            job.cancel(check=False)
        raise
    look([folder for group in groups for folder in group])
