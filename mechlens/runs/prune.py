"""What a finished run's folder no longer needs: the pieces by which a killed one goes on, and W&B's uploaded logs."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mechlens.errors import UserError
from mechlens.files import disk_error, is_partial
from mechlens.runs.folder import CACHE
from mechlens.runs.lock import FolderLock
from mechlens.runs.results.result import list_runs
from mechlens.runs.wandb.sync import is_synced, logs_in

LEFT = {
    "running": "it is running",
    "interrupted": "it was interrupted, and goes on from there",
    "error": "it failed, and goes on from there",
}
"""Why nothing is removed."""


@dataclass(frozen=True)
class Pruned:
    """What was removed from a run folder, or would be."""

    folder: Path
    paths: tuple[Path, ...]
    freed: int
    """Bytes."""
    left: str = ""
    """Why nothing was removed; "" where it was."""


def superfluous(folder: Path) -> list[Path]:
    """In a finished run's folder: its cache, what a dead process left half-written, W&B's logs that are uploaded."""
    found = [folder / CACHE] if (folder / CACHE).is_dir() else []
    found += [path for path in sorted(folder.rglob("*")) if is_partial(path) and CACHE not in path.parts]
    return found + [log for log in logs_in(folder) if is_synced(log)]


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as nothing."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def prune(root: Path, *, dry: bool) -> list[Pruned]:
    """Removes it from every finished run below `root`, apart from those that a process is writing to.

    With `dry` nothing is removed. Runs that failed or were killed keep all: by that they go on.
    """
    done = []
    for run in list_runs(root):
        paths = tuple(superfluous(run.folder))
        if not paths:
            continue
        if run.status != "success":
            done.append(Pruned(run.folder, paths, 0, LEFT[run.status]))
            continue
        done.append(_pruned(run.folder, paths, dry=dry))
    return done


def _pruned(folder: Path, paths: tuple[Path, ...], *, dry: bool) -> Pruned:
    freed = sum(map(size, paths))
    if dry:
        return Pruned(folder, paths, freed)
    try:
        lock = FolderLock(folder)
    except UserError as error:
        return Pruned(folder, paths, 0, str(error))
    try:
        for path in paths:
            remove(path)
    finally:
        lock.release()
    return Pruned(folder, paths, freed)


def remove(path: Path) -> None:
    """A file, or a folder with all in it; a link goes, and what it leads to stays."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise disk_error(error, path) from error
