"""`mechlens direction`: the direction of a concept given as two prompt sources, recorded."""

from dataclasses import dataclass
from pathlib import Path

from mechlens.methods.probing.detect import DetectionPlan
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.text import match_punctuation
from mechlens.runs.run import Inputs
from mechlens.runs.writer import RunWriter, open_run
from mechlens.studies.direction.config import FindDirection
from mechlens.studies.direction.report import record_concept
from mechlens.studies.direction.study import find_concept
from mechlens.studies.shared.inputs import data_inputs, distinct_ids, read_prompts, refuse_shared, require_sampling
from mechlens.studies.shared.model import chosen_model, record_inputs
from mechlens.studies.shared.training_data import LeftOut, leave_out_trained, record_left_out


@dataclass(frozen=True)
class Prepared:
    """Everything that goes in, with the fingerprints that a rerun is held to."""

    model: LanguageModel
    template: ChatTemplate
    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    punctuation: str
    left_out: LeftOut
    inputs: Inputs


def prepare(config: FindDirection) -> Prepared:
    """Prompts and model; UserError for whatever can't be had."""
    require_sampling(config)
    positive, negative = distinct_ids(
        positive=read_prompts(config.positive, "positive", config),
        negative=read_prompts(config.negative, "negative", config),
    )
    (positive, negative), left_out = leave_out_trained([config], {"positive": positive, "negative": negative})
    sets = {"positive": (config.positive, positive), "negative": (config.negative, negative)}
    refuse_shared(sets["positive"], sets["negative"])
    data = data_inputs(sets)
    matched = match_punctuation(positive, negative, config.punctuation)
    model, template, inputs = chosen_model(config, data)
    return Prepared(model, template, matched.positive, matched.negative, matched.note, left_out, inputs)


def run(config: FindDirection) -> Path:
    """Finds and tests the direction; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="direction", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: FindDirection, writer: RunWriter) -> None:
    """The study itself, written to an open run."""
    record_inputs(writer, prepared.model, prepared.inputs)
    record_left_out(writer, prepared.left_out)
    writer.prompts([*prepared.positive, *prepared.negative])
    plan = DetectionPlan(config.seed, config.resamples, config.permutations, config.random_directions)
    result = find_concept(
        prepared.model,
        prepared.positive,
        prepared.negative,
        config.positions,
        plan,
        template=prepared.template,
        shelf=writer.shelf,
    )
    record_concept(writer, result, prepared.model, (config.positive, config.negative), prepared.punctuation)
