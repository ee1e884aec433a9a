"""What the model says under interventions, exactly: many prompts and many settings in one batch."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from mechlens.errors import UserError
from mechlens.methods.activations.collect import tokenized
from mechlens.methods.behaviour.answers import NO_TOKEN, Answers
from mechlens.methods.behaviour.drawing import Draws, drawn_batch, require_length, streams_of
from mechlens.methods.behaviour.judges import refusal_log_odds
from mechlens.methods.behaviour.thought import answer_texts
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.progress import told
from mechlens.methods.steering.fits import require_direction, require_fits, require_interventions
from mechlens.methods.steering.interventions import ALL, Act, Intervention
from mechlens.methods.steering.placed import Placement
from mechlens.methods.steering.starts import SteeredRow
from mechlens.methods.steering.steered_batch import Engine, Interventions, Keyed, Reduce, steered_batch
from mechlens.models.bridge import LanguageModel, checkpoint_now, device_of, is_bridge, loaded, n_layers
from mechlens.models.engine.forward import Row, batch_tokens
from mechlens.models.engine.generate import Decided, Pick, greedy_batch, prompt_logits
from mechlens.models.engine.intervene.changed import changed
from mechlens.models.engine.intervene.token_mask import EveryToken, TokenMask
from mechlens.models.engine.reference import recomputed_greedy, whole_logits
from mechlens.models.engine.shared_rows import SharedRows
from mechlens.models.orthogonal import orthogonalised
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.templates.template import TemplateChoice

Condition = Sequence[Intervention | None]


@dataclass(frozen=True)
class Readout:
    """What is kept of the first answer token's logits: some of them, then the log-odds of a refusal, if asked for."""

    tokens: tuple[int, ...]
    refusal: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """What a cache knows it by."""
        return f"readout {self.tokens} {self.refusal}"

    def __call__(self, logits: Float[Tensor, "row vocab"], rows: list[int]) -> Float[Tensor, "row out"]:
        """Logits of the tokens, and the log-odds that one of the refusal tokens comes (float64)."""
        values = logits[:, list(self.tokens)].double()
        if not self.refusal:  # over a large vocabulary they cost more than they look
            return values
        return torch.cat([values, refusal_log_odds(logits, self.refusal).unsqueeze(1)], dim=1)


def first_token_of_arms(
    model: LanguageModel,
    batch: TokenBatch,
    conditions: Sequence[Condition],
    readout: Readout,
    *,
    cache: Cache | None = None,
) -> Float[Tensor, "condition prompt out"]:
    """The readout of every condition on every prompt."""
    part, given = _rows(batch, conditions)
    values = logits_under(model, part, given, reduce=readout, cache=cache)
    return values.reshape(len(batch.prompts), len(conditions), -1).transpose(0, 1)


def answers_of_arms(
    model: LanguageModel,
    batch: TokenBatch,
    conditions: Sequence[Condition],
    *,
    max_new_tokens: int,
    decided: Decided | None = None,
    cache: Cache | None = None,
) -> list[list[str]]:
    """The answer of every condition to every prompt, cut where it is `decided`."""
    part, given = _rows(batch, conditions)
    said = answer_under(model, part, given, max_new_tokens=max_new_tokens, decided=decided, cache=cache)
    return [list(said.texts[k :: len(conditions)]) for k in range(len(conditions))]


def _rows(batch: TokenBatch, conditions: Sequence[Condition]) -> tuple[TokenBatch, list[list[Intervention]]]:
    """Prompt by prompt all conditions, so that rows which are alike up to some layer meet in one batch."""
    prompts = range(len(batch.prompts))
    given = [[one] if (one := condition[i]) is not None else [] for i in prompts for condition in conditions]
    return batch.select([i for i in prompts for _ in conditions]), given


MAX_TOKENS = 12288
"""Prompt tokens in a batch. On a CPU products of 32 rows run at less than half the speed of products of 256."""


@dataclass(frozen=True, repr=False)
class SteeredAnswers(Answers):
    """Answers under interventions, which are kept with them; `ids` repeat where a prompt was asked repeatedly."""

    interventions: tuple[tuple[Intervention, ...], ...]


def answer_under(
    model: LanguageModel,
    prompts: Prompts | TokenBatch,
    interventions: Interventions,
    *,
    max_new_tokens: int,
    template: TemplateChoice = "tokenizer",
    temperature: float = 0.0,
    top_p: float = 1.0,
    n: int = 1,
    seed: int = 0,
    decided: Decided | None = None,
    cache: Cache | None = None,
    force: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> SteeredAnswers:
    """Answers under interventions; equal to running the whole text again for each token of each prompt.

    They are greedy, or with a `temperature` drawn as in `answer`: by the same numbers for a prompt under each
    intervention and under none, so that what differs is not chance alone.
    A row whose answer so far is `decided` leaves the batch. `cache` keeps finished batches, so that a killed run
    goes on (with a `decided` that has a `key`, such as `OnceRefused`). `max_tokens` bounds prompt tokens in a batch.
    Raises UserError for interventions that don't fit the model; those made for another pass with `force`.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> push = ml.Add(direction, strength=1.0, unit="raw", layers=(2,), positions="all", phase="both")
    >>> said = ml.answer_under(model, prompts[:2], [push], max_new_tokens=4)
    >>> len(said.texts)
    2
    """
    tokenizer = loaded(model).tokenizer
    if tokenizer is None:
        raise UserError("the model has no tokenizer to write answers with; load it with its tokenizer")
    require_length(max_new_tokens)
    batch = tokenized(model, prompts, template)
    draws = Draws(temperature, top_p, n, seed)
    streams = streams_of(batch, draws)
    require_interventions(interventions)
    if any(isinstance(one, Sequence) for one in interventions):
        interventions = [cast(Sequence[Intervention], own) for own in interventions for _ in range(n)]
    steered = steered_batch(model, drawn_batch(batch, n), interventions, template, force, max_new_tokens)

    def pick(rows: list[Row]) -> Pick | None:
        return draws.pick([streams[row.number] for row in cast(list[SteeredRow], rows)])

    def fast(rows: list[Row], prefix: DynamicCache | None, token_mask: TokenMask, shared_rows: SharedRows) -> Tensor:
        said = greedy_batch(model, rows, max_new_tokens, prefix, token_mask, told(decided), shared_rows, pick(rows))
        return _padded(said, max_new_tokens)

    def plain(rows: list[Row], token_mask: TokenMask) -> Tensor:
        said = recomputed_greedy(model, rows, max_new_tokens, token_mask, told(decided), pick(rows))
        return _padded(said, max_new_tokens)

    key = _key("answers" if draws.greedy else f"answers {draws.key}", decided)
    work = Engine(fast, plain, lambda values, rows: values, key, () if draws.greedy else streams)
    found = steered.run(work, batch_tokens(model, max_tokens), cache)
    tokens = tuple(tuple(t for t in row if t != NO_TOKEN) for row in found.tolist())
    return SteeredAnswers(
        ids=tuple(prompt.id for prompt in steered.batch.prompts),
        texts=answer_texts(tokenizer, steered.batch, tokens),
        tokens=tokens,
        max_new_tokens=max_new_tokens,
        checkpoint=checkpoint_now(model),
        template=steered.batch.template,
        engine="fast" if steered.fast else "plain",
        why_plain=steered.why_plain,
        interventions=steered.interventions,
        drawn=draws.described,
        draw=tuple(i % n for i in range(len(tokens))) if n > 1 else (),
    )


def _key(kind: str, function: object) -> str | None:
    if function is None:
        return kind
    return f"{kind} {function.key}" if isinstance(function, Keyed) else None


def _padded(answers: list[list[int]], width: int) -> Tensor:
    return torch.tensor([row + [NO_TOKEN] * (width - len(row)) for row in answers], dtype=torch.long)


def logits_under(
    model: LanguageModel,
    prompts: Prompts | TokenBatch,
    interventions: Interventions,
    *,
    template: TemplateChoice = "tokenizer",
    reduce: Reduce | None = None,
    cache: Cache | None = None,
    force: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> Float[Tensor, "prompt out"]:
    """Logits of the first answer token of every prompt under interventions (float32, on the CPU).

    `reduce` is given each batch's logits with the prompts' numbers, and its values are kept instead: logits of
    a large sweep over a large vocabulary don't fit into memory. `cache` keeps finished batches, so that a killed run
    goes on (with a `reduce` that has a `key`).

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> nothing = ml.Add(direction, strength=0.0, unit="raw", layers=(2,), positions="all", phase="prompt")
    >>> logits = ml.logits_under(model, prompts[:2], [nothing])
    >>> logits.shape == (2, model.cfg.d_vocab)
    True
    """
    steered = steered_batch(model, prompts, interventions, template, force, 0)

    def fast(rows: list[Row], prefix: DynamicCache | None, token_mask: TokenMask, shared_rows: SharedRows) -> Tensor:
        return prompt_logits(model, rows, prefix, token_mask, shared_rows)

    def plain(rows: list[Row], token_mask: TokenMask) -> Tensor:
        token_mask.advance(token_mask.rows, token_mask.start, 0)
        return whole_logits(model, torch.tensor([row.ids for row in rows], device=device_of(model))).float().cpu()

    work = Engine(fast, plain, reduce or (lambda logits, rows: logits), _key("logits", reduce))
    return steered.run(work, batch_tokens(model, max_tokens), cache)


@contextlib.contextmanager
def applied(
    model: LanguageModel,
    interventions: Interventions,
    batch: TokenBatch | None = None,
    *,
    said: int = 0,
    force: bool = False,
) -> Iterator[LanguageModel]:
    """The model under interventions at TransformerLens' hook points, for anything else one runs it for.

    With a batch, what is run must be that batch's `tokens`, once for each pass, with up to `said` tokens of an answer
    after each prompt. Without one, interventions must act on every token in both phases, and anything may be run:
    `answer`, `collect`, `run_with_cache`, a loss.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> gone = ml.Ablate(direction, layers="all", positions="all", phase="both", sites=ml.EVERYWHERE)
    >>> with ml.applied(model, [gone]) as changed:
    ...     without = ml.collect(changed, prompts)
    >>> bool(ml.project(without.at(2, "last"), direction).abs().max() < 1e-3)
    True
    """
    if batch is None:
        everywhere = [one for one in interventions if not isinstance(one, Sequence)]
        if len(everywhere) < len(interventions) or any(not _everywhere(o) for o in everywhere):
            raise UserError(
                "without a batch nothing says which tokens are run: give the batch, use answer_under or "
                "logits_under, or intervene with positions='all' and phase='both', no answer_tokens and no condition"
            )
        require_fits(model, everywhere, None, force=force)
        rows, token_mask = [Placement(n_layers(model), None).changes(0, everywhere)], EveryToken()
        with changed(model, rows, token_mask, fast=False):
            yield model
        return
    work = steered_batch(model, batch, interventions, "tokenizer", force, 0)
    placed = TokenMask(batch.lengths, -batch.offsets)
    with changed(model, work.changes, placed, fast=False):
        if said and any(change.gate for row in work.changes for change in row):
            _decide(model, batch)
        placed.advance(placed.rows, placed.start, said)
        yield model


@torch.inference_mode()
def _decide(model: LanguageModel, batch: TokenBatch) -> None:
    """Runs the prompts alone, so that gates have decided before answers are run with them, at layers below too."""
    device = device_of(model)
    tokens, mask = batch.tokens.to(device), batch.mask.long().to(device)
    if is_bridge(model):
        model.original_model(tokens, attention_mask=mask, use_cache=False)
    else:
        model(tokens, attention_mask=mask, prepend_bos=False)


def _everywhere(one: Intervention) -> bool:
    if not isinstance(one, Act) or getattr(one, "answer_tokens", None) is not None:
        return False
    return (one.positions, one.phase) == (ALL, "both")


@contextlib.contextmanager
def without_direction(model: LanguageModel, direction: Direction, *, force: bool = False) -> Iterator[LanguageModel]:
    """The model with weights that can't write along the direction, as long as the block lasts.

    On pre-norm models it equals `Ablate` at every site, layer and token; see `orthogonalised`.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> with ml.without_direction(model, direction) as changed:
    ...     without = ml.collect(changed, prompts)
    >>> bool(ml.project(without.at(2, "last"), direction).abs().max() < 1e-3)
    True
    """
    require_direction(model, direction, force=force)
    with orthogonalised(model, direction.vector):
        yield model
