"""Signs of life: which phase has begun and how long it has been going on, whatever is done in it.

A thread looks at the clock's phases. In a log it writes a line when one that lasts has begun, and one every half minute
in which no loop wrote any; at a terminal it shows the same in place, where there is no bar.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from mechlens.methods.progress import EVERY, Clock, last_said, loop_now, say, spoken, watched

LASTS = 5.0
"""Seconds after which a phase is announced: shorter ones, and short runs, say nothing."""


class Heartbeat:
    """What is said of a clock's phases, beat by beat."""

    def __init__(self, clock: Clock, title: str) -> None:
        self._clock, self._title = clock, title
        self._began = self._outside = time.monotonic()
        self._told: set[str] = set()
        self._bar: Any = None

    def log(self) -> None:
        """A line, where one is due."""
        now = time.monotonic()
        name, since = self._doing(now)
        if now - since >= LASTS and name not in self._told:
            self._told.add(name)
            say(f"{name} ...")
        elif now - max(last_said(), self._began) >= EVERY:
            self._told.add(name)
            loop = loop_now()
            if loop is None:
                say(f"{name}, {spoken(now - since)} gone")
            else:
                loop.say()

    def show(self) -> None:
        """The same in one place of a terminal, while no loop has a bar."""
        now = time.monotonic()
        name, since = self._doing(now)
        others = [bar for bar in list(getattr(tqdm, "_instances", ())) if bar is not self._bar]
        if others or now - since < LASTS:
            self.close()
            return
        self._bar = self._bar or tqdm(total=0, bar_format="{desc}", leave=False)
        self._bar.set_description_str(f"{name}, {spoken(now - since)} gone")

    def close(self) -> None:
        """Takes away what is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _doing(self, now: float) -> tuple[str, float]:
        """The phases that have lasted, and since when the innermost of them; outside of all the title."""
        if self._clock.now:
            self._outside = now
        lasting = [(name, since) for name, since in self._clock.now if now - since >= LASTS] or self._clock.now[:1]
        if not lasting:
            return self._title, self._outside
        return ": ".join(dict.fromkeys(name for name, _ in lasting)), lasting[-1][1]


@contextlib.contextmanager
def heartbeat(clock: Clock, title: str) -> Iterator[None]:
    """Says what is being done inside; nothing in a notebook, which shows its bars."""
    beats = Heartbeat(clock, title)
    if not watched():
        beat = beats.log
    elif sys.stderr.isatty():
        beat = beats.show
    else:
        yield
        return
    over = threading.Event()

    def go_on() -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody hears it: the work goes on
            while not over.wait(1.0):
                beat()

    thread = threading.Thread(target=go_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2.0)
        beats.close()
