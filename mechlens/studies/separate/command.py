"""`mechlens separate`: the separation study, recorded."""

from pathlib import Path

from mechlens.runs.writer import RunWriter, open_run
from mechlens.studies.separate.config import Separate
from mechlens.studies.separate.report import record_separation
from mechlens.studies.separate.study import SeparationPlan, separate
from mechlens.studies.shared.harm_sets import Prepared, prepare_harm_study
from mechlens.studies.shared.inputs import require_sampling


def prepare(config: Separate) -> Prepared:
    """Prompts and model; UserError for whatever can't be had."""
    require_sampling(config)
    return prepare_harm_study(config, config, config.extra_harmless)


def run(config: Separate) -> Path:
    """The study on the configured model and prompts; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="separate", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: Separate, writer: RunWriter) -> None:
    """The study itself, written to an open run."""
    prepared.record(writer)
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
