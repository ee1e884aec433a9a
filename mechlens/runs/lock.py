"""One process at a time in a run's folder, and whether there is one."""

import contextlib
import os
import sys
from pathlib import Path

from mechlens.errors import UserError
from mechlens.files import disk_error

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


def is_held(folder: Path) -> bool:
    """Whether a process is at work in the folder; True where the system can't tell."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _is_at(path: Path, handle: int) -> bool:
    """False where the file was removed after it was opened: holding it would keep nobody out."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False
