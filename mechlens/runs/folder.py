"""One process at a time in a run folder; the operating system frees it when the process dies."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.files import disk_error
from mechlens.runs.run import RUN_FILE, Run, first_difference, read_run

LOCK_FILE = ".lock"


class FolderLock:
    """Holds the folder, made if need be, until `release` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._new = not path.exists()
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise disk_error(error, folder) from error
        if not self._take() or not _is_at(path, self._handle):
            os.close(self._handle)
            raise UserError(f"another mechlens process is writing to {folder}; wait for it or choose another --out")
        self._path = path

    def release(self) -> None:
        """Lets others in; the file stays."""
        os.close(self._handle)

    def withdraw(self) -> None:
        """Lets others in and leaves nothing in a folder that was refused; who was opening the file finds it gone."""
        if self._new:
            with contextlib.suppress(OSError):  # Windows removes no open file
                self._path.unlink()
        os.close(self._handle)

    def _take(self) -> bool:
        if sys.platform == "win32":
            # No flock there: two processes in one folder are then the user's own care.
            return True
        import fcntl

        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            # A file system without locks is no reason to refuse work.
            return True
        return True


def run_to_go_on_with(out: Path, verb: str, resolved: dict[str, Any]) -> Run | None:
    """The run in the folder if it is the same piece of work; None where there is none yet."""
    if not (out / RUN_FILE).exists():
        return None
    before = read_run(out)
    if before.verb != verb:
        raise UserError(f"{out} holds a run of `{before.verb}`, not of `{verb}`; choose another --out")
    if before.inputs.today and resolved.get("today") == before.inputs.today:
        resolved = resolved | {"today": before.resolved.get("today")}  # the day on which it began, now by its name
    if difference := first_difference(before.resolved, resolved):
        name, old, new = difference
        raise UserError(f"{out} holds a run with {name} = {old!r}, not {new!r}; choose another --out")
    return before


def _is_at(path: Path, handle: int) -> bool:
    """False where the file was removed after it was opened: holding it would keep nobody out."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False
