"""Runs on an object store as folders of this machine, to be read; they go with the process."""

import atexit
import shutil
import tempfile
import time
from pathlib import Path

from mechlens.errors import UserError
from mechlens.runs.lock import FolderLock
from mechlens.runs.remote import lock as locks
from mechlens.runs.remote.store import Store, address, is_remote

LEFT = {"cache", "wandb", locks.LOCKS.rstrip("/")}
"""What a reader needs nothing of."""
_KEPT: dict[Path, str] = {}
"""Copies with the addresses that they are of."""
_HELD: list[FolderLock] = []


def copy_of(path: Path, only: str = "") -> Path:
    """A folder with what lies at a path on a store, or with the objects there of one name only; other paths as given.

    UserError where nothing lies there. A run that somebody is at work on is locked as theirs is.
    """
    if not is_remote(path):
        return path
    store = Store(path)
    names = store.names()
    wanted = [name for name in names if not LEFT & set(name.split("/"))]
    if only:
        wanted = [name for name in wanted if name.rpartition("/")[2] in ("", only)]
    if not wanted:
        raise UserError(f"there is nothing at {address(path)}; give a folder that holds a run or runs")
    copy = Path(tempfile.mkdtemp(prefix="mechlens-copy-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for name in wanted:
        store.get(name, copy / path.name / name)
    _KEPT[copy / path.name] = address(path)
    for name in names:
        folder, inside, _ = name.rpartition(locks.LOCKS)
        if inside and time.time() - store.modified(name) < locks.STALE:
            _HELD.append(FolderLock(copy / path.name / folder))
    return copy / path.name


def shown(folder: Path) -> str:
    """What to call a folder: a copy by the address that it is of."""
    for copy, url in _KEPT.items():
        if folder.is_relative_to(copy):
            return "/".join([url, *folder.relative_to(copy).parts])
    return str(folder)
