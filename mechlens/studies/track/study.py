"""`mechlens track`: one study over a series of checkpoints."""

import sys
from dataclasses import dataclass

import pandas as pd
from tqdm.auto import tqdm

from mechlens.files import user_path
from mechlens.models.checkpoints.adapter_record import read_record
from mechlens.models.checkpoints.series import CheckpointSeries, checkpoint_series
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Prepared
from mechlens.studies.shared.inputs import require_sampling
from mechlens.studies.shared.trigger import Trigger, trigger_of
from mechlens.studies.track.config import Track
from mechlens.studies.track.geometry import geometry_tables
from mechlens.studies.track.inputs import SeriesStudy, asked_of, prepare_series
from mechlens.studies.track.result import Tracking, TrackPlan
from mechlens.studies.track.tracking import track


@dataclass(frozen=True)
class Tracked:
    """All that the study found."""

    tracking: Tracking
    geometry: dict[str, pd.DataFrame]
    """Tables of subspaces, CKA and turning points; empty unless asked for."""


def prepare(config: Track) -> Prepared[SeriesStudy]:
    """Series, prompts and base; UserError for whatever can't be had."""
    require_sampling(config)
    series = checkpoint_series(
        config.base, config.checkpoints, revision=config.revision, skip_broken=config.skip_broken
    )
    asked = asked_of(config, series)
    return prepare_series(config, series, asked, _trigger(config, series), config.triggered)


def execute(config: Track, given: SeriesStudy, writer: RunWriter) -> Tracked:
    """The study on the configured series."""
    plan = TrackPlan(
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        positions=tuple(dict.fromkeys(("inst", *(p for p in config.positions if p != "last"), "last"))),
        levels=config.levels or None,
        steered=config.steered,
        n_resamples=config.resamples,
        n_permutations=config.permutations,
        n_random=config.random_directions,
    )
    tqdm.write(_said(given, plan), file=sys.stderr)
    with given.turns as one:
        result = track(one, given.series, given.questions, plan, shelf=writer.shelf)
    return Tracked(result, geometry_tables(result) if config.geometry else {})


def _trigger(config: Track, series: CheckpointSeries) -> Trigger | None:
    """The configured one, else the first that a checkpoint was trained with."""
    if config.trigger is not None:
        return trigger_of(config.trigger) if config.trigger else None
    for member in series.members[1:]:
        record = read_record(user_path(member.path))
        if record is not None and record.trigger is not None:
            found = record.trigger
            return Trigger(found.text, found.taught_decoys, found.unseen_decoys)
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
        f"answered with up to {plan.max_new_tokens} tokens{triggered}, {plan.steered} steered by {plan.n_random} "
        "random directions and the concepts' own, and the weights compared"
    )
