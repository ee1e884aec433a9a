"""Collecting activations: prompts in, labelled residual vectors out, computing only what is read."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.cache import Cache
from mechlens.models.bridge import (
    LanguageModel,
    checkpoint_now,
    context_length,
    device_of,
    dtype_of,
    embedding_rows,
    has_hooks,
    loaded,
    n_layers,
)
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.probes import overflow_advice
from mechlens.models.sites import level_hook
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate, chat_template

FORMAT = 1
"""Raised when a change of code changes the numbers, so that older pieces on a cache are not used again."""


def collect(
    model: LanguageModel,
    prompts: Sequence[Prompt] | TokenBatch,
    *,
    positions: Sequence[str] = ("inst", "last"),
    levels: Sequence[int] | None = None,
    site: str = "resid",
    template: ChatTemplate | None = None,
    cache: Cache | None = None,
    max_tokens: int | None = None,
) -> Activations:
    """Residual vectors of every prompt at the named positions and levels (all levels 0..L by default).

    Equal to running each prompt alone through plain Hugging Face, to rounding. `cache` keeps finished batches,
    so that a killed run goes on and the same request is never computed twice. `max_tokens` bounds a batch;
    where memory runs out, the batch is halved and tried again.

    Raises UserError for an unknown position or level, a prompt longer than the model's context, and values
    that are not finite (float16 overflow), which are named by level and prompt.
    """
    if site != "resid":
        raise UserError(f"there is no site {site!r} to collect; choose 'resid'")
    batch = prompts if isinstance(prompts, TokenBatch) else tokenize(prompts, template or template_of(model))
    names = batch.resolve(positions)
    wanted = _levels(model, levels)
    rows = _rows(model, batch, names)
    if has_hooks(model):
        cache = None  # what hooks change is in no fingerprint, so nothing made under them is kept or reused
    fast = forward.fits_fast_path(model)
    checkpoint = checkpoint_now(model)
    values, finite = _compute(model, checkpoint, rows, wanted, fast, cache, max_tokens or _default_tokens(model))
    _refuse_non_finite(~finite, wanted, batch, dtype_of(model))
    return Activations(
        values=values,
        levels=wanted,
        positions=names,
        ids=tuple(prompt.id for prompt in batch.prompts),
        labels=tuple(prompt.label for prompt in batch.prompts),
        families=tuple(prompt.group for prompt in batch.prompts),
        site=site,
        checkpoint=checkpoint,
        template=batch.template,
        engine="fast" if fast else "plain",
        why_plain=forward.why_plain(model),
        last=batch.positions[-1],
    )


def template_of(model: LanguageModel) -> ChatTemplate:
    """The chat template of the model's own tokenizer."""
    tokenizer = loaded(model).tokenizer
    if tokenizer is None:
        raise UserError("the model has no tokenizer; pass a TokenBatch, or load the model with its tokenizer")
    return chat_template(tokenizer)


def from_cache(cache: Any, batch: TokenBatch, model: LanguageModel, positions: Sequence[str]) -> Activations:
    """Activations from a TransformerLens ActivationCache of `batch.tokens`: every residual level that it holds."""
    levels = [level for level in range(n_layers(model) + 1) if level_hook(model, level) in cache]
    if not levels:
        raise UserError("the cache holds no residual stream; cache hook_resid_pre or hook_resid_post")
    names = batch.resolve(positions)
    read = torch.stack([batch.at(name) for name in names], dim=1)
    values = torch.stack([forward.gather(cache[level_hook(model, level)], read) for level in levels], dim=1)
    return Activations(
        values=values,
        levels=tuple(levels),
        positions=names,
        ids=tuple(prompt.id for prompt in batch.prompts),
        labels=tuple(prompt.label for prompt in batch.prompts),
        families=tuple(prompt.group for prompt in batch.prompts),
        site="resid",
        checkpoint=checkpoint_now(model),
        template=batch.template,
        last=batch.positions[-1],
    )


def _levels(model: LanguageModel, levels: Sequence[int] | None) -> tuple[int, ...]:
    last = n_layers(model)
    wanted = tuple(range(last + 1)) if levels is None else tuple(levels)
    wrong = [level for level in wanted if not 0 <= level <= last]
    if wrong or not wanted:
        raise UserError(f"there is no level {wrong or 'at all'}; this model has levels 0 to {last}")
    return wanted


def _rows(model: LanguageModel, batch: TokenBatch, names: Sequence[str]) -> list[Row]:
    """Every prompt without its padding, so that the padding side can't matter."""
    refuse_too_long(model, batch)
    index = torch.stack([batch.at(name) for name in names], dim=1)
    return [Row(tuple(batch.row(i)), tuple((index[i] - batch.offset(i)).tolist())) for i in range(len(batch.prompts))]


def refuse_too_long(model: LanguageModel, batch: TokenBatch, new_tokens: int = 0) -> None:
    """UserError if a prompt and the tokens that are to follow it don't fit into the model's context, or a token of it
    has no row in the model's embedding."""
    batch.require_rows(embedding_rows(model), loaded(model).tokenizer)
    lengths, room = batch.lengths, context_length(model) - new_tokens
    if int(lengths.max()) > room:
        row = int(lengths.argmax())
        follow = f", of which {new_tokens} are left for the answer" if new_tokens else ""
        raise UserError(
            f"prompt {batch.prompts[row].id!r} has {int(lengths[row])} tokens and the model takes "
            f"{context_length(model)}{follow}; shorten it"
        )


def _compute(
    model: LanguageModel,
    checkpoint: Checkpoint,
    rows: list[Row],
    levels: tuple[int, ...],
    fast: bool,
    cache: Cache | None,
    max_tokens: int,
) -> tuple[Float[Tensor, "prompt level position d_model"], Bool[Tensor, "prompt level"]]:
    """The values, in one piece of memory that is filled batch by batch, and which of them are finite."""
    skip = forward.shared_prefix(rows) if fast else 0
    prefix = None
    values = torch.empty(0)
    finite = torch.ones(len(rows), len(levels), dtype=torch.bool)
    batches = forward.plan(rows, max_tokens, shared=skip, equal_lengths=not fast)
    for members in tqdm(batches, desc="collecting", unit="batch", delay=2, leave=False):
        chunk = [rows[i] for i in members]
        key = _key(model, checkpoint, chunk, levels, skip, fast)
        piece = cache.get(key) if cache is not None else None
        if piece is None:
            if fast and skip and prefix is None:
                prefix = forward.prefix_cache(model, rows[0].ids[:skip])
            run = _runner(model, levels, fast, prefix)
            piece = {"values": halving(run, chunk)}
            if cache is not None:
                cache.put(key, piece)
        found = piece["values"]
        if not len(values):
            values = found.new_empty(len(rows), *found.shape[1:])
        values[members] = found
        finite[members] = torch.isfinite(found).flatten(2).all(dim=-1)
    return values, finite


def _runner(model: LanguageModel, levels: tuple[int, ...], fast: bool, prefix: Any) -> Callable[[list[Row]], Tensor]:
    if fast:
        return lambda chunk: forward.fast_batch(model, chunk, levels, prefix)
    return lambda chunk: forward.reference_batch(model, chunk, levels)


def halving(run: Callable[[list[Any]], Tensor], rows: list[Any], length: int | None = None) -> Tensor:
    """Run a batch; where memory runs out, run its halves. One prompt that doesn't fit is a UserError.

    `length` is that of the prompt where the rows are not `Row`s.
    """
    try:
        return run(rows)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        if len(rows) == 1:
            tokens = len(rows[0].ids) if length is None else length
            raise UserError(
                f"one prompt of {tokens} tokens doesn't fit into memory; shorten it or use a larger device"
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(rows) // 2
    return torch.cat([halving(run, part, length) for part in (rows[:half], rows[half:])])


def _out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    named = "can't allocate memory" in said or "out of memory" in said
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or named


def _default_tokens(model: LanguageModel) -> int:
    """Tokens in a batch: on a CPU small batches stay in the cache, on a GPU large ones fill the device."""
    return 2048 if device_of(model).type == "cpu" else 16384


def _key(
    model: LanguageModel, checkpoint: Checkpoint, rows: list[Row], levels: tuple[int, ...], skip: int, fast: bool
) -> str:
    """Fingerprint of a batch: weights, type, what is read and every token id (so template and prompts too)."""
    record = [
        FORMAT, *checkpoint.identity, str(dtype_of(model)), device_of(model).type,
        "fast" if fast else "plain", skip, levels, [(row.ids, row.read) for row in rows],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _refuse_non_finite(
    bad: Bool[Tensor, "prompt level"], levels: tuple[int, ...], batch: TokenBatch, dtype: torch.dtype
) -> None:
    if bool(bad.any()):
        level = int(bad.any(dim=0).nonzero()[0, 0])
        row = int(bad[:, level].nonzero()[0, 0])
        raise UserError(
            f"activations at level {levels[level]} are not finite (first in prompt {batch.prompts[row].id!r}; "
            f"{int(bad.any(dim=1).sum())} prompts in all); {overflow_advice(dtype)}"
        )
