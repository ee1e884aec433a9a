"""`mechlens causal`: the causal battery, recorded."""

import sys
from pathlib import Path

from tqdm.auto import tqdm

from mechlens.errors import UserError
from mechlens.runs.writer import RunWriter, open_run
from mechlens.studies.causal.config import Causal
from mechlens.studies.causal.report import record_causal
from mechlens.studies.causal.study import CausalPlan, run_battery, work_ahead
from mechlens.studies.shared.harm_sets import Prepared, prepare_harm_study
from mechlens.studies.shared.inputs import MOST_DRAWS

LEAST = {"n_validation": 4, "n_test": 8, "random_directions": 1, "shuffled_directions": 1, "resamples": 1}


def prepare(config: Causal) -> Prepared:
    """Prompts and model; UserError for whatever can't be had."""
    _require_sizes(config)
    return prepare_harm_study(config, config)


def run(config: Causal) -> Path:
    """The battery on the configured model and prompts; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="causal", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: Causal, writer: RunWriter) -> None:
    """The battery itself, written to an open run."""
    prepared.record(writer)
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
        if getattr(config, name) > MOST_DRAWS:
            raise UserError(f"{name} is {getattr(config, name)}; give at most {MOST_DRAWS}")
    if not config.strengths or min(config.strengths) <= 0:
        raise UserError(f"the strengths are {config.strengths}; give at least one, all above 0")
    if config.full and config.layers:
        raise UserError("--full asks for every layer and --layers for some; give one of them")
