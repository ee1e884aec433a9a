"""A batch whose rows run under interventions of their own, and what rows have in common run once."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from mechlens.errors import UserError, many
from mechlens.methods.activations.collect import refuse_too_long, tokenized
from mechlens.methods.activations.reading import FORMAT, halving, out_of_memory
from mechlens.methods.cache import Cache
from mechlens.methods.progress import batch_of, steps
from mechlens.methods.steering.fits import changes_nothing, require_fits, require_interventions
from mechlens.methods.steering.interventions import Intervention
from mechlens.methods.steering.placed import Placement
from mechlens.methods.steering.starts import SteeredRow, by_layer, gated_from, grouped, rows_with_starts
from mechlens.models.bridge import LanguageModel, checkpoint_now, device_of, dtype_of, has_hooks, n_layers
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.generate import start_cache
from mechlens.models.engine.intervene.changed import AddAlong, Change, bears_fast, changed
from mechlens.models.engine.intervene.token_mask import TokenMask
from mechlens.models.engine.shared_rows import SharedRows, shares_rows
from mechlens.models.sites import Place, level_place
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.templates.template import TemplateChoice


class Fingerprints:
    """sha256 of tensors, each worked out once however many rows it acts in."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, str]] = {}

    def of(self, tensor: Tensor) -> str:
        """Of the values and their shape; the tensor is kept, so that no other can take its place in memory."""
        if id(tensor) not in self._known:
            plain = tensor.detach().cpu().contiguous()
            digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
            self._known[id(tensor)] = (tensor, digest.hexdigest())
        return self._known[id(tensor)][1]


def piece_key(
    model: LanguageModel,
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    changes: Sequence[Sequence[Change]],
    work: Sequence[object],
    prints: Fingerprints,
) -> str:
    """Fingerprint of a batch: weights, type, what is made of it, every token id and everything done to it."""
    record = [
        FORMAT, "steered", *checkpoint.identity, str(dtype_of(model)), device_of(model).type,
        list(work), [row.ids for row in rows], [[_done(change, prints) for change in row] for row in changes],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _done(change: Change, prints: Fingerprints) -> list[Any]:
    what = change.what
    if isinstance(what, AddAlong):
        how: list[Any] = ["along", prints.of(what.unit), what.amount, what.erases]
    else:
        how = ["put", prints.of(what.values)]
    gate = change.gate and [change.gate.decider.key, change.gate.reads, change.gate.output]
    return [*how, change.sites, change.layers, change.tokens, change.generation, change.answer_tokens, gate]


Interventions = Sequence[Intervention] | Sequence[Sequence[Intervention]]
"""The same for every prompt, or a list of its own for each, applied in the list's order."""
Reduce = Callable[[Float[Tensor, "row vocab"], list[int]], Float[Tensor, "row out"]]


@runtime_checkable
class Keyed(Protocol):
    """A function that says what it does, so that what was made with it can be kept and found again."""

    @property
    def key(self) -> str:
        """Another text for anything that would give other values."""
        ...


def steered_batch(
    model: LanguageModel,
    prompts: Prompts | TokenBatch,
    interventions: Interventions,
    template: TemplateChoice,
    force: bool,
    new_tokens: int,
) -> "SteeredBatch":
    require_interventions(interventions)
    batch = tokenized(model, prompts, template)
    refuse_too_long(model, batch, new_tokens)
    lists = _per_row(interventions, len(batch.prompts))
    require_fits(model, [one for row in lists for one in row], batch.template, force=force)
    placement = Placement(n_layers(model), batch)
    changes = [placement.changes(i, [one for one in row if not changes_nothing(one)]) for i, row in enumerate(lists)]
    places = {(site, layer) for row in changes for change in row for site in change.sites for layer in change.layers}
    gates = [change.gate for row in changes for change in row if change.gate is not None]
    places |= {level_place(n_layers(model), level) for gate in gates for level, _ in gate.reads}
    fast = forward.fits_fast_path(model) and bears_fast(model, sorted(places))
    reason = "" if fast else _why_plain(model, sorted(places))
    forward.warn_plain(model, reason)
    return SteeredBatch(model, batch, lists, changes, new_tokens, fast, reason)


def _why_plain(model: LanguageModel, places: Sequence[Place]) -> str:
    """Why changes at these sites need whole passes; empty where each is the input or output of a plain module."""
    reason = forward.why_plain(model)
    if not reason and not bears_fast(model, places):
        sites = ", ".join(sorted({site for site, _ in places}))
        reason = f"what lies at {sites} isn't the input or output of one of its modules"
    return reason


def _per_row(interventions: Interventions, n: int) -> tuple[tuple[Intervention, ...], ...]:
    lists = [one for one in interventions if isinstance(one, Sequence)]
    if len(lists) < len(interventions):
        return (tuple(cast(Sequence[Intervention], interventions)),) * n
    if lists and len(lists) != n:
        raise UserError(
            f"{many(len(lists), 'list')} of interventions came for {many(n, 'prompt')}; give each prompt one"
        )
    return tuple(tuple(row) for row in lists) or ((),) * n


@dataclass(frozen=True)
class Engine:
    """What is done with a batch of rows, exactly and fast or by whole passes, and what is kept of it."""

    fast: Callable[[list[Row], DynamicCache | None, TokenMask, SharedRows], Tensor]
    plain: Callable[[list[Row], TokenMask], Tensor]
    keep: Callable[[Tensor, list[int]], Tensor]
    key: str | None
    """What all of this is, for the cache; None where a function doesn't say what it does."""
    of_rows: Sequence[str] = ()
    """What else decides each prompt's values, by its number."""


@dataclass(frozen=True)
class SteeredBatch:
    """Prompts and what is done to each of them."""

    model: LanguageModel
    batch: TokenBatch
    interventions: tuple[tuple[Intervention, ...], ...]
    changes: list[list[Change]]
    new_tokens: int
    fast: bool
    why_plain: str

    def run(self, work: Engine, max_tokens: int, cache: Cache | None) -> Tensor:
        """One row of values for each prompt, batch by batch; finished batches are kept on the cache."""
        ids = [tuple(self.batch.row(i)) for i in range(len(self.batch.prompts))]
        answer = self.batch.answer
        # Where answers are given, what is said first is read at the prompt's last token.
        read = [len(own) - 1 for own in ids] if answer is None else (answer[:, 0] - 1 - self.batch.offsets).tolist()
        read = [min(end, gated_from(changes, end)) for end, changes in zip(read, self.changes, strict=True)]
        common, rows = rows_with_starts(ids, self.changes, fast=self.fast, read=read)
        if work.key is None or has_hooks(self.model):
            cache = None  # what hooks change is in no fingerprint, so nothing made under them is kept or reused
        prints, checkpoint = Fingerprints(), checkpoint_now(self.model)
        values = torch.empty(0)
        # Every new token costs a pass of its own for each batch.
        cost = forward.BATCH_COST * max(1, self.new_tokens)
        bar = steps(len(rows), "steering", "answer", sum(map(self._work, rows)))
        for skip, group in grouped(rows, max_tokens):
            start = _Start(self, group, skip, common)
            for members in forward.plan(group, max_tokens, shared=skip, batch_cost=cost, equal_lengths=not self.fast):
                chunk = [group[i] for i in members]
                numbers = [row.number for row in chunk]
                key = "" if cache is None else self._piece_key(work, chunk, skip, prints, checkpoint)
                piece = None if cache is None else cache.get(key)
                if piece is None:
                    with batch_of(bar, len(members), self.new_tokens):
                        piece = {"values": work.keep(halving(self._runner(work, start), list(chunk)), numbers)}
                    if cache is not None:
                        cache.put(key, piece)
                else:
                    bar.found(len(members))
                if not len(values):
                    values = piece["values"].new_empty(len(rows), *piece["values"].shape[1:])
                values[numbers] = piece["values"]
        bar.close()
        return values

    def _work(self, row: SteeredRow) -> float:
        """Tokens that a row runs through all blocks by itself, about: below its first change others run with it."""
        blocks = n_layers(self.model)
        first = min((layer for change in self.changes[row.number] for layer in change.layers), default=0)
        return (len(row.ids) - row.skip) * (1 - first / blocks) + self.new_tokens

    def _piece_key(
        self, work: Engine, chunk: Sequence[SteeredRow], skip: int, prints: Fingerprints, checkpoint: Checkpoint
    ) -> str:
        how = [work.key, self.new_tokens, skip, "fast" if self.fast else "plain"]
        how += [work.of_rows[row.number] for row in chunk] if work.of_rows else []
        return piece_key(self.model, checkpoint, chunk, [self.changes[row.number] for row in chunk], how, prints)

    def _runner(self, work: Engine, start: "_Start") -> Callable[[list[Row]], Tensor]:
        def run(chunk: list[Row]) -> Tensor:
            own = cast(list[SteeredRow], chunk)
            prefix, places = start.made(own)
            shared_rows = self.shared_rows(own, [places[row.start] for row in own])
            with self.changing([row.number for row in own]) as token_mask:
                return work.fast(chunk, prefix, token_mask, shared_rows) if self.fast else work.plain(chunk, token_mask)

        return run

    @contextlib.contextmanager
    def changing(self, numbers: list[int]) -> Iterator[TokenMask]:
        """The model under the changes of some of the prompts, by number."""
        lengths = self.batch.lengths[numbers]
        token_mask = TokenMask(lengths, torch.zeros_like(lengths))
        with changed(self.model, [self.changes[i] for i in numbers], token_mask, fast=self.fast):
            yield token_mask

    def shared_rows(self, rows: Sequence[SteeredRow], places: Sequence[int], end: int | None = None) -> SharedRows:
        """Which rows are alike up to which block: the same tokens (up to `end`), and the same done to them so far."""
        blocks = n_layers(self.model)
        if not self.fast or not shares_rows(self.model):
            return SharedRows([range(len(rows))] * blocks, places)
        number: dict[Any, int] = {}
        now = [number.setdefault(row.ids[:end], len(number)) for row in rows]
        done = [by_layer(self.changes[row.number], blocks, end) for row in rows]
        for row, did in zip(rows, done, strict=True):
            for gate in (change.gate for change in self.changes[row.number] if change.gate and end is None):
                at = min(gate.level, blocks - 1)
                did[at] = (*did[at], row.number)  # every row is decided by itself
        classes = []
        for layer in range(blocks):
            number = {}
            now = [number.setdefault((old, did[layer]), len(number)) for old, did in zip(now, done, strict=True)]
            classes.append(now)
        return SharedRows(classes, places)


class _Start:
    """Keys and values of the shared starts, made when they are first asked for: all may lie on the cache."""

    def __init__(self, steered: SteeredBatch, group: Sequence[SteeredRow], skip: int, common: int) -> None:
        self.steered, self.group, self.skip, self.common = steered, group, skip, common
        self.kept: tuple[DynamicCache, dict[int, int]] | None = None
        self.fits = True

    def made(self, rows: Sequence[SteeredRow]) -> tuple[DynamicCache | None, dict[int, int]]:
        """The cache, a row for each start, and where each start's row is.

        Of the whole group, once; where memory doesn't hold that, of these rows, anew for each batch.
        """
        if not self.skip:
            return None, {0: 0}
        if self.kept is None and self.fits:
            try:
                self.kept = self._of(self.group)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self.fits = False
        return self.kept or self._of(rows)

    def _of(self, rows: Sequence[SteeredRow]) -> tuple[DynamicCache, dict[int, int]]:
        first = list({row.start: row for row in reversed(rows)}.values())
        prefix, places = None, [0] * len(first)
        if 0 < self.common < self.skip:  # what all rows begin with, under each of the things done to it
            begun = [replace(row, skip=self.common, start=row.common) for row in first]
            prefix, of_kind = _Start(self.steered, begun, self.common, 0).made(begun)
            places = [of_kind[row.start] for row in begun]
        shared_rows = self.steered.shared_rows(first, places, self.skip)
        with self.steered.changing([row.number for row in first]) as token_mask:
            ids = [row.ids[: self.skip] for row in first]
            cache = start_cache(self.steered.model, ids, prefix, token_mask, shared_rows)
        return cache, {row.start: i for i, row in enumerate(first)}
