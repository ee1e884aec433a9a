"""A run on an object store: made in a folder of this machine, which is put there while it grows and at its end."""

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mechlens.errors import UserError
from mechlens.files import is_partial
from mechlens.runs.lock import LOCK_FILE
from mechlens.runs.remote import lock as locks
from mechlens.runs.remote.store import Store
from mechlens.runs.run import JOB_FILE, RUN_FILE

AT_THE_END = ("wandb", "steps.jsonl")
"""What grows line by line; everything else is written whole."""


@contextmanager
def mirrored(out: Path) -> Iterator[Path]:
    """A folder of this machine that holds what the store has at `out`, and for the block's time all that is put there.

    Finished pieces go up every few seconds, so that a killed run goes on with them wherever it is started again. The
    record goes first while the run is at work and last at its end: a run that is said to have ended is whole. UserError
    where another process is at work there, or the store couldn't be written at the end.
    """
    store = Store(out)
    held = locks.StoreLock(store)
    folder = Path(tempfile.mkdtemp(prefix="mechlens-run-")) / out.name
    try:
        mirror = Mirror(store, folder, held)
        mirror.pull()
        mirror.start()
        try:
            yield folder
        finally:
            mirror.finish()
            shutil.rmtree(folder.parent, ignore_errors=True)
    finally:
        held.release()


class Mirror:
    """Puts what is new in a folder to a store."""

    def __init__(self, store: Store, folder: Path, held: locks.StoreLock) -> None:
        self._store, self._folder, self._held = store, folder, held
        self._sent: dict[str, tuple[int, int]] = {}
        self._lost = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def pull(self) -> None:
        """What the store has, as files."""
        self._folder.mkdir()
        for name in self._store.names():
            if not name.startswith(locks.LOCKS):
                self._store.get(name, self._folder / name)
                self._sent[name] = _stamp(self._folder / name)

    def start(self) -> None:
        """From now on what is finished goes up by itself."""
        self._thread.start()

    def finish(self) -> None:
        """Puts the rest and takes away what the run has removed; UserError where it can't be."""
        self._ending.set()
        self._thread.join()
        try:
            if self._lost or not self._held.beat():
                raise UserError("another process took it over while this one showed no sign of life")
            self._put(last=True)
        except UserError as error:
            raise UserError(
                f"the run could not be put to {self._store.url}: {error}; it is in {self._folder}"
            ) from error

    def _follow(self) -> None:
        while not self._ending.wait(locks.BEAT):
            try:
                self._lost = self._lost or not self._held.beat()
                if not self._lost:
                    self._put(last=False)
            except (UserError, FileNotFoundError):
                continue  # a network that is away now may be back at the end, and else it is said there

    def _put(self, *, last: bool) -> None:
        names = [name for name in self._names() if last or name.partition("/")[0] not in AT_THE_END]
        for name in sorted(names, key=lambda name: (name == RUN_FILE) == last):
            path = self._folder / name
            if self._sent.get(name) != (stamp := _stamp(path)):
                self._store.put(path, name)
                self._sent[name] = stamp
        if last:
            for name in self._sent.keys() - set(names) - {JOB_FILE}:
                self._store.remove(name)

    def _names(self) -> list[str]:
        files = (path for path in self._folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
        inside = [path.relative_to(self._folder) for path in files]
        return [path.as_posix() for path in inside if not any(is_partial(Path(part)) for part in path.parts)]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
