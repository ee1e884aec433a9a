"""Reading many prompts batch by batch: what is read, on which path, and what is kept of it."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from mechlens.errors import UserError
from mechlens.methods.activations.spans import Span
from mechlens.methods.activations.streamed import (
    STREAMED_BATCH,
    StreamedTensor,
    packed,
    require_memory,
    too_many,
    unpacked,
)
from mechlens.methods.cache import Cache
from mechlens.methods.progress import steps
from mechlens.models.bridge import LanguageModel, d_model, device_of, dtype_of
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.site_reader import reference_site_batch, site_batch
from mechlens.models.sites import RESIDUAL, SITES
from mechlens.prompts.batch import TokenBatch

_Part = TypeVar("_Part")
FORMAT = 2
"""Raised when a change of code changes the numbers, so that older pieces on a cache are not used again."""


@dataclass(frozen=True)
class Reading:
    """What is read of every prompt."""

    site: str
    levels: tuple[int, ...]
    columns: tuple[Span, ...]
    """A column is the mean over its span; of one token, that token's value."""
    lines: Float[Tensor, "direction d"] | None
    """Unit vectors: where there are some, only how far values lie along them is kept."""

    @property
    def lengths(self) -> Int[Tensor, "prompt column"]:
        """Tokens of every column in every prompt."""
        return torch.stack([column.length for column in self.columns], dim=1)

    @property
    def axes(self) -> tuple[str, ...]:
        """What a value is made of."""
        if self.lines is not None:
            return ("direction",)
        return ("d_model",) if self.site == RESIDUAL else SITES[self.site].axes

    def width(self, model: LanguageModel) -> int:
        """How many numbers a value has before it is projected; of heads about as many as d_model."""
        neurons = self.site != RESIDUAL and SITES[self.site].axes == ("neuron",)
        return int(model.cfg.d_mlp or d_model(model)) if neurons else d_model(model)

    def rows(self, batch: TokenBatch) -> list[Row]:
        """The prompts, without padding, with the places that their columns read, one after the other."""
        ids = [batch.row(i) for i in range(len(batch.prompts))]
        starts = torch.stack([column.start for column in self.columns], dim=1).tolist()
        found = []
        for own, start, length in zip(ids, starts, self.lengths.tolist(), strict=True):
            read = [place for at, n in zip(start, length, strict=True) for place in range(at, at + n)]
            found.append(Row(tuple(own), tuple(read or [len(own) - 1])))
        return found

    def kept(
        self, read: Float[Tensor, "row level read *axes"], lengths: Int[Tensor, "row column"]
    ) -> Float[Tensor, "row level column *kept"]:
        """Columns of what was read, NaN where a prompt has none."""
        values = read if bool((lengths == 1).all()) else _means(read, lengths)
        if self.lines is None:
            return values
        if values.shape[-1] != self.lines.shape[1] or values.ndim > 4:
            raise UserError(
                f"the directions to project on have {self.lines.shape[1]} numbers and the values at {self.site} "
                f"{' x '.join(map(str, values.shape[3:]))}; give directions made there"
            )
        return values @ self.lines.T


def _means(
    read: Float[Tensor, "row level read *axes"], lengths: Int[Tensor, "row column"]
) -> Float[Tensor, "row level column *axes"]:
    values = read.new_full((*read.shape[:2], lengths.shape[1], *read.shape[3:]), torch.nan)
    for row, own in enumerate(lengths.tolist()):
        at = 0
        for column, n in enumerate(own):
            if n:
                span = read[row, :, at : at + n]
                values[row, :, column] = span[:, 0] if n == 1 else span.double().mean(dim=1).to(span.dtype)
            at += n
    return values


@dataclass(frozen=True)
class BatchReader:
    """One model and one path to read on."""

    model: LanguageModel
    checkpoint: Checkpoint
    reading: Reading
    fast: bool
    cache: Cache | None
    max_tokens: int

    def read(self, rows: list[Row]) -> tuple[Float[Tensor, "prompt level column *axes"], Bool[Tensor, "prompt level"]]:
        """The values, and which of them are finite.

        In one piece of memory that is filled batch by batch; where they are many and there is a cache, left on it.
        """
        reading, lengths = self.reading, self.reading.lengths
        skip = 0
        if self.fast:
            skip = forward.own_start(self.model, rows) if reading.site == RESIDUAL else forward.shared_prefix(rows)
        prefix = None
        values = torch.empty(0)
        pieces: list[Tensor] = []
        keys: list[str] = []
        finite = torch.ones(len(rows), len(reading.levels), dtype=torch.bool)
        streams = self._streams(len(rows))
        batches = self._batches(rows, skip, streams)
        bar = steps(len(rows), "collecting", "prompt", sum(len(row.ids) - skip for row in rows))
        for members in batches:
            chunk = [rows[i] for i in members]
            key = self._key(chunk, lengths[members], skip) if self.cache is not None else ""
            found = self._kept(key)
            if found is None:
                if self.fast and skip and prefix is None:
                    prefix = shared_start(self.model, rows[0].ids[:skip])
                found = reading.kept(halving(self._run(prefix), chunk), lengths[members])
                if self.cache is not None:
                    self.cache.put(key, packed(found))
                if streams and (kept := self._kept(key)) is not None:
                    found = kept  # from disk, where it takes no memory
                bar.update(len(members))
            else:
                bar.found(len(members))
            finite[members] = self._finite(found, lengths[members])
            if streams:
                pieces.append(found)
                keys.append(key)
                continue
            if not len(values):
                values = self._room(rows, found)
            values[members, ..., : found.shape[-1]] = found.float()
        bar.close()
        if streams:
            values = StreamedTensor(pieces, torch.tensor([i for members in batches for i in members]).argsort(), keys)
        return values, finite

    def _streams(self, prompts: int) -> bool:
        reading = self.reading
        width = reading.width(self.model) if reading.lines is None else len(reading.lines)
        return self.cache is not None and too_many(prompts * len(reading.levels) * len(reading.columns) * width)

    def _batches(self, rows: list[Row], skip: int, streams: bool) -> list[list[int]]:
        if self.reading.site == RESIDUAL:
            batches = forward.plan_reading(self.model, rows, self.max_tokens, shared=skip, fast=self.fast)
        else:
            batches = forward.plan(rows, self.max_tokens, shared=skip, equal_lengths=not self.fast)
        if not streams:
            return batches
        most_read = len(self.reading.levels) * max(len(row.read) for row in rows) * self.reading.width(self.model)
        size = max(1, STREAMED_BATCH // (4 * most_read))
        return [members[at : at + size] for members in batches for at in range(0, len(members), size)]

    def _kept(self, key: str) -> Tensor | None:
        """What the cache has of a batch, in the type in which it is there."""
        piece = self.cache.get(key) if self.cache is not None else None
        return None if piece is None else unpacked(piece)

    def _finite(self, found: Tensor, lengths: Int[Tensor, "row column"]) -> Bool[Tensor, "row level"]:
        # A pattern has no number where a prompt has no such token, and always one for its first.
        numbers = found[..., :1] if self.reading.site == "pattern" else found
        # The largest size is NaN where any number is: quicker than asking each.
        fine = torch.isfinite(numbers.flatten(3).abs().amax(dim=-1))
        return (fine | ~(lengths > 0).unsqueeze(1)).all(dim=-1)

    def _room(self, rows: list[Row], found: Tensor) -> Tensor:
        wide = max(len(row.ids) for row in rows) if self.reading.site == "pattern" else found.shape[-1]
        shape = (len(rows), *found.shape[1:-1], wide)
        require_memory(math.prod(shape))
        return torch.full(shape, torch.nan)

    def _run(self, prefix: Any) -> Callable[[list[Row]], Tensor]:
        site, levels = self.reading.site, self.reading.levels
        if site == RESIDUAL:
            if self.fast:
                return lambda chunk: forward.fast_batch(self.model, chunk, levels, prefix)
            return lambda chunk: forward.reference_batch(self.model, chunk, levels)
        if self.fast:
            return lambda chunk: site_batch(self.model, chunk, site, levels, prefix)
        return lambda chunk: reference_site_batch(self.model, chunk, site, levels)

    def _key(self, rows: list[Row], lengths: Int[Tensor, "row column"], skip: int) -> str:
        """Fingerprint of a batch: weights, type, what is read and every token id (so template and prompts too)."""
        reading = self.reading
        record: list[Any] = [
            FORMAT, *self.checkpoint.identity, str(dtype_of(self.model)), device_of(self.model).type,
            "fast" if self.fast else "plain", skip, reading.levels, [(row.ids, row.read) for row in rows],
        ]  # fmt: skip
        if reading.site != RESIDUAL or reading.lines is not None or not bool((lengths == 1).all()):
            lines = "" if reading.lines is None else hashlib.sha256(reading.lines.numpy().tobytes()).hexdigest()
            record += [reading.site, lengths.tolist(), lines]
        return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def halving(run: Callable[[list[Any]], Tensor], rows: list[Any], length: int | None = None) -> Tensor:
    """Run a batch; where memory runs out, run its halves. One prompt that doesn't fit is a UserError.

    `length` is that of the prompt where the rows are not `Row`s.
    """
    parts = in_halves(run, rows, length)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_halves(run: Callable[[list[Any]], _Part], rows: list[Any], length: int | None = None) -> list[_Part]:
    """The same for what can't be joined: the results of as few parts of the rows as memory allows, in order."""
    try:
        return [run(rows)]
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if len(rows) == 1:
            raise _too_long(len(rows[0].ids) if length is None else length) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(rows) // 2
    return in_halves(run, rows[:half], length) + in_halves(run, rows[half:], length)


def shared_start(model: LanguageModel, ids: Sequence[int]) -> DynamicCache | None:
    """Keys and values of the start that all prompts share; UserError where memory doesn't hold them."""
    try:
        return forward.prefix_cache(model, ids)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise _too_long(len(ids)) from error


def _too_long(tokens: int) -> UserError:
    return UserError(f"one prompt of {tokens} tokens doesn't fit into memory; shorten it or use a larger device")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the device's or the CPU's."""
    said = str(error).lower()
    named = "can't allocate memory" in said or "out of memory" in said
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or named
