"""What a run folder keeps under names, each read when it is asked for and held to the record's sha256."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mechlens.errors import UserError
from mechlens.files import file_sha256
from mechlens.registry import unknown_name

if TYPE_CHECKING:
    import plotly.graph_objects

Kind = TypeVar("Kind")
REMEDY = "make the run again"


class NotKept(UserError, KeyError):
    """A name under which a run keeps nothing; the nearest one stands in the sentence."""

    __str__ = Exception.__str__  # a KeyError shows its sentence in quotes


@dataclass(frozen=True, eq=False)
class Kept(Mapping[str, Kind], Generic[Kind]):
    """Names of one kind and how each is read: a mapping that costs nothing until something is taken from it."""

    kind: str
    """Such as "table"."""
    names: tuple[str, ...]
    read: Callable[[str], Kind]

    def __getitem__(self, name: str) -> Kind:
        if name not in self.names:
            if not self.names:
                raise NotKept(f"the run keeps no {self.kind}, so there is no {name!r}")
            raise NotKept(str(unknown_name(self.kind, str(name), self.names)))
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"{len(self)} {self.kind}{'' if len(self) == 1 else 's'}: {', '.join(self.names) or 'none'}"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.names)


def read_figure(path: Path, sha256: str | None) -> "plotly.graph_objects.Figure":
    """A figure of a run folder; UserError where it is no longer what the run wrote."""
    from mechlens.runs.report.shown import ShownFigure

    require_same(path, sha256)
    try:
        return ShownFigure.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a figure of plotly; {REMEDY}") from error


def require_same(path: Path, sha256: str | None) -> None:
    """UserError unless the file is there and is what the record says; None where the record doesn't know it."""
    if not path.is_file():
        raise UserError(f"there is no {path}, which the run wrote; {REMEDY}")
    try:
        same = sha256 is None or file_sha256(path) == sha256
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); check its permissions") from error
    if not same:
        raise UserError(f"{path} is not what the run wrote; {REMEDY}")


def names_in(folder: Path, recorded: Mapping[str, Any], ending: str) -> tuple[str, ...]:
    """The names that the record knows; in a folder of an earlier version, those of the files there are."""
    return tuple(recorded) or tuple(sorted(path.stem for path in folder.glob(f"*{ending}")))
