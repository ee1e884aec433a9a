"""Processes on this machine, a fixed number at a time, each with its share of the processors and GPUs of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mechlens.errors import UserError, many
from mechlens.studies.sweep.engines.engine import Groups, Look, Resources

POLL = 0.2
"""Seconds between two looks at the processes."""
WORKER = "mechlens.studies.sweep.worker"


@dataclass(frozen=True)
class _Working:
    folders: Sequence[Path]
    process: "subprocess.Popen[bytes]"
    log: IO[bytes]
    gpus: str | None


def require(resources: Resources) -> None:
    """UserError where a job needs more GPUs than can be seen."""
    if resources.gpus > (seen := len(visible_gpus())):
        raise UserError(f"the plan asks for {many(resources.gpus, 'GPU')} for each job, and {seen} can be seen here")


def run(groups: Groups, resources: Resources, look: Look) -> None:
    """Does groups of jobs, a process a group, `workers` of them at a time."""
    logs, workers = resources.logs, resources.workers
    logs.mkdir(parents=True, exist_ok=True)
    gpus: list[str | None] = list(gpu_sets(resources.gpus)) or [None] * workers
    waiting, working = list(enumerate(groups)), list[_Working]()
    try:
        while waiting or working:
            while waiting and len(working) < workers and gpus:
                number, folders = waiting.pop(0)
                working.append(_started(folders, logs / f"{number:03}.log", workers, gpus.pop(0)))
            time.sleep(POLL)
            ended = [one for one in working if one.process.poll() is not None]
            look([folder for one in working for folder in one.folders])
            for one in ended:
                one.log.close()
                gpus.append(one.gpus)
                working.remove(one)
    finally:
        for one in working:
            one.process.kill()
            one.process.wait()
            one.log.close()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by what CUDA_VISIBLE_DEVICES calls them; found without touching any."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]


def gpu_sets(gpus: int) -> list[str]:
    """The GPUs of each worker at a time; one of its own where nothing is asked."""
    visible, each = visible_gpus(), max(gpus, 1)
    return [",".join(visible[i : i + each]) for i in range(0, len(visible) - each + 1, each)]


def _started(folders: Sequence[Path], log: Path, workers: int, gpus: str | None) -> _Working:
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    own: dict[str, str] = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if gpus is not None:
        own["CUDA_VISIBLE_DEVICES"] = gpus
    file: Any = log.open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", WORKER, *map(str, folders)],
        stdin=subprocess.PIPE, stdout=file, stderr=file, env={**os.environ, **own},
    )  # fmt: skip
    return _Working(folders, process, file, gpus)
