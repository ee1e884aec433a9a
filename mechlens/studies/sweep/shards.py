"""Several processes on one job: each makes batches of its prompts, from another place on, and puts them into its cache.

The job itself goes through all of its batches as ever and finds in its cache what its helpers have made. A piece is the
same whoever made it, so the numbers are the job's own, whatever becomes of the helpers.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mechlens.models.engine.forward import FIRST
from mechlens.runs.folder import CACHE, FolderCache
from mechlens.runs.lock import is_held
from mechlens.runs.run import RUN_FILE, read_run
from mechlens.runs.writer import SHARED
from mechlens.settings import WandbSettings
from mechlens.studies.driver import do
from mechlens.studies.sweep.folders import failure_file, read_job

PATIENCE = 120.0
"""Seconds that a helper waits for its job to begin."""
POLL = 0.2


class Ended(Exception):
    """The job that was helped is at an end."""


class HelpersCache:
    """The cache of another process's run, as long as that is at work."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pieces = FolderCache(folder / CACHE)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The piece under `key`, or None."""
        self._require_at_work()
        return self._pieces.get(key)

    def put(self, key: str, value: dict[str, Tensor]) -> None:
        """Keeps a finished piece."""
        self._require_at_work()
        self._pieces.put(key, value)

    def _require_at_work(self) -> None:
        if not is_held(self._folder):
            raise Ended


def help_with(name: Path) -> None:
    """Makes pieces for a job until it has ended; nothing else stays of it."""
    folder = name.parent.parent.parent / name.parent.name
    number, _, shards = name.name.partition("-of-")
    config = read_job(folder).config
    if not _has_begun(folder):
        return
    own: dict[str, Any] = {"wandb": WandbSettings(mode="disabled")} if hasattr(config, "wandb") else {}
    first, shared = FIRST.set(int(number) / int(shards)), SHARED.set(HelpersCache(folder))
    try:
        with tempfile.TemporaryDirectory(prefix="mechlens-shard-") as scratch:
            do(replace(config, out=Path(scratch) / folder.name, **own))
    except Ended:
        return
    finally:
        FIRST.reset(first)
        SHARED.reset(shared)


def _has_ended(folder: Path) -> bool:
    return (folder / RUN_FILE).exists() and read_run(folder).status == "success"


def _has_begun(folder: Path) -> bool:
    """Waits for the job's process; False where it doesn't come, or has been."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and not (failure_file(folder).exists() or _has_ended(folder)):
        if is_held(folder) and (folder / RUN_FILE).exists():
            return True
        time.sleep(POLL)
    return False
