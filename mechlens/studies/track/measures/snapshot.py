"""What is read from one checkpoint while its weights are in place; everything else is worked out from it later."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.streamed import StreamedTensor, too_many
from mechlens.methods.behaviour.answers import NO_TOKEN, Answers
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel, d_model
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.series import Member
from mechlens.prompts.batch import TokenBatch


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint's answers, activations and reactions."""

    member: Member
    acts: Activations
    answers: Answers
    verdicts: tuple[str, ...]
    """Of the judge that places the quadrants."""
    log_odds: Float[Tensor, " prompt"]
    """Of refusal at the first answer token, with the base's refusal tokens."""
    text_loss: Float[Tensor, " text"]
    """Cross-entropy of each plain text (nats per token)."""
    steered: Mapping[str, Float[Tensor, " steered"]]
    """Refusal log-odds of the steered prompts, by setting: none, CONCEPT.reference, CONCEPT.own, CONCEPT.random.K."""
    matrices: tuple[Mapping[str, Any], ...] = ()
    """What training changed in each matrix, one row each; empty for the base."""
    variants: Activations | None = None
    """Of the prompts with a trigger, decoys and neither, labelled so."""
    variant_answers: Answers | None = None
    variant_verdicts: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Training step."""
        return self.member.step


def to_piece(snapshot: Snapshot) -> dict[str, Tensor]:
    """As tensors, for a cache."""
    kept = {"values": snapshot.acts} | ({"variants": snapshot.variants} if snapshot.variants else {})
    header = {
        "checkpoint": vars(snapshot.acts.checkpoint),
        "engines": [snapshot.acts.engine, snapshot.answers.engine],
        "texts": snapshot.answers.texts,
        "verdicts": [snapshot.verdicts, snapshot.variant_verdicts],
        "steered": list(snapshot.steered),
        "matrices": [dict(row) for row in snapshot.matrices],
        "variant_texts": snapshot.variant_answers.texts if snapshot.variant_answers else None,
        "streamed": {name: acts.values.keys for name, acts in kept.items() if isinstance(acts.values, StreamedTensor)},
    }
    piece = {
        "header": torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8),
        **{name: _numbers(acts.values) for name, acts in kept.items()},
        "tokens": _padded(snapshot.answers),
        "log_odds": snapshot.log_odds,
        "text_loss": snapshot.text_loss,
        **{f"steered.{name}": value for name, value in snapshot.steered.items()},
    }
    if snapshot.variant_answers is not None:
        piece |= {"variant_tokens": _padded(snapshot.variant_answers)}
    return piece


def _numbers(values: Tensor) -> Tensor:
    """The values themselves; of streamed ones, which have pieces of their own, only where each prompt is."""
    return values.rows if isinstance(values, StreamedTensor) else values.contiguous()


def cache_of_many(
    cache: Cache | None, model: LanguageModel, batch: TokenBatch, positions: Sequence[str], levels: Sequence[int]
) -> Cache | None:
    """The cache, where activations are too many for memory and are streamed to it; a snapshot keeps others itself."""
    many = too_many(len(batch.prompts) * len(levels) * len(batch.resolve(positions)) * d_model(model))
    return cache if many else None


@dataclass(frozen=True)
class Labels:
    """What activations and answers carry that no checkpoint changes."""

    batch: TokenBatch
    levels: tuple[int, ...]
    positions: tuple[str, ...]
    max_new_tokens: int


def from_piece(
    piece: Mapping[str, Tensor], member: Member, labels: Labels, variants: Labels | None, cache: Cache | None = None
) -> Snapshot | None:
    """The snapshot that `to_piece` took apart; None where the cache has lost some of its activations."""
    header = json.loads(bytes(piece["header"].tolist()))
    values = {name: piece[name] for name in ("values", "variants") if name in piece}
    for name, keys in header.get("streamed", {}).items():
        found = StreamedTensor.of(cache, keys, values[name])
        if found is None:
            return None
        values[name] = found
    checkpoint = Checkpoint(**header["checkpoint"])
    engines = header["engines"]
    verdicts = [tuple(own) for own in header["verdicts"]]
    return Snapshot(
        member=member,
        acts=_acts(values["values"], checkpoint, engines[0], labels),
        answers=_answers(piece["tokens"], header["texts"], checkpoint, engines[1], labels),
        verdicts=verdicts[0],
        log_odds=piece["log_odds"],
        text_loss=piece["text_loss"],
        steered={name: piece[f"steered.{name}"] for name in header["steered"]},
        matrices=tuple(header["matrices"]),
        variants=_acts(values["variants"], checkpoint, engines[0], variants) if variants else None,
        variant_answers=_answers(piece["variant_tokens"], header["variant_texts"], checkpoint, engines[1], variants)
        if variants
        else None,
        variant_verdicts=verdicts[1],
    )


def _acts(values: Tensor, checkpoint: Checkpoint, engine: str, labels: Labels) -> Activations:
    prompts = labels.batch.prompts
    return Activations(
        values=values[:, : len(labels.levels)],  # streamed pieces may hold the model's last level as well
        levels=labels.levels,
        positions=labels.positions,
        ids=tuple(prompt.id for prompt in prompts),
        labels=tuple(prompt.label for prompt in prompts),
        families=tuple(prompt.group for prompt in prompts),
        site="resid",
        checkpoint=checkpoint,
        template=labels.batch.template,
        engine=engine,
        last=labels.batch.positions[-1],
    )


def _answers(tokens: Tensor, texts: Sequence[str], checkpoint: Checkpoint, engine: str, labels: Labels) -> Answers:
    return Answers(
        ids=tuple(prompt.id for prompt in labels.batch.prompts),
        texts=tuple(texts),
        tokens=tuple(tuple(t for t in row if t != NO_TOKEN) for row in tokens.tolist()),
        max_new_tokens=labels.max_new_tokens,
        checkpoint=checkpoint,
        template=labels.batch.template,
        engine=engine,
    )


def _padded(answers: Answers) -> Tensor:
    width = answers.max_new_tokens
    rows = [[*row, *[NO_TOKEN] * (width - len(row))] for row in answers.tokens]
    return torch.tensor(rows, dtype=torch.long)
