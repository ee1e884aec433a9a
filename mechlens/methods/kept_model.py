"""One model kept between the studies of one process, where several in a row ask for the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mechlens.models.bridge import LanguageModel, checkpoint_now
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.load import load


@dataclass
class _Shelf:
    """What is kept: by what was asked for, the model and what it was."""

    depth: int = 0
    """How many `keeping_model` are open."""
    kept: tuple[Any, LanguageModel, Checkpoint] | None = None


_SHELF = _Shelf()


@contextmanager
def keeping_model() -> Iterator[None]:
    """Inside, the model that was loaded last is given again to who asks for the same one."""
    _SHELF.depth += 1
    try:
        yield
    finally:
        _SHELF.depth -= 1
        if not _SHELF.depth:
            _SHELF.kept = None


def kept_or_loaded(model: str, **how: Any) -> LanguageModel:
    """As `mechlens.load`; a kept model whose weights are no longer what was loaded is loaded anew."""
    key = (model, tuple(sorted(how.items())))
    if _SHELF.kept is not None:
        known, kept, was = _SHELF.kept
        if known == key and checkpoint_now(kept) == was:
            return kept
        del kept
    _SHELF.kept = None  # before the next is loaded: there may be room for one only
    found = load(model, **how)
    if _SHELF.depth:
        _SHELF.kept = key, found, checkpoint_now(found)
    return found
