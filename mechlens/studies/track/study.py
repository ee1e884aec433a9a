"""Does what a model represents survive fine-tuning that changes what it does? One concept after another, over a series.

The base decides everything there is to choose; then its frozen readouts, and refitted ones, are asked the same
questions at every checkpoint. Zhao et al. 2025, section 5.2.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.errors import UserError, an, warn
from mechlens.files import user_path
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.behaviour.answers import Answers, answer
from mechlens.methods.behaviour.chosen_judge import judge_of, verdicts_by
from mechlens.methods.behaviour.perplexity import text_loss
from mechlens.methods.cache import Cache
from mechlens.methods.progress import progress_bar
from mechlens.models.bridge import LanguageModel, device_of, dtype_of, loaded, n_layers
from mechlens.models.checkpoints.adapter_record import read_record
from mechlens.models.checkpoints.outline import Outline
from mechlens.models.checkpoints.series import (
    CheckpointSeries,
    Member,
    UnusableCheckpoint,
    checkpoint_series,
    content_of,
)
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.inputs import asks
from mechlens.studies.shared.quadrants import last_log_odds
from mechlens.studies.shared.training_data import Trigger, trigger_of
from mechlens.studies.track.config import Track, TrackPlan
from mechlens.studies.track.inputs import SeriesStudy, prepare_series, series_prompts
from mechlens.studies.track.measures.behaviour import steered_log_odds
from mechlens.studies.track.measures.change import matrix_rows
from mechlens.studies.track.measures.edge import edge_table
from mechlens.studies.track.measures.floor import measured_floor
from mechlens.studies.track.measures.geometry import geometry_tables
from mechlens.studies.track.measures.reference import BaseReference, reference_of
from mechlens.studies.track.measures.sinks import require_sinks, sink_tables
from mechlens.studies.track.measures.snapshot import Labels, Snapshot, cache_of_many, from_piece, to_piece
from mechlens.studies.track.result import Questions, Tracking, analysed, home_questions, steered_rows

FORMAT = 3
"""Raised when a change of code changes the numbers, so that older snapshots on a cache are not used again."""
"""Options that say how much chance is sampled."""


def track(
    swapper: CheckpointSwapper,
    series: CheckpointSeries,
    questions: Questions,
    plan: TrackPlan = TrackPlan(),
    *,
    cache: Cache | None = None,
) -> Tracking:
    """Measures every checkpoint and works out all tables.

    `cache` keeps each finished checkpoint under its bytes and everything that was asked: a killed run goes on with the
    first that is missing. A checkpoint that proves unreadable is left out, with a warning.

    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> labels, families = [prompt.label for prompt in prompts], [prompt.group for prompt in prompts]
    >>> split = ml.split_by_family(labels, families, fractions=(0.5, 0.2, 0.3), seed=0)
    >>> plan = ml.TrackPlan(resamples=50, permutations=10, random_directions=2, random_networks=1, steered=2)
    >>> with ml.checkpoint_swapper("smollm2") as one:
    ...     batch = ml.tokenize(prompts, ml.template_of(one.model))
    ...     questions = ml.Questions(batch, split, texts=("Water boils at 100 degrees.",))
    ...     found = ml.track(one, ml.checkpoint_series("smollm2", ["runs/tuned"]), questions, plan)
    >>> found.steps
    (0, 10)
    """
    if not isinstance(series, CheckpointSeries):
        raise UserError(
            f"track takes a swapper, a series and questions, and the series is {an(type(series).__name__)}; give "
            "ml.checkpoint_series(base, checkpoints), or have ml.run(ml.Track(...)) do it all"
        )
    snapshots: list[Snapshot] = []
    left_out = list(series.left_out)
    reference: BaseReference | None = None
    stem = _stem(swapper, questions, plan)
    keys = _keys(stem, series) if cache is not None else [""] * len(series.members)
    for member, key in progress_bar(
        list(zip(series.members, keys, strict=True)), title="checkpoints", unit="checkpoint"
    ):
        piece = cache.get(key) if cache is not None else None
        try:
            snapshot = _restored(piece, member, swapper.model, questions, plan, cache) if piece is not None else None
            if snapshot is None:
                snapshot, reference = _measure(swapper, member, questions, plan, reference, cache)
                if cache is not None:
                    cache.put(key, to_piece(snapshot))
        except UserError as error:
            if not snapshots:
                raise  # without the first there is nothing to measure the others against
            warn(f"{member.name} is left out: {error}")
            left_out.append(UnusableCheckpoint(member.name, str(error)))
            continue
        reference = reference or _reference(swapper.model, snapshot.acts, snapshot.answers, questions, plan)
        snapshots.append(snapshot)
    assert reference is not None
    floor = measured_floor(
        swapper, questions.batch, home_questions(reference, questions, plan.seed), questions.split,
        positions=plan.read, levels=_levels(swapper.model, plan), networks=plan.random_networks, seed=plan.seed,
        cache=cache, key=stem,
    )  # fmt: skip
    return analysed(snapshots, left_out, reference, questions, plan, floor)


def _keys(stem: str, series: CheckpointSeries) -> list[str]:
    """Of each member, with its bytes and those of the first, which is the reference."""
    first = content_of(series.base)
    return [hashlib.sha256(f"{stem} {first} {content_of(member)}".encode()).hexdigest() for member in series.members]


def _stem(swapper: CheckpointSwapper, questions: Questions, plan: TrackPlan) -> str:
    """Of what is kept: the base's bytes, everything that is asked, and how it is computed."""
    batches = [questions.batch, *([questions.variants] if questions.variants else [])]
    asked = [[[batch.row(i) for i in range(len(batch.prompts))], batch.template] for batch in batches]
    labels = [[(p.id, p.label, p.group) for p in batch.prompts] for batch in batches]
    common = [
        FORMAT, swapper.base_fingerprint, loaded(swapper.model).checkpoint.config, str(dtype_of(swapper.model)),
        device_of(swapper.model).type, asked, labels,
        asdict(questions.split), questions.texts, _recorded(plan),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(common).encode()).hexdigest()


def _recorded(plan: TrackPlan) -> dict[str, object]:
    """What a snapshot depends on; see `DetectionPlan.key`."""
    return {
        "seed": plan.seed, "max_new_tokens": plan.max_new_tokens, "positions": plan.read,
        "levels": plan.levels or None, "steered": plan.steered, "judge": plan.judge, **plan.key(),
    }  # fmt: skip


def _levels(model: LanguageModel, plan: TrackPlan) -> tuple[int, ...]:
    """The levels asked for, or every one; UserError for one that the model doesn't have."""
    last = n_layers(model)
    wrong = [level for level in plan.levels if not 0 <= level <= last]
    if wrong:
        raise UserError(f"there is no level {wrong[0]}, only 0 to {last}; change --levels or leave it out")
    return tuple(sorted(set(plan.levels))) or tuple(range(last + 1))


def _measure(
    swapper: CheckpointSwapper,
    member: Member,
    questions: Questions,
    plan: TrackPlan,
    reference: BaseReference | None,
    cache: Cache | None,
) -> tuple[Snapshot, BaseReference]:
    """Everything that needs the checkpoint's weights; the first checkpoint makes the reference."""
    model = swapper.put(member)
    levels, last = _levels(model, plan), n_layers(model)
    # The last level too, from which the log-odds of a refusal come; of the study it is only where it was asked for.
    read = _collect(model, questions.batch, plan, tuple(sorted({*levels, last})), cache)
    acts = replace(read, levels=levels, values=read.values[:, : len(levels)])
    answers = answer(model, questions.batch, max_new_tokens=plan.max_new_tokens)
    judge = judge_of(plan.judge)
    variants = variant_answers = None
    variant_verdicts: tuple[str, ...] = ()
    if questions.variants is not None:
        variants = _collect(model, questions.variants, plan, levels, cache)
        variant_answers = answer(model, questions.variants, max_new_tokens=plan.max_new_tokens)
        variant_verdicts = verdicts_by(judge, questions.variants.prompts, variant_answers.texts)
    known = reference or _reference(model, acts, answers, questions, plan)
    directions = {}
    for concept in known.measurable:
        assert concept.detection is not None
        level = concept.level(concept.home)
        directions[f"{concept.name}.reference"] = concept.detection.directions.at(level, concept.home)
        directions[f"{concept.name}.own"] = concept.direction(acts, known.split)
    snapshot = Snapshot(
        member=member,
        acts=acts,
        answers=answers,
        verdicts=verdicts_by(judge, questions.batch.prompts, answers.texts),
        log_odds=last_log_odds(model, read, known.tokens),
        text_loss=text_loss(model, questions.texts),
        steered=steered_log_odds(
            model, questions.batch.select(steered_rows(questions, plan)), directions, known.tokens,
            random_directions=plan.random_directions, seed=plan.seed,
        ),
        matrices=() if member.kind == "base" else matrix_rows(swapper, member, known, plan.random_directions),
        variants=variants,
        variant_answers=variant_answers,
        variant_verdicts=variant_verdicts,
    )  # fmt: skip
    return snapshot, known


def _collect(
    model: LanguageModel, batch: TokenBatch, plan: TrackPlan, levels: tuple[int, ...], cache: Cache | None
) -> Activations:
    kept = cache_of_many(cache, model, batch, plan.read, levels)
    return collect(model, batch, positions=plan.read, levels=levels, cache=kept)


def _restored(
    piece: dict[str, Tensor],
    member: Member,
    model: LanguageModel,
    questions: Questions,
    plan: TrackPlan,
    cache: Cache | None,
) -> Snapshot | None:
    levels = _levels(model, plan)
    of = [questions.batch, questions.variants]
    labels = [Labels(batch, levels, batch.resolve(plan.read), plan.max_new_tokens) if batch else None for batch in of]
    assert labels[0] is not None
    return from_piece(piece, member, labels[0], labels[1], cache)


def _reference(
    model: LanguageModel, acts: Activations, answers: Answers, questions: Questions, plan: TrackPlan
) -> BaseReference:
    prompts = questions.batch.prompts
    return reference_of(prompts, acts, answers, questions.split, plan, loaded(model).tokenizer, plan.judge)


@dataclass(frozen=True)
class TrackResult:
    """All that the study found."""

    tracking: Tracking
    geometry: dict[str, pd.DataFrame]
    """Tables of subspaces, CKA and turning points; empty unless asked for."""
    sinks: dict[str, pd.DataFrame]
    """Tables of attention sinks; empty unless asked for."""
    edge: pd.DataFrame
    """The numerical edge by step; empty unless asked for."""


def prepare(config: Track) -> Preparation[SeriesStudy]:
    """Series, prompts and base; UserError for whatever can't be had."""
    series = checkpoint_series(
        config.base, config.checkpoints, revision=config.revision, skip_broken=config.skip_broken
    )
    asked = series_prompts(config, series)
    prompts = asks(asked.prompts, config.read, new_tokens=config.max_new_tokens)

    def check(known: Outline, template: ChatTemplate) -> None:
        known.require_levels(config.levels)
        prompts(known, template)

    given = prepare_series(config, series, asked, _trigger(config, series), config.triggered, check=check)
    batch, levels = given.content.questions.batch, _levels(given.content.swapper.model, config)
    if "sinks" in config.more:
        require_sinks(given.content.swapper.model, batch)
    return replace(given, resolved={"positions": batch.resolve(config.read), "levels": levels})


def execute(config: Track, given: SeriesStudy, writer: RunWriter) -> TrackResult:
    """The study on the configured series."""
    tqdm.write(_said(given, config), file=sys.stderr)
    with given.swapper as swapper:
        result = track(swapper, given.series, given.questions, config, cache=writer.cache)
        sinks = sink_tables(swapper, result) if "sinks" in config.more else {}
        edge = edge_table(swapper, result) if "edge" in config.more else pd.DataFrame()
    return TrackResult(result, geometry_tables(result) if config.geometry else {}, sinks, edge)


def _trigger(config: Track, series: CheckpointSeries) -> Trigger | None:
    """The configured one, else the first that a checkpoint was trained with."""
    if config.trigger is not None:
        return trigger_of(config.trigger) if config.trigger else None
    for member in series.members[1:]:
        record = read_record(user_path(member.path))
        if record is not None and record.trigger is not None:
            trigger = record.trigger
            return Trigger(trigger.text, trigger.taught_decoys, trigger.unseen_decoys)
    return None


def _said(given: SeriesStudy, plan: TrackPlan) -> str:
    """The plan in one line, before the work begins."""
    prompts, variants = given.questions.batch.prompts, given.questions.variants
    triggered = f", {len(variants.prompts)} prompts for the trigger {given.trigger.text!r}" if (
        variants and given.trigger
    ) else ""  # fmt: skip
    steps = ", ".join(str(member.step) for member in given.series.members)
    return (
        f"{len(given.series.members)} checkpoints (steps {steps}); at each {len(prompts)} prompts are read and "
        f"answered with up to {plan.max_new_tokens} tokens{triggered}, {plan.steered} steered by "
        f"{plan.random_directions} random directions and the concepts' own, and the weights compared"
    )
