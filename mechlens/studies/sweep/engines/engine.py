"""What an engine is, and those that there are; each is imported when it is asked for and not before."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mechlens.studies.sweep.config import Ray, Slurm

Groups = Sequence[Sequence[Path]]
Look = Callable[[Sequence[Path]], None]
"""Told, again and again, which jobs are at work."""
PACKAGE = "mechlens.studies.sweep.engines"


@dataclass(frozen=True)
class Resources:
    """What an engine may take."""

    workers: int
    """Groups of jobs at a time."""
    gpus: int
    """GPUs of one worker; 0 is one of its own where this machine has some, and none that is asked of a cluster."""
    logs: Path
    """Folder for what workers write."""
    slurm: Slurm
    ray: Ray


class Engine(Protocol):
    """Has every group of jobs done by one process, wherever; returns when nothing is at work any more.

    What became of the jobs stands in their folders, which all workers see. A job whose process was lost is simply not
    done: the sweep gives it to the engine again.
    """

    def __call__(self, groups: Groups, resources: Resources, look: Look) -> None: ...


def engine_called(name: str, resources: Resources) -> Engine:
    """The engine; UserError, before anything is written, where what it needs isn't there."""
    module = importlib.import_module(f"{PACKAGE}.{name}")
    module.require(resources)
    found: Engine = module.run
    return found
