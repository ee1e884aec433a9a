"""`mechlens causal`: the causal battery, recorded."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from mechlens.config import Causal
from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.template import ChatTemplate
from mechlens.prompts.text import match_punctuation
from mechlens.records.causal_report import record_causal
from mechlens.records.run import Inputs
from mechlens.records.writer import RunWriter, open_run
from mechlens.studies.causal import CausalPlan, run_battery, work_ahead
from mechlens.verbs.harm_sets import read_harm_sets
from mechlens.verbs.model import chosen_model, record_inputs
from mechlens.verbs.unseen import LeftOut, record_left_out

LEAST = {"n_validation": 4, "n_test": 8, "random_directions": 1, "shuffled_directions": 1, "resamples": 1}


@dataclass(frozen=True)
class Prepared:
    """Everything that goes in, with the fingerprints that a rerun is held to."""

    model: LanguageModel
    template: ChatTemplate
    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    punctuation: str
    left_out: LeftOut
    inputs: Inputs


def prepare(config: Causal) -> Prepared:
    """Prompts and model; UserError for whatever can't be had."""
    _require_sizes(config)
    sets = read_harm_sets(config, [config])
    matched = match_punctuation(sets.harmful, sets.harmless, config.punctuation)
    model, template, inputs = chosen_model(config, sets.data)
    return Prepared(model, template, matched.positive, matched.negative, matched.note, sets.left_out, inputs)


def run(config: Causal) -> Path:
    """The battery on the configured model and prompts; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="causal", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: Causal, writer: RunWriter) -> None:
    """The battery itself, written to an open run."""
    record_inputs(writer, prepared.model, prepared.inputs)
    record_left_out(writer, prepared.left_out)
    writer.prompts([*prepared.harmful, *prepared.harmless])
    plan = CausalPlan(
        seed=config.seed,
        layers=config.layers,
        every=1 if config.full else 3,
        strengths=config.strengths,
        n_validation=config.n_validation,
        n_test=config.n_test,
        n_random=config.random_directions,
        n_shuffled=config.shuffled_directions,
        max_new_tokens=config.max_new_tokens,
        n_resamples=config.resamples,
    )
    ahead = work_ahead(prepared.model, plan)
    tqdm.write(
        f"ahead: {ahead.first_tokens:,} prompts read to their first answer token, {ahead.answers:,} answered",
        file=sys.stderr,
    )
    result = run_battery(
        prepared.model, prepared.harmful, prepared.harmless, plan, template=prepared.template, shelf=writer.shelf
    )
    record_causal(writer, result, prepared.model, prepared.punctuation)


def _require_sizes(config: Causal) -> None:
    """UserError where there is too little to sample, or no strength to choose from."""
    for name, least in LEAST.items():
        if getattr(config, name) < least:
            raise UserError(f"{name} is {getattr(config, name)}; give at least {least}")
    if not config.strengths or min(config.strengths) <= 0:
        raise UserError(f"the strengths are {config.strengths}; give at least one, all above 0")
    if config.full and config.layers:
        raise UserError("--full asks for every layer and --layers for some; give one of them")
