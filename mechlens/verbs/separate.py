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
from mechlens.verbs.inputs import (
    data_inputs,
    distinct_ids,
    read_prompts,
    refuse_shared,
    require_sampling,
    without_repeats,
)
from mechlens.verbs.model import chosen_model, record_inputs
from mechlens.verbs.unseen import LeftOut, leave_out_trained, record_left_out


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
    extra_source = config.extra_harmless or ""
    harmful, harmless, extra = distinct_ids(
        harmful=read_prompts(config.harmful, "harmful", config),
        harmless=read_prompts(config.harmless, "harmless", config),
        extra=read_prompts(extra_source, "harmless", config) if extra_source else [],
    )
    (harmful, harmless, extra), left_out = leave_out_trained(
        config, {"harmful": harmful, "harmless": harmless, "extra harmless": extra}
    )
    sets = {"harmful": (config.harmful, harmful), "harmless": (config.harmless, harmless)}
    refuse_shared(sets["harmful"], sets["harmless"])
    refuse_shared(sets["harmful"], (extra_source, extra))
    extra = without_repeats(extra, harmless, extra_source)
    data = data_inputs({**sets, "extra_harmless": (extra_source, extra)})
    matched = match_punctuation(harmful, harmless, config.punctuation)
    model, template, inputs = chosen_model(config, data)
    return Prepared(model, template, matched.positive, matched.negative, tuple(extra), matched.note, left_out, inputs)


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
