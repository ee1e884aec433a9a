"""Where a concept is while a model is being trained, against where it was at the start."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, warn
from mechlens.methods.activations.activations import Activations, one_cell
from mechlens.methods.behaviour.judges import refusal_log_odds
from mechlens.methods.directions.direction import Direction, cosine, project
from mechlens.methods.directions.methods import grid_by
from mechlens.methods.directions.nulls import split_half
from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.methods.probing.auroc_grid import contrast_part, is_positive, score_grid
from mechlens.methods.probing.beyond_words import read_vectors
from mechlens.methods.probing.detect import detect
from mechlens.methods.probing.within_folds import auroc_gain, mean_auroc
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.checkpoints.random_blocks import random_blocks
from mechlens.models.native import blocks_of
from mechlens.models.native_pass import plain_pass
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import chat_template
from mechlens.settings import FRACTIONS, RANDOM_NETWORKS, DetectionPlan
from mechlens.studies.track.measures.home import FLOORS, HomeQuestion, home_question, network_floor, surface_floor
from mechlens.studies.track.measures.reference import TrackedConcept

POSITIVE, NEGATIVE = "positive", "negative"
SPLITS = 20
"""Halvings behind a direction's reliability."""


@dataclass(frozen=True)
class LivePrompts:
    """The prompts that are read again and again."""

    batch: TokenBatch
    split: Split
    positions: tuple[str, ...]
    """As they were asked for, which is how the numbers are named."""
    plan: DetectionPlan
    refusal_tokens: tuple[int, ...]
    """First tokens of refusals; none leaves the behaviour out."""

    @property
    def fingerprint(self) -> str:
        """sha256 over prompts, template and everything else that a reference depends on."""
        prompts = [asdict(prompt) for prompt in self.batch.prompts]
        record = json.dumps(
            [prompts, self.batch.template, self.positions, {**self.plan.key(), "refit": False}], sort_keys=True
        )
        return hashlib.sha256(record.encode()).hexdigest()


@dataclass(frozen=True)
class LiveFloor:
    """What words, embeddings and untrained networks give at one position, out of fold (see `FLOORS`)."""

    names: tuple[str, ...]
    """Of each row."""
    scores: Float[Tensor, "row prompt"]

    def of(self, name: str) -> Float[Tensor, "row prompt"]:
        """The rows of one name; none where it couldn't be had."""
        return self.scores[[i for i, own in enumerate(self.names) if own == name]]


@dataclass(frozen=True)
class LiveReference:
    """Directions of the model as training found it; one for each position, at the level chosen on validation."""

    directions: tuple[Direction, ...]
    thresholds: tuple[float, ...]
    """Midway between the classes' mean projections, on training prompts."""
    watched: str
    """Fingerprint of the prompts that it was made from."""
    floors: tuple[LiveFloor, ...] = ()
    """One for each position; none in references of earlier versions, or rows of other folds, which aren't read."""


def watch(
    positive: Prompts,
    negative: Prompts,
    tokenizer: Any,
    *,
    positions: Sequence[str],
    plan: DetectionPlan,
    refusal_tokens: Sequence[int] = (),
    today: str | None = None,
    template_arg: Sequence[str] = (),
) -> LivePrompts:
    """The prompts of two classes, split by family into those that fit, choose and test; see `chat_template`."""
    sides = ((POSITIVE, positive), (NEGATIVE, negative))
    prompts = [prompt for name, side in sides for prompt in as_prompts(side, name=name, label=name)]
    names = [prompt.id for prompt in prompts]
    if len(set(names)) < len(names):
        raise UserError(f"two prompts to watch have the id {max(names, key=names.count)!r}; give each an id of its own")
    split = split_by_family([p.label for p in prompts], [p.group for p in prompts], fractions=FRACTIONS, seed=plan.seed)
    batch = tokenize(prompts, chat_template(tokenizer, today=today, template_arg=template_arg))
    columns = {name: batch.resolve([name]) for name in positions}  # an unknown position is refused before training
    named = tuple(name for asked, found in columns.items() for name in ((asked,) if len(found) == 1 else found))
    return LivePrompts(batch, split, named, plan, tuple(refusal_tokens))


def live_reference(module: Any, watched: LivePrompts, step: int) -> LiveReference:
    """Directions and thresholds of the model as it is now, and the floor: its words, and its blocks drawn at random."""
    acts, _ = _read(module, watched, range(len(blocks_of(module)) + 1), step)
    detection = detect(acts, POSITIVE, NEGATIVE, watched.split, watched.plan)
    chosen = [detection.at(position) for position in watched.positions]
    train = contrast_part(acts, watched.split.train, (POSITIVE, NEGATIVE))
    thresholds = []
    for choice in chosen:
        scores = project(train.at(choice.level, choice.position), choice.direction).double()
        positive = is_positive(train, (POSITIVE, NEGATIVE))
        thresholds.append(float(scores[positive].mean() + scores[~positive].mean()) / 2)
    directions = tuple(choice.direction for choice in chosen)
    floors = tuple(_floors(module, watched, directions, step))
    return LiveReference(directions, tuple(thresholds), watched.fingerprint, floors)


def _question(watched: LivePrompts, position: str) -> HomeQuestion:
    labels = tuple(prompt.label for prompt in watched.batch.prompts)
    concept = TrackedConcept("watched", (POSITIVE, NEGATIVE), labels, position, None, {})
    return home_question(concept, [prompt.group for prompt in watched.batch.prompts], watched.plan.seed)


def _floors(module: Any, watched: LivePrompts, directions: Sequence[Direction], step: int) -> list[LiveFloor]:
    """At each position; without the networks, with a warning, where the blocks can't be drawn anew."""
    asked = [_question(watched, direction.position) for direction in directions]
    networks: list[list[Tensor]] = [[] for _ in asked]
    try:
        for seed in range(RANDOM_NETWORKS):
            with random_blocks(module, watched.plan.seed + seed):
                acts, _ = _read(module, watched, range(len(blocks_of(module)) + 1), step)
            for found, question in zip(networks, asked, strict=True):
                found.append(network_floor(question, acts))
    except UserError as error:
        warn(f"there is no floor of an untrained network: {error}")
    batch, weight = watched.batch, module.get_input_embeddings().weight.detach()
    spans = batch.instruction.tolist()
    means = torch.stack([weight[batch.tokens[i, a : b + 1]].float().mean(dim=0) for i, (a, b) in enumerate(spans)])
    floors = []
    for question, found in zip(asked, networks, strict=True):
        tokens = weight[batch.tokens[torch.arange(len(spans)), batch.at(question.concept.home)]]
        scores = surface_floor(question, [p.text for p in batch.prompts], means.cpu(), tokens.float().cpu())
        rows = scores | ({"random_blocks": torch.cat(found)} if found else {})
        names = tuple(name for name, own in rows.items() for _ in own)
        floors.append(LiveFloor(names, torch.cat(list(rows.values()))))
    return floors


def live_numbers(module: Any, watched: LivePrompts, reference: LiveReference, step: int) -> dict[str, Estimate]:
    """How the reference's directions and refitted ones do on test prompts in the model as it is now.

    For each position: `auroc.P.frozen`, `auroc.P.refitted`, `accuracy.P` (at the reference's threshold), `gap.P`
    (difference of the classes' mean projections on the reference's direction), `cosine.P` of the refitted direction
    to the reference's (no interval), `reliability.P` and `norm.P` of the refitted one; with refusal tokens
    `logodds.positive` and `logodds.negative`. Out of fold, over all prompts: `auroc.P.probe`, beside it `auroc.P.F` for
    each F of the floor (see `FLOORS`), and `gain.P`, by which the probe is ahead of the nearest of these.
    """
    levels = sorted({direction.level for direction in reference.directions})
    acts, logits = _read(module, watched, levels, step)
    contrast = (POSITIVE, NEGATIVE)
    train, test = (contrast_part(acts, watched.split.part(name), contrast) for name in ("train", "test"))
    numbers: dict[str, Estimate] = {}
    for asked, direction, threshold in zip(watched.positions, reference.directions, reference.thresholds, strict=True):
        numbers |= _at_position(asked, direction, threshold, train, test, watched.plan)
    for asked, direction, floor in zip(watched.positions, reference.directions, reference.floors, strict=False):
        question = _question(watched, direction.position)
        if len(floor.of("tfidf")) == len(question.folds.parts):
            numbers |= _beyond_words(asked, question, acts, direction.level, floor)
    if watched.refusal_tokens:
        odds = refusal_log_odds(logits, watched.refusal_tokens)[list(watched.split.test)]
        for label in contrast:
            rows = [row for row, given in enumerate(test.labels) if given == label]
            families = [test.families[row] for row in rows]
            numbers[f"logodds.{label}"] = mean_estimate(
                odds[rows].float(), families, watched.plan.seed, watched.plan.resamples
            )
    return numbers


def _at_position(
    asked: str, direction: Direction, threshold: float, train: Activations, test: Activations, plan: DetectionPlan
) -> dict[str, Estimate]:
    level, position = direction.level, direction.position
    train, test = (one_cell(part, level, position) for part in (train, test))
    grid = grid_by(train, POSITIVE, NEGATIVE, plan.method)
    refitted = grid.at(level, position)
    positive = is_positive(test, (POSITIVE, NEGATIVE))
    frozen = project(test.at(level, position), direction)
    right = ((frozen > threshold) == positive).float()
    reliability = split_half(train, POSITIVE, NEGATIVE, SPLITS, plan.seed, plan.method)
    auroc = {
        # Scores that tie but for rounding tie exactly in a score grid.
        name: auroc_estimate(score_grid(test, own)[0, 0], positive, test.families)
        for name, own in (("frozen", replace(grid, vectors=direction.vector[None, None])), ("refitted", grid))
    }
    # A pair's two sides are drawn together, and counted from the threshold a lone side's class size matters little.
    apart = frozen - threshold
    share = torch.where(positive, len(apart) / positive.sum(), -len(apart) / (~positive).sum())
    return {
        f"auroc.{asked}.frozen": auroc["frozen"],
        f"auroc.{asked}.refitted": auroc["refitted"],
        f"accuracy.{asked}": mean_estimate(right, test.families, plan.seed, plan.resamples),
        f"gap.{asked}": mean_estimate(apart * share, test.families, plan.seed, plan.resamples),
        f"cosine.{asked}": Estimate.exact(float(cosine(refitted.vector, direction.vector)), len(train.ids)),
        f"reliability.{asked}": Estimate.exact(float(reliability), len(train.ids)),
        f"norm.{asked}": Estimate.exact(refitted.norm, len(train.ids)),
    }


def _beyond_words(
    asked: str, question: HomeQuestion, acts: Activations, level: int, floor: LiveFloor
) -> dict[str, Estimate]:
    values = question.values(acts)[:, [acts.levels.index(level)]]
    probe = read_vectors(values, question.folds)
    gains = [auroc_gain(probe, floor.of(name), question.folds) for name in FLOORS]
    return {
        f"auroc.{asked}.probe": mean_auroc(probe, question.folds),
        **{f"auroc.{asked}.{name}": mean_auroc(floor.of(name), question.folds) for name in FLOORS},
        f"gain.{asked}": min(gains, key=lambda gain: (gain.measurable, gain.low)),
    }


def _read(module: Any, watched: LivePrompts, levels: Sequence[int], step: int) -> tuple[Activations, torch.Tensor]:
    names = watched.batch.resolve(watched.positions)
    watched.batch.require_rows(module.get_input_embeddings().num_embeddings, None)
    read = plain_pass(module, watched.batch, names, levels)
    if not bool(torch.isfinite(read.residuals).all()):
        raise UserError(f"the model's activations are not finite at step {step}; its training has diverged")
    prompts = watched.batch.prompts
    checkpoint = Checkpoint(
        name=f"step {step}",
        path=str(module.config.name_or_path),
        step=step,
        fingerprint=weight_fingerprint(dict(module.named_parameters())),
    )
    acts = Activations(
        values=read.residuals,
        levels=tuple(levels),
        positions=names,
        ids=tuple(prompt.id for prompt in prompts),
        labels=tuple(prompt.label for prompt in prompts),
        families=tuple(prompt.group for prompt in prompts),
        site="resid",
        checkpoint=checkpoint,
        template=watched.batch.template,
        last=watched.batch.positions[-1],
    )
    return acts, read.logits
