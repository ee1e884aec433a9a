"""What rows of a steered batch have in common at their starts, so that it is run once.

All rows begin alike (a chat template's system block), and under each thing that is done to it that is run once. A
prompt that comes with several ends, such as a request with several questions about it, has a longer start of its own.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.intervene.changed import AddAlong, Change
from mechlens.models.engine.packed.packing import alike

Done = Sequence[Sequence[Change]]
"""What is done to each row."""


@dataclass(frozen=True)
class SteeredRow(Row):
    """A row with its number in the batch, and what it shares with others."""

    number: int
    skip: int
    """Tokens at its start that are run once for all rows that are alike there."""
    start: int
    """Number of that start: the same tokens, and the same done to them."""
    common: int
    """The same of what all rows begin with: the number of what is done to it."""


def rows_with_starts(
    ids: Sequence[tuple[int, ...]], done: Done, *, fast: bool, read: Sequence[int] | None = None
) -> tuple[int, list[SteeredRow]]:
    """How many tokens all rows begin with, and the rows, with what they share.

    `read` is the first token of each row at which something is read, or done by a gate's leave, which no start may
    hold; by default the last.
    """
    ends = [len(own) - 1 for own in ids] if read is None else read
    plain = [
        Row(own, (min([end, *(_first(change, len(own)) for change in changes)]),))
        for own, end, changes in zip(ids, ends, done, strict=True)
    ]
    common = forward.shared_prefix(plain) if fast else 0
    skips = _own_starts(plain, done, common) if fast else [0] * len(ids)
    starts, below = _kinds(ids, skips, done), _kinds(ids, [common] * len(ids), done)
    if len(set(starts)) == len(ids):  # nothing to share
        common, skips, starts = 0, [0] * len(ids), [0] * len(ids)
    return common, [
        SteeredRow(row.ids, row.read, i, *shared)
        for i, (row, *shared) in enumerate(zip(plain, skips, starts, below, strict=True))
    ]


def _kinds(ids: Sequence[tuple[int, ...]], ends: Sequence[int], done: Done) -> list[int]:
    """Numbers the starts up to these ends: the same tokens with the same done to them are one."""
    kinds: dict[Any, int] = {}
    return [
        kinds.setdefault((own[:end], _keys(changes, end)), len(kinds))
        for own, end, changes in zip(ids, ends, done, strict=True)
    ]


def _keys(changes: Sequence[Change], end: int) -> tuple[Any, ...]:
    return tuple(key for change in changes if (key := _key(change, end)) is not None)


WORTH_SHARING = 0.15
"""Share of all tokens that starts of their own must save, for the passes that they take."""


def _own_starts(rows: Sequence[Row], done: Done, common: int) -> list[int]:
    """Tokens at each row's start that other rows have too, beyond the `common` ones: a prompt with several ends.

    A start of its own ends before anything that only some of its rows have done to them.
    """
    ends: dict[tuple[int, ...], int] = {}
    for row, changes in zip(rows, done, strict=True):
        length = len(row.ids)
        ends[row.ids] = min([ends.get(row.ids, length), row.read[0], *(_last(change, length) for change in changes)])
    ordered = sorted(ends)
    shared = dict.fromkeys(ordered, common)
    for one, other in itertools.pairwise(ordered):
        same = min(alike(one, other), ends[one], ends[other])
        for ids in (one, other):
            if 3 * (same - common) >= len(ids) - common:  # a third of it at least, and so no chance beginning
                shared[ids] = max(shared[ids], same)
    found = [shared[row.ids] for row in rows]
    kinds = {
        (row.ids[:skip], _keys(changes, skip)): skip - common
        for row, skip, changes in zip(rows, found, done, strict=True)
    }
    saved = sum(found) - common * len(found) - sum(kinds.values())
    worth = saved >= WORTH_SHARING * sum(len(row.ids) - common for row in rows)
    return found if worth else [common] * len(rows)


def _first(change: Change, length: int) -> int:
    """The first token that a change touches, beyond which rows differ; one that acts from token 0 can be shared."""
    return min(change.tokens) if change.tokens and min(change.tokens) > 0 else length


def _last(change: Change, length: int) -> int:
    """Where a change that acts from the first token on stops acting in the prompt."""
    return max(change.tokens) + 1 if change.tokens and min(change.tokens) == 0 else length


def gated_from(changes: Sequence[Change], end: int) -> int:
    """The first token of a prompt that a gate reads or lets be changed; `end` where there is no gate."""
    found = [end]
    for change in changes:
        if change.gate is not None:
            found += [token for _, token in change.gate.reads] + list((0,) if change.tokens is None else change.tokens)
    return min(found)


def _key(change: Change, end: int | None) -> Any:
    """What a change does to the first `end` tokens of the prompt, and where; None for nothing."""
    how = _how(change, end)
    return None if how is None else (how, change.layers)


def _how(change: Change, end: int | None) -> Any:
    """The same but for the layers."""
    within = change.tokens
    if end is not None:
        within = tuple(range(end)) if within is None else tuple(t for t in within if t < end)
    if within == ():
        return None
    what = change.what
    how = (id(what.unit), what.amount, what.erases) if isinstance(what, AddAlong) else id(what.values)
    return how, change.sites, within


def by_layer(changes: Sequence[Change], n_layers: int, end: int | None) -> list[tuple[Any, ...]]:
    """What is done to a row's prompt at each layer."""
    found: list[tuple[Any, ...]] = [()] * n_layers
    for change in changes:
        how = _how(change, end)
        for layer in () if how is None else change.layers:
            found[layer] = (*found[layer], how)
    return found


def grouped(rows: Sequence[SteeredRow], max_tokens: int) -> Iterator[tuple[int, list[SteeredRow]]]:
    """Rows by the length of their starts, with at most `max_tokens` tokens of starts at a time."""
    # Rows with the same tokens side by side, so that they come into one batch.
    ordered = sorted(rows, key=lambda row: (row.skip, len(row.ids), row.ids))
    for skip, members in itertools.groupby(ordered, key=lambda row: row.skip):
        group = list(members)
        numbers = {start: i for i, start in enumerate(dict.fromkeys(row.start for row in group))}
        kinds = max(1, max_tokens // max(1, skip))
        for low in range(0, len(numbers), kinds):
            yield skip, [row for row in group if low <= numbers[row.start] < low + kinds]
