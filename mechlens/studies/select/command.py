"""`mechlens select`: the selection of one refusal direction, recorded."""

from pathlib import Path

from mechlens.errors import UserError
from mechlens.methods.steering.candidates import SelectionRule
from mechlens.runs.writer import RunWriter, open_run
from mechlens.studies.select.config import Select
from mechlens.studies.select.report import record_selection
from mechlens.studies.select.study import SelectionPlan, select_direction
from mechlens.studies.shared.harm_sets import Prepared, prepare_harm_study
from mechlens.studies.shared.inputs import require_sampling


def prepare(config: Select) -> Prepared:
    """Prompts and model; UserError for whatever can't be had."""
    require_sampling(config, ("resamples", "random_directions"))
    if not 0 <= config.last_layers < 1:
        raise UserError(
            f"last_layers is {config.last_layers}; give a share of the layers from 0 to below 1, such as 0.2"
        )
    return prepare_harm_study(config, config)


def run(config: Select) -> Path:
    """Selects and records; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="select", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: Select, writer: RunWriter) -> None:
    """The study itself, written to an open run."""
    prepared.record(writer)
    plan = SelectionPlan(
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        fractions=(0.5, 0.2, 0.3),
        rule=SelectionRule(config.last_layers, config.highest_kl, config.least_induce),
        n_resamples=config.resamples,
        n_random=config.random_directions,
    )
    result = select_direction(
        prepared.model,
        prepared.harmful,
        prepared.harmless,
        plan,
        template=prepared.template,
        shelf=writer.shelf,
    )
    record_selection(writer, result, prepared.model, prepared.punctuation)
