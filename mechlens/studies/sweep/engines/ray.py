"""Tasks of a Ray cluster."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechlens.errors import UserError, require_extra
from mechlens.methods.progress import say
from mechlens.runs.remote.store import is_remote
from mechlens.studies.sweep.engines import local
from mechlens.studies.sweep.engines.engine import Groups, Look, Resources
from mechlens.studies.sweep.worker import work_on

POLL = 2.0
"""Seconds between two looks at the folders."""
PATIENCE = 10.0
"""Seconds for a cluster to answer; Ray itself would ask for minutes."""
HERE = "local"
"""Address of a cluster of its own."""


def require(resources: Resources) -> None:
    """UserError where Ray is not installed, or nothing answers at the address."""
    require_extra("ray", "--engine ray")
    address = resources.ray.address
    if address == HERE:
        local.require(resources)
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from error


def run(groups: Groups, resources: Resources, look: Look) -> None:
    """A task a group, `workers` of them at a time, with no more than folders' names sent either way.

    Ray retries nothing by itself: of what was killed for memory it would never tire.
    """
    ray = _connected(resources)
    task = ray.remote(num_cpus=resources.ray.cpus, num_gpus=resources.gpus, max_retries=0)(work_in)
    waiting = [[folder if is_remote(folder) else folder.resolve() for folder in group] for group in groups]
    working: dict[Any, list[Path]] = {}
    try:
        while waiting or working:
            while waiting and len(working) < resources.workers:
                folders = waiting.pop(0)
                working[task.remote(os.getcwd(), [str(folder) for folder in folders])] = folders
            ended, _ = ray.wait(list(working), timeout=POLL)
            look([folder for group in groups for folder in group])
            for one in ended:
                _forgive(ray, one)
                del working[one]
    except BaseException:
        for one in working:
            ray.cancel(one, force=True)
        raise


def work_in(here: str, folders: Sequence[str]) -> None:
    """Does the jobs; paths in their configurations are as where the command was given, if that is shared too."""
    if Path(here).is_dir():
        os.chdir(here)
    work_on([Path(folder) for folder in folders])


def _connected(resources: Resources) -> Any:
    """Ray at the address that was given; nothing is reported to anybody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    address = resources.ray.address
    own = {"include_dashboard": False} if address == HERE else {}
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unreachable(address, error) from error
    asked, there = {"CPU": resources.ray.cpus, "GPU": resources.gpus}, ray.cluster_resources()
    for kind in [name for name, number in asked.items() if number > there.get(name, 0)]:
        say(f"ray: the cluster has {there.get(kind, 0):g} {kind}s now and a task asks for {asked[kind]}; it may wait")
    return ray


def _unreachable(address: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(f"there is no Ray cluster at {address!r} ({reason:.200}); give the --ray.address of one")


def _forgive(ray: Any, task: Any) -> None:
    """A task whose process or node was lost leaves its jobs undone, which their folders say.

    UserError for one that couldn't begin: what happens in a job is in its folder and never comes here.
    """
    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"a task failed on the Ray cluster ({reason:.300}); install this mechlens on its nodes"
        ) from error
    except ray.exceptions.RayError:
        return
