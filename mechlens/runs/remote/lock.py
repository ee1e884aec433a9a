"""One process at a time in a run's folder on an object store, which has no locks.

Everybody puts an object of their own and then looks for others'; a store that lists what was put lets no two go on.
Whoever is at work puts theirs anew again and again, so that a dead process's is told by its never changing: no clock
is compared, and nothing is asked of the store but reading what was written.
"""

import os
import time
import uuid

from mechlens.errors import UserError
from mechlens.runs.remote.store import Store

LOCKS = ".lock/"
BEAT = 15.0
"""Seconds between two signs of life."""
STALE = 90.0
"""Seconds without one after which a process counts as dead."""


class StoreLock:
    """Holds a folder of a store until `release`; `beat` is to be called every BEAT seconds."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._name = f"{LOCKS}{uuid.uuid4().hex}"
        self._beats = 0
        self._put()
        try:
            self._outlast()
        except BaseException:
            self.release()
            raise

    def beat(self) -> bool:
        """Shows that this process is at work; False where it was taken for dead and another one has the folder."""
        if not self._store.has(self._name):
            return False
        self._put()
        return True

    def release(self) -> None:
        """Lets others in."""
        self._store.remove(self._name)

    def _put(self) -> None:
        self._beats += 1
        self._store.write(f"{here()}\n{os.getpid()}\n{self._beats}".encode(), self._name)

    def _outlast(self) -> None:
        """Until nobody else holds the folder; UserError for somebody who shows a sign of life."""
        first = {name: self._content(name) for name in self._others()}
        began = time.monotonic()
        while others := {name: self._content(name) for name in self._others()}:
            silent = time.monotonic() - began > STALE
            for name, content in others.items():
                if content and content != first.get(name):
                    raise UserError(
                        f"another mechlens process is writing to {self._store.url}; wait for it or choose another --out"
                    )
                if silent or _is_dead(content):
                    self._store.remove(name)
            time.sleep(BEAT / 10)
            self._put()

    def _others(self) -> list[str]:
        return [name for name in self._store.names() if name.startswith(LOCKS) and name != self._name]

    def _content(self, name: str) -> bytes:
        try:
            return self._store.read(name)
        except FileNotFoundError:
            return b""


def here() -> str:
    """What tells this machine, and what it calls its processes by, from any other; "" where the system doesn't say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_dead(content: bytes) -> bool:
    """Whether a lock is of a process of this machine that is no more."""
    place, _, rest = content.decode(errors="replace").partition("\n")
    pid = rest.partition("\n")[0]
    if not place or place != here() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
