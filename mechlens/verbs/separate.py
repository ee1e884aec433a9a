"""`mechlens separate`: the separation study, recorded."""

from dataclasses import dataclass
from pathlib import Path

from mechlens.config import Separate
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.template import ChatTemplate
from mechlens.prompts.text import match_punctuation
from mechlens.records.run import Inputs
from mechlens.records.separation_report import record_separation
from mechlens.records.writer import RunWriter, open_run
from mechlens.studies.separation import SeparationPlan, separate
from mechlens.verbs.harm_sets import read_harm_sets
from mechlens.verbs.inputs import require_sampling
from mechlens.verbs.model import chosen_model, record_inputs
from mechlens.verbs.unseen import LeftOut, record_left_out


@dataclass(frozen=True)
class Prepared:
    """Everything that goes in, with the fingerprints that a rerun is held to."""

    model: LanguageModel
    template: ChatTemplate
    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    extra: tuple[Prompt, ...]
    punctuation: str
    left_out: LeftOut
    inputs: Inputs


def prepare(config: Separate) -> Prepared:
    """Prompts and model; UserError for whatever can't be had."""
    require_sampling(config)
    sets = read_harm_sets(config, [config], config.extra_harmless)
    matched = match_punctuation(sets.harmful, sets.harmless, config.punctuation)
    model, template, inputs = chosen_model(config, sets.data)
    return Prepared(
        model, template, matched.positive, matched.negative, tuple(sets.extra), matched.note, sets.left_out, inputs
    )


def run(config: Separate) -> Path:
    """The study on the configured model and prompts; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="separate", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: Separate, writer: RunWriter) -> None:
    """The study itself, written to an open run."""
    record_inputs(writer, prepared.model, prepared.inputs)
    record_left_out(writer, prepared.left_out)
    writer.prompts([*prepared.harmful, *prepared.harmless, *prepared.extra])
    plan = SeparationPlan(
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        fractions=(0.5, 0.2, 0.3),
        n_resamples=config.resamples,
        n_permutations=config.permutations,
        n_random=config.random_directions,
    )
    result = separate(
        prepared.model,
        prepared.harmful,
        prepared.harmless,
        prepared.extra,
        plan,
        template=prepared.template,
        shelf=writer.shelf,
    )
    record_separation(writer, result, prepared.model, prepared.punctuation)
