"""How far long work is, and where its time went: phases by name, and one bar over all of them.

A study names its phases where they begin, and loops over batches say how far they are. Who runs a study can ask for the
seconds of each phase (`timed`); a study that knows what is ahead can have one bar over everything (`one_bar`). Without
either, a loop has a bar of its own. Where nobody watches, in a log or a pipe, a bar is a plain line every half minute;
`mechlens.methods.heartbeat` adds lines of what has no steps.
"""

import math
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets has bars of characters
    from tqdm.auto import tqdm

T = TypeVar("T")
EVERY = 30.0
"""Seconds between two lines in a log, and the least that must be ahead for a first one."""


@dataclass
class Clock:
    """Seconds by phase; a phase inside another one counts as the outer one's."""

    seconds: dict[str, float] = field(default_factory=dict)
    inside: bool = False
    began: float = field(default_factory=time.perf_counter)
    now: tuple[tuple[str, float], ...] = ()
    """The phases that we are in, the outermost first, each as people read it and since when (`time.monotonic`)."""

    def by_phase(self) -> dict[str, float]:
        """The seconds so far, and as "other" those outside of all phases."""
        return {**self.seconds, "other": time.perf_counter() - self.began - sum(self.seconds.values())}


@runtime_checkable
class Steps(Protocol):
    """A loop's bar."""

    def update(self, n: int | float, /) -> object:
        """So many more are done."""

    def move(self, n: int | float, /) -> object:
        """So much more of the batch that is under way is done; how long the rest takes is told by whole ones."""

    def found(self, n: int, /) -> None:
        """So many more were done before, by a run that was killed: they say nothing of how long the rest takes."""

    def close(self) -> None:
        """All are done."""


class Pace:
    """How long the rest of a loop takes, told by whole batches.

    The first also waits for what is made once (kernels, caches), and within a batch what every row waits for comes
    first: told by these a loop seems several times as long. A first batch of half a minute tells enough.
    """

    def __init__(self, done: int | float) -> None:
        self._marks = [(float(done), time.monotonic())]

    def mark(self, done: int | float) -> None:
        """A batch has ended, with which so many are done."""
        if done > self._marks[-1][0]:
            self._marks = [*self._marks[:2], (done, time.monotonic())]

    def found(self, n: int | float) -> None:
        """So many more were done before."""
        self._marks = [(done + n, when) for done, when in self._marks]

    def left(self, total: int | float) -> float | None:
        """Seconds; None while nobody can tell, and once they are over and it still goes on."""
        first, last = self._marks[1 if len(self._marks) > 2 else 0], self._marks[-1]
        done, took = last[0] - first[0], last[1] - first[1]
        if done <= 0 or (len(self._marks) == 2 and took < EVERY):
            return None
        left = took * (total - last[0]) / done - (time.monotonic() - last[1])
        return left if left >= 1 else None


class Lines(Generic[T]):
    """A loop's bar where nobody watches: as soon as its pace is known it says how long it will take, and then every
    half minute. Loops that are over sooner say nothing.
    """

    def __init__(self, total: int | float, title: str, unit: str = "", done: int = 0, over: Iterable[T] = ()) -> None:
        self.total, self.n, self._title, self._unit, self._over = float(total), float(done), title, unit, over
        self.over = False
        self._pace, self._began, self._last = Pace(self.n), time.monotonic(), 0.0
        clock = _CLOCK.get()
        self._inside = () if clock is None else tuple(name for name, _ in clock.now)
        _LOOPS.append(weakref.ref(self))

    def __iter__(self) -> Iterator[T]:
        for one in self._over:
            yield one
            self.update(1)

    def __enter__(self) -> "Lines[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: int | float = 1, /) -> None:
        """So many more are done."""
        self._pace.mark(self.n + n)
        self.move(n)

    def move(self, n: int | float, /) -> None:
        """So much more of a batch is done."""
        self.n += n
        now = time.monotonic()
        due = now - self._last if self._last else max(now - self._began, self._pace.left(self.total) or 0.0)
        if due >= EVERY and self.n < self.total:
            self.say()

    def found(self, n: int | float, /) -> None:
        """So many more were done before."""
        self.n += n
        self._pace.found(n)

    def say(self) -> None:
        """The line of how far it is."""
        self._last = time.monotonic()
        units = f" {self._unit}s" if self._unit else ""
        far = f"{counted(self.n)} of {self.total:.0f}{units}" if units else f"{math.floor(100 * self.n / self.total)}%"
        rest = self._pace.left(self.total)
        left = "" if rest is None else f", about {spoken(rest)} to go"
        gone = spoken(self._last - self._began)
        say(f"{': '.join(dict.fromkeys((*self._inside, self._title)))}: {far}, {gone} gone{left}")

    def set_description_str(self, title: str) -> None:
        """Another title from now on."""
        self._title = title

    def refresh(self) -> None:
        """The next line says what is new."""

    def close(self) -> None:
        """All are done."""
        self.over = True


_LOOPS: list[weakref.ref[Lines[Any]]] = []
_SAID = [0.0]
"""When the last line was written."""


def loop_now() -> Lines[Any] | None:
    """The innermost loop that isn't at its end, where nobody watches."""
    _LOOPS[:] = [ref for ref in _LOOPS if (loop := ref()) is not None and not loop.over and loop.n < loop.total]
    return _LOOPS[-1]() if _LOOPS else None


def say(line: str) -> None:
    """Writes a line to stderr in tqdm's way, so that bars stay whole."""
    _SAID[0] = time.monotonic()
    tqdm.write(line, file=sys.stderr)


def counted(n: int | float) -> int:
    """How many are done of which the last may be under way; sums of shares are a hair off."""
    return math.floor(n + 1e-6)


def last_said() -> float:
    """When the last line was written, by `time.monotonic`."""
    return _SAID[0]


def spoken(seconds: float) -> str:
    """A time in words: seconds below ten minutes, minutes below two hours."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 10:
        return f"{minutes} min {rest} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class Bar(tqdm):  # type: ignore[misc]
    """tqdm's bar, which counts what is whole while a batch is under way, and tells the rest by its `Pace`.

    Where cells of characters can't be addressed, as in a notebook without ipywidgets, bars inside others take their
    line in turn: tqdm would move the cursor, which such a page prints as "[A".
    """

    def __init__(self, **what: Any) -> None:
        self._pace = Pace(what.get("initial", 0))
        here = {} if sys.stderr is not None and sys.stderr.isatty() else {"position": 0}
        super().__init__(**{"bar_format": COUNTED, "delay": DELAY, "leave": False} | here | what)

    @property
    def format_dict(self) -> Any:
        told = super().format_dict
        left = self._pace.left(told["total"] or 0)
        said = "" if left is None else tqdm.format_interval(left)
        rest = said and f", about {said} to go"
        return told | {"whole": counted(told["n"]), "left": said and f"<{said}", "rest": rest}

    def update(self, n: int | float | None = 1) -> Any:
        """So many more are done."""
        self._pace.mark(self.n + (n or 0))
        return super().update(n)

    def move(self, n: int | float, /) -> None:
        """So much more of a batch is done."""
        super().update(n)

    def found(self, n: int | float, /) -> None:
        """So many more were done before."""
        self._pace.found(n)
        if not self.disable:  # as TQDM_DISABLE has it, which leaves a bar without these
            self.initial += n
            self.last_print_n += n
            self.n += n


DELAY = 2
"""Seconds before a bar is shown: what is over sooner needs none."""
COUNTED = "{l_bar}{bar}| {whole}/{total:.0f} [{elapsed}{left}, {rate_fmt}]"


def watched() -> bool:
    """Whether somebody may look at a bar: at a terminal or in a notebook."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


def progress_bar(over: Iterable[T] = (), *, title: str, unit: str = "", total: int | None = None, done: int = 0) -> Any:
    """A bar over the items, or one of `total` steps that is told of each: tqdm's, or lines where nobody watches."""
    items = list(over)
    in_all = len(items) if total is None else total
    if not watched():
        return Lines(in_all, title, unit, done, items)
    what: dict[str, Any] = {"iterable": items} if total is None else {}
    return Bar(**what, total=in_all, desc=title, unit=unit or "it", initial=done)


_CLOCK: ContextVar[Clock | None] = ContextVar("clock", default=None)
_WHOLE: ContextVar["WholeBar | None"] = ContextVar("whole", default=None)


@contextmanager
def timed() -> Iterator[Clock]:
    """A clock that runs through the phases of what is done inside."""
    clock = Clock()
    token = _CLOCK.set(clock)
    try:
        yield clock
    finally:
        _CLOCK.reset(token)


@contextmanager
def phase(name: str, of: str = "", *, apart: bool = False) -> Iterator[None]:
    """What is done inside is this phase's, `of` something for those who watch; the outermost name counts.

    Phases inside one that stands `apart` count for themselves.
    """
    clock, whole = _CLOCK.get(), _WHOLE.get()
    outermost = clock is not None and not clock.inside
    began, before = time.perf_counter(), 0.0 if clock is None else sum(clock.seconds.values())
    outer = () if clock is None else clock.now
    if clock is not None:
        clock.inside = clock.inside or not apart
        clock.now = (*outer, (f"{name} {of}".strip(), time.monotonic()))
    if whole is not None:
        whole.begin(name)
    try:
        yield
        if whole is not None:
            whole.end(name)
    finally:
        if clock is not None:
            clock.now = outer
        if clock is not None and outermost:
            inner = sum(clock.seconds.values()) - before
            clock.seconds[name] = clock.seconds.get(name, 0.0) + time.perf_counter() - began - inner
            clock.inside = False


class WholeBar:
    """One bar over phases whose costs are guessed before they begin; when one ends, its guess counts as done."""

    def __init__(self, title: str, costs: Mapping[str, float]) -> None:
        self._title, self._ahead, self._within, self._done = title, dict(costs), 0.0, 0.0
        self._now: str | None = None
        self._bar: Any = Lines[None](sum(costs.values()), title) if not watched() else Bar(
            total=sum(costs.values()), smoothing=0.1, dynamic_ncols=True, desc=title, leave=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} gone{rest}",
        )  # fmt: skip

    def expect(self, costs: Mapping[str, float]) -> None:
        """Other guesses for what is still ahead; a phase that isn't named won't be."""
        self._ahead = {name: cost for name, cost in costs.items() if name in self._ahead}
        self._bar.total = self._done + sum(self._ahead.values())
        self._bar.refresh()

    def begin(self, name: str) -> None:
        """A phase begins; one inside another is the outer one's."""
        if self._now is None and name in self._ahead:
            self._now, self._within = name, 0.0
            self._bar.set_description_str(f"{self._title}: {name}")

    def advance(self, cost: int | float, *, batch: bool) -> None:
        """So much of the phase is done, with a whole batch or within one; more than was guessed waits for its end."""
        if self._now is not None:
            self._within = min(self._within + cost, self._ahead[self._now])
            self._show(batch=batch)

    def found(self, cost: int | float) -> None:
        """So much of the phase was done before."""
        if self._now is not None:
            before = self._within
            self._within = min(self._within + cost, self._ahead[self._now])
            self._bar.found(self._within - before)

    def end(self, name: str) -> None:
        """The phase is done, whatever it cost; what its loops left undone says nothing of how long the rest takes."""
        if self._now == name:
            guess = self._ahead.pop(name)
            did = self._within or guess
            undone = guess - did
            self._done, self._within, self._now = self._done + did, 0.0, None
            self._show(batch=True)
            self._done += undone
            self._bar.found(undone)

    def close(self, *, finished: bool) -> None:
        """Takes the bar away, full where everything is done."""
        if finished:
            self._done, self._within = float(self._bar.total), 0.0
            self._show(batch=True)
        self._bar.close()

    def _show(self, *, batch: bool) -> None:
        step = self._bar.update if batch else self._bar.move
        step(self._done + self._within - self._bar.n)


@contextmanager
def one_bar(title: str, costs: Mapping[str, float]) -> Iterator[WholeBar]:
    """A bar over all phases inside, by what each is guessed to cost; loops inside them have none of their own."""
    whole = WholeBar(title, costs)
    token = _WHOLE.set(whole)
    finished = False
    try:
        yield whole
        finished = True
    finally:
        _WHOLE.reset(token)
        whole.close(finished=finished)


@dataclass(frozen=True)
class _Part:
    """A loop inside a phase of a whole bar."""

    whole: WholeBar
    cost: float
    """Of one step."""

    def update(self, n: int | float, /) -> None:
        self.whole.advance(n * self.cost, batch=True)

    def move(self, n: int | float, /) -> None:
        self.whole.advance(n * self.cost, batch=False)

    def found(self, n: int, /) -> None:
        self.whole.found(n * self.cost)

    def close(self) -> None:
        """The phase goes on."""


def steps(total: int, title: str, unit: str, cost: int | float) -> Steps:
    """The bar of a loop of so many steps, which cost so much together: its own, or its part of the whole one."""
    whole = _WHOLE.get()
    if whole is not None:
        return _Part(whole, cost / max(total, 1))
    own: Steps = progress_bar(title=title, unit=unit, total=total)
    return own


class Batch:
    """A batch of a loop, which moves the loop's bar with every token that is written in it."""

    def __init__(self, bar: Steps, rows: int, tokens: int) -> None:
        self._bar, self._rows, self._share, self._done = bar, rows, 1 / max(tokens, 1), 0.0

    def token(self) -> None:
        """One row has one more token."""
        if self._done + self._share <= self._rows:  # a batch that didn't fit into memory is written anew, in halves
            self._done += self._share
            self._bar.move(self._share)

    def close(self) -> None:
        """All its rows are done, however short."""
        self._bar.update(self._rows - self._done)


_BATCH: ContextVar[Batch | None] = ContextVar("batch", default=None)


@contextmanager
def batch_of(bar: Steps, rows: int, tokens: int) -> Iterator[None]:
    """What is written inside are so many rows of at most so many tokens; `told` tells of each."""
    batch = Batch(bar, rows, tokens)
    token = _BATCH.set(batch)
    try:
        yield
        batch.close()
    finally:
        _BATCH.reset(token)


def told(decided: Callable[[list[int]], bool] | None) -> Callable[[list[int]], bool]:
    """The same, or what never decides; it moves the bar, as it is asked of every answer after each token."""
    batch = _BATCH.get()

    def moved(answer: list[int]) -> bool:
        if batch is not None:
            batch.token()
        return decided is not None and decided(answer)

    return moved
