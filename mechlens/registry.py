"""Named choices that anyone can add to: ours, and those of other packages by an entry point group.

A choice is looked up by name and imported then, so that listing the names imports nothing heavy.
"""

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from numbers import Integral
from typing import Any, Generic, TypeVar

from mechlens.errors import UserError, an, kind_of, quoted

T = TypeVar("T")
Lazy = str | Callable[..., Any]
"""A function, or "module:name" of one that is imported when it is needed."""


@dataclass(frozen=True)
class Choice:
    """One of ours."""

    place: str
    """Where it is, as "module:name"."""
    about: str
    """What it does, in a few words, for `--help`."""


@dataclass(frozen=True, eq=False)
class Registry(Generic[T]):
    """Everything of one kind that can be chosen by name."""

    kind: str
    """Such as "judge"."""
    group: str
    """The entry point group by which other packages add to it, such as "mechlens.judges"."""
    ours: dict[str, Choice]

    def names(self) -> tuple[str, ...]:
        """Every name, ours first."""
        return (*self.ours, *_added(self.group, tuple(self.ours)))

    def __getitem__(self, name: str) -> T:
        """What the name stands for; UserError, with the nearest name, where it stands for nothing."""
        if name in self.ours:
            found: T = loaded(self.ours[name].place)
            return found
        added = _added(self.group, tuple(self.ours))
        if name not in added:
            raise unknown_name(self.kind, name, self.names())
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what a module prints at import is no result of ours
                found = added[name].load()
        except (Exception, SystemExit) as error:  # another package's code may fail in any way
            said = " ".join(str(error).split())[:200]
            raise UserError(f"the {self.kind} {name!r} ({added[name].value}) can't be imported: {said}") from error
        return found

    def require(self, name: str) -> str:
        """The name; UserError, before anything slow, where it stands for nothing."""
        if name not in self.names():
            raise unknown_name(self.kind, name, self.names())
        return name

    def added(self) -> dict[str, str]:
        """What other packages add: the module that each name comes from."""
        found = _added(self.group, tuple(self.ours))
        return {name: entry.value.partition(":")[0] for name, entry in found.items()}

    def help(self) -> str:
        """Every name with what it does, for `--help`."""
        told = {name: choice.about for name, choice in self.ours.items()}
        told |= {name: f"from {module}" for name, module in self.added().items()}
        return "; ".join(f"{name}: {about}" for name, about in told.items())


@cache
def _added(group: str, ours: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Other packages' entries by name, sorted; nobody takes the place of one of ours."""
    found = {entry.name: entry for entry in entry_points(group=group) if entry.name not in ours}
    return dict(sorted(found.items()))


def loaded(place: Lazy) -> Any:
    """What stands at "module:name"; a function that was given itself stays what it is."""
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def required(registry: Registry[Any], name: str) -> Callable[..., Any]:
    """The function of that name; UserError where another package's entry is none."""
    found: Callable[..., Any] = registry[name]
    if not callable(found):
        raise UserError(f"the {registry.kind} {name!r} is {kind_of(found)}, not a function")
    return found


def unknown_name(kind: str, given: str, known: Sequence[str]) -> UserError:
    """The error for a name that nothing goes by: the nearest that something does, and all of them."""
    near = nearest(given, known)
    return UserError(f"there is no {kind} {given!r}{f' ({near})' if near else ''}; choose from {', '.join(known)}")


def whole_numbers(name: str, given: object, kind: str) -> tuple[int, ...]:
    """What was given as `name`, numbers of a `kind` such as level, one alone as such; UserError for anything else."""
    found = []
    for one in given if isinstance(given, Iterable) and not isinstance(given, str) else [given]:
        if isinstance(one, bool) or not isinstance(one, Integral):
            raise UserError(f"{name} has {quoted(one)} ({kind_of(one)}); {an(kind)} is a whole number, such as 10")
        found.append(int(one))
    return tuple(found)


def require_numbers(kind: str, numbers: Sequence[int], last: int | None, owner: str) -> None:
    """UserError for numbers, such as layers, that aren't the `owner`'s 0 to `last`; None: nobody knows the last."""
    wrong = [number for number in numbers if number < 0 or (last is not None and number > last)]
    if wrong:
        known = "" if last is None else f"; {owner} has {kind}s 0 to {last}"
        raise UserError(f"there is no {kind} {', '.join(map(str, wrong))}{known}")


def nearest(given: str, known: Sequence[str]) -> str:
    """A question after the known name that was perhaps meant, in any capitals; "" where none is near."""
    close = difflib.get_close_matches(str(given).strip().lower(), known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""
