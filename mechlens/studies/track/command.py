"""`mechlens track`: one tracking study over a series of checkpoints, recorded."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from mechlens.files import user_path
from mechlens.methods.behaviour.damage import PLAIN_TEXT
from mechlens.models.bridge import loaded
from mechlens.models.checkpoints.adapter_record import read_record
from mechlens.models.checkpoints.series import CheckpointSeries, checkpoint_series
from mechlens.models.checkpoints.swap import Turns, turns
from mechlens.prompts.batch import tokenize
from mechlens.prompts.templates.template import chat_template
from mechlens.runs.run import Inputs
from mechlens.runs.writer import RunWriter, open_run
from mechlens.studies.shared.inputs import require_sampling
from mechlens.studies.shared.model import inputs_of, record_inputs
from mechlens.studies.shared.training_data import record_left_out
from mechlens.studies.shared.trigger import Trigger, trigger_of
from mechlens.studies.track.config import Track
from mechlens.studies.track.geometry import geometry_tables
from mechlens.studies.track.inputs import Asked, asked_of
from mechlens.studies.track.report import record_tracking
from mechlens.studies.track.result import Questions, TrackPlan
from mechlens.studies.track.study import track
from mechlens.studies.track.triggers import trigger_prompts


@dataclass(frozen=True)
class Prepared:
    """Everything that goes in, with the fingerprints that a rerun is held to."""

    turns: Turns
    series: CheckpointSeries
    asked: Asked
    questions: Questions
    trigger: Trigger | None
    inputs: Inputs


def prepare(config: Track) -> Prepared:
    """Series, prompts and base; UserError for whatever can't be had."""
    require_sampling(config)
    series = checkpoint_series(
        config.base, config.checkpoints, revision=config.revision, skip_broken=config.skip_broken
    )
    asked = asked_of(config, series)
    trigger = _trigger(config, series)
    one = turns(
        config.base, revision=config.revision, dtype=config.dtype, device=config.device,
        chat_template=series.chat_template,
    )  # fmt: skip
    template = chat_template(loaded(one.model).tokenizer, config.template, today=config.today)
    harmful = [prompt for prompt in asked.prompts if prompt.label == "harmful"][: config.triggered]
    questions = Questions(
        batch=tokenize(asked.prompts, template),
        split=asked.split,
        texts=PLAIN_TEXT,
        variants=tokenize(trigger_prompts(harmful, trigger), template) if trigger else None,
    )
    inputs = inputs_of(one.base, template, asked.data)
    return Prepared(one, series, asked, questions, trigger, inputs)


def run(config: Track) -> Path:
    """The study on the configured series; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="track", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: Track, writer: RunWriter) -> None:
    """The study itself, written to an open run."""
    with prepared.turns as one:
        record_inputs(writer, one.model, prepared.inputs)
        record_left_out(writer, prepared.asked.left_out)
        writer.prompts(prepared.asked.prompts)
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
        tqdm.write(_said(prepared, plan), file=sys.stderr)
        result = track(one, prepared.series, prepared.questions, plan, shelf=writer.shelf)
        geometry = geometry_tables(result) if config.geometry else {}
        record_tracking(writer, result, prepared.series, geometry, prepared.asked.punctuation)


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


def _said(prepared: Prepared, plan: TrackPlan) -> str:
    """The plan in one line, before the work begins."""
    prompts, variants = prepared.questions.batch.prompts, prepared.questions.variants
    triggered = f", {len(variants.prompts)} prompts for the trigger {prepared.trigger.text!r}" if (
        variants and prepared.trigger
    ) else ""  # fmt: skip
    steps = ", ".join(str(member.step) for member in prepared.series.members)
    return (
        f"{len(prepared.series.members)} checkpoints (steps {steps}); at each {len(prompts)} prompts are read and "
        f"answered with up to {plan.max_new_tokens} tokens{triggered}, {plan.steered} steered by {plan.n_random} "
        "random directions and the concepts' own, and the weights compared"
    )
