"""A cache in memory, which can kill the run that fills it."""

from torch import Tensor


class Killed(Exception):
    """What a run sees of its end."""


class DictShelf:
    """A cache in memory; `room` pieces fit, then the run is killed."""

    def __init__(self, room: int = 1000) -> None:
        self.pieces: dict[str, dict[str, Tensor]] = {}
        self.room = room

    def get(self, key: str) -> dict[str, Tensor] | None:
        return self.pieces.get(key)

    def put(self, key: str, value: dict[str, Tensor]) -> None:
        if len(self.pieces) == self.room:
            raise Killed
        self.pieces[key] = value
