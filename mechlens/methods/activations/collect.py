"""Collecting activations: prompts in, labelled values out, computing only what is read."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from mechlens.errors import UserError, kind_of, quoted
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.reading import BatchReader, Reading
from mechlens.methods.activations.spans import Words, opened, spans_of
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.progress import phase
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
from mechlens.models.engine.probes import overflow_advice
from mechlens.models.engine.site_reader import require_readable, tokens_first, why_plain_at
from mechlens.models.sites import RESIDUAL, SITES, level_hook, require_site, site_hook
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.templates.template import ChatTemplate, TemplateChoice, chat_template
from mechlens.registry import whole_numbers


def collect(
    model: LanguageModel,
    prompts: Prompts | TokenBatch,
    *,
    positions: Sequence[str] = ("inst", "last"),
    levels: Sequence[int] | None = None,
    site: str = RESIDUAL,
    answers: Sequence[str] | Sequence[Sequence[int]] | None = None,
    words: Words | None = None,
    reduce: Literal["mean"] | None = None,
    project: Sequence[Direction] | None = None,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
    max_tokens: int | None = None,
) -> Activations:
    """What every prompt has at the named positions and levels: residual vectors at all levels 0..L by default.

    Equal to running each prompt alone through plain Hugging Face, to rounding. Texts are prompts too, and
    `template=None` reads them as they are, without a chat template. `site` is one of
    `mechlens.models.sites.SITES` (attn_out, mlp_post, z, pattern, ...) at blocks 0..L-1. `answers` (texts, or tokens
    such as `Answers.tokens`) follow the prompts in the same pass, which shows what decoding them saw. Positions are
    single tokens (`inst`, `last`, `post[k]`, `token[k]`, `token[-k]`, `instruction[k]`, `answer[k]`, `think_end`) and
    spans of them (`post[*]`, `prompt[*]`, `instruction[*]`, `answer[*]`, `think[*]`); `words` gives names of your own
    to spans of the user's words, which positions then hold too. A span is one column for each token, or one for its
    mean (`reduce="mean"`; `post[*]`, which all prompts have alike, stays apart). `project` keeps only how far each
    value lies along each direction, as a unit vector; directions of another checkpoint are taken too.

    `cache` keeps finished batches, so that a killed run goes on and the same request is never computed twice; values
    that would take more than 1 GB stay there and are read cell by cell (`StreamedTensor`).
    `max_tokens` bounds a batch; where memory runs out, the batch is halved and tried again.

    Raises UserError for an unknown position or level, a prompt longer than the model's context, and values
    that are not finite (float16 overflow), which are named by level and prompt.

    >>> model = ml.load("smollm2")
    >>> acts = ml.collect(model, ["How do I bake a cake?", "Say hello."], positions=["inst", "post[*]"])
    >>> acts.dims, acts.levels[0], acts.positions[0]
    (('prompt', 'level', 'position', 'd_model'), 0, 'inst')
    >>> ml.collect(model, ["Raw text, as a base model reads it"], template=None).positions
    ('last',)
    >>> ml.collect(model, "Say hello.", site="z", levels=[1]).axes
    ('head', 'd_head')
    """
    wanted = _levels(model, site, levels)
    if not isinstance(cache, Cache | None):
        raise UserError(
            f"cache is {quoted(cache, 80)}, which keeps no batches; give ml.FolderCache(FOLDER), or leave it out"
        )
    if reduce not in (None, "mean"):
        raise UserError(f"reduce is {reduce!r}, and a span is reduced to its mean only; give 'mean', or leave it out")
    batch = tokenized(model, prompts, template)
    if answers is not None:
        batch = batch.with_answers(answer_tokens(model, answers))
    spans = spans_of(batch, positions, words or {}, lambda: template_of(model, template))
    columns = spans if reduce else opened(spans)
    reading = Reading(site, wanted, tuple(columns), _lines(model, project))
    refuse_too_long(model, batch)
    # Every prompt without its padding, so that the padding side can't matter.
    rows = reading.rows(batch)
    if has_hooks(model):
        cache = None  # what hooks change is in no fingerprint, so nothing made under them is kept or reused
    fast, why_plain = _path(model, site, wanted)
    checkpoint = checkpoint_now(model)
    reader = BatchReader(model, checkpoint, reading, fast, cache, max_tokens or _default_tokens(model))
    with phase("collecting"):
        values, finite = reader.read(rows)
    _refuse_non_finite(~finite, wanted, batch, dtype_of(model))
    return _labelled(values, batch, reading, checkpoint, engine="fast" if fast else "plain", why_plain=why_plain)


def template_of(model: LanguageModel, template: TemplateChoice = "tokenizer") -> ChatTemplate:
    """The chat template of the model's own tokenizer, or of the name given (see `chat_template`); None is raw text.

    >>> model = ml.load("smollm2")
    >>> ml.template_of(model).kind
    'tokenizer'
    """
    if isinstance(template, ChatTemplate):
        return template
    tokenizer = loaded(model).tokenizer
    if tokenizer is None:
        raise UserError("the model has no tokenizer; pass a TokenBatch, or load the model with its tokenizer")
    return chat_template(tokenizer, template)


def tokenized(model: LanguageModel, prompts: Prompts | TokenBatch, template: TemplateChoice) -> TokenBatch:
    """The prompts as tokens, which they may be already; UserError where there are none."""
    batch = prompts if isinstance(prompts, TokenBatch) else tokenize(prompts, template_of(model, template))
    if not batch.prompts:
        raise UserError("there are no prompts; give at least one")
    return batch


def from_cache(
    cache: Any, batch: TokenBatch, model: LanguageModel, positions: Sequence[str], *, site: str = RESIDUAL
) -> Activations:
    """Activations from a TransformerLens ActivationCache of `batch.tokens`: every level of the site that it holds.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize(ml.builtin_prompts("harmful")[:4], ml.template_of(model))
    >>> _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.mask)
    >>> ml.from_cache(cache, batch, model, ["last"]).values.shape[:3]
    torch.Size([4, 4, 1])
    """
    require_site(site, (RESIDUAL, *SITES))
    hooks = {level: _hook(model, site, level) for level in range(n_layers(model) + (site == RESIDUAL))}
    levels = [level for level, hook in hooks.items() if hook in cache]
    if not levels:
        wanted = "hook_resid_pre or hook_resid_post" if site == RESIDUAL else SITES[site].hook
        raise UserError(f"the cache holds no {_NAMES.get(site, site)}; cache {wanted}")
    spans = spans_of(batch, positions, {}, lambda: template_of(model))
    reading = Reading(site, tuple(levels), tuple(opened(spans)), None)
    offsets, rows = batch.offsets, reading.rows(batch)
    read = forward.read_places(rows) + offsets.unsqueeze(1)
    found = torch.stack([forward.gather(tokens_first(site, cache[hooks[level]]), read) for level in levels], dim=1)
    if site == "pattern":  # keys are counted from the prompt's first token
        keys = torch.full_like(found, torch.nan)
        for i, row in enumerate(rows):
            keys[i, ..., : len(row.ids)] = found[i, ..., offsets[i] : offsets[i] + len(row.ids)]
        found = keys
    return _labelled(reading.kept(found, reading.lengths), batch, reading, checkpoint_now(model))


def _labelled(
    values: Tensor,
    batch: TokenBatch,
    reading: Reading,
    checkpoint: Checkpoint,
    engine: str = "plain",
    why_plain: str = "",
) -> Activations:
    """What was read, with the names of all its axes and of where it comes from."""
    present = torch.stack([column.present for column in reading.columns], dim=1)
    return Activations(
        values=values,
        levels=reading.levels,
        positions=tuple(column.name for column in reading.columns),
        ids=tuple(prompt.id for prompt in batch.prompts),
        labels=tuple(prompt.label for prompt in batch.prompts),
        families=tuple(prompt.group for prompt in batch.prompts),
        site=reading.site,
        checkpoint=checkpoint,
        template=batch.template,
        engine=engine,
        why_plain=why_plain,
        last=batch.positions[-1],
        axes=reading.axes,
        mask=None if bool(present.all()) else present,
    )


_NAMES = {RESIDUAL: "residual stream"}


def _hook(model: LanguageModel, site: str, level: int) -> str:
    return level_hook(model, level) if site == RESIDUAL else site_hook(site, level)


def _path(model: LanguageModel, site: str, levels: tuple[int, ...]) -> tuple[bool, str]:
    """Whether the fast path is taken, and if not why; one warning says that too."""
    if site == RESIDUAL:
        return forward.fits_fast_path(model), forward.why_plain(model)
    require_readable(model, site, levels)
    reason = why_plain_at(model, site)
    forward.warn_plain(model, reason)
    return not reason, reason


def answer_tokens(model: LanguageModel, answers: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Tokens of answers in words, as the tokenizer has them without adding any."""
    if isinstance(answers, str):
        raise UserError("answers is one text; give a list with one for each prompt")
    tokenizer = loaded(model).tokenizer
    if tokenizer is None and any(isinstance(own, str) for own in answers):
        raise UserError("the model has no tokenizer to read answers with; give their tokens")
    return [
        tokenizer(own, add_special_tokens=False)["input_ids"] if isinstance(own, str) else list(own) for own in answers
    ]


def _lines(model: LanguageModel, project: Sequence[Direction] | None) -> Tensor | None:
    """Unit vectors. Directions of other weights may be meant, in a comparison; folded or centred ones never fit."""
    if project is None:
        return None
    if not project:
        raise UserError("project is empty; give at least one direction, or leave it out")
    sizes, regime = sorted({len(direction.vector) for direction in project}), checkpoint_now(model).regime
    if len(sizes) > 1:
        raise UserError(
            f"the directions to project on have {' and '.join(map(str, sizes))} numbers; give those of one site"
        )
    other = next((own for direction in project if (own := direction.checkpoint.regime) != regime), None)
    if other is not None:
        raise UserError(
            f"a direction to project on was made with {other} weights and the model has {regime} ones; make it anew"
        )
    return torch.stack([direction.unit.detach().float().cpu() for direction in project])


def _levels(model: LanguageModel, site: str, levels: Sequence[int] | None) -> tuple[int, ...]:
    require_site(site, (RESIDUAL, *SITES))
    last = n_layers(model) - (site != RESIDUAL)
    wanted = tuple(range(last + 1)) if levels is None else whole_numbers("levels", levels, "level")
    wrong = [level for level in wanted if not 0 <= level <= last]
    if wrong or not wanted:
        kind = "level" if site == RESIDUAL else "block"
        missing = f"there is no {kind} {wrong}" if wrong else f"there is no {kind} to read"
        raise UserError(f"{missing}; this model has {kind}s 0 to {last}")
    return wanted


def refuse_too_long(model: LanguageModel, batch: TokenBatch, new_tokens: int = 0) -> None:
    """UserError if a prompt and the tokens that are to follow it don't fit into the model's context, or a token of it
    has no row in the model's embedding."""
    if not isinstance(batch, TokenBatch):
        raise UserError(f"the batch is {kind_of(batch)}; give what ml.tokenize returns")
    batch.require_rows(embedding_rows(model), loaded(model).tokenizer)
    lengths, room = batch.lengths, context_length(model) - new_tokens
    if int(lengths.max()) > room:
        row = int(lengths.argmax())
        follow = f", of which {new_tokens} are left for the answer" if new_tokens else ""
        answered = "" if batch.answer is None else " with its answer"
        raise UserError(
            f"prompt {batch.prompts[row].id!r} has {int(lengths[row])} tokens{answered} and the model takes "
            f"{context_length(model)}{follow}; shorten it"
        )


def _default_tokens(model: LanguageModel) -> int:
    """Tokens in a batch: on a CPU small batches stay in the cache, on a GPU large ones fill the device."""
    return forward.batch_tokens(model, 2048) if device_of(model).type == "cpu" else 16384


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
