"""A place for finished pieces of long work, so that a killed run goes on where it stopped."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Cache(Protocol):
    """Finished pieces by key; the key says everything that the piece depends on.

    Text is kept as uint8 tensors of UTF-8, which is the caller's business.
    """

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The piece that was put under `key`, or None where it has to be made (again)."""
        ...

    def put(self, key: str, value: dict[str, Tensor]) -> None:
        """Keep a finished piece."""
        ...
