"""`mechlens patch`: activation patching on matched pairs, recorded."""

from dataclasses import dataclass
from pathlib import Path

from mechlens.methods.patching.metrics import Metric, RefusalLogOdds
from mechlens.methods.patching.plan import PatchPlan
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.pairs import load_pairs
from mechlens.prompts.prompt import PromptPair
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.run import Inputs
from mechlens.runs.writer import RunWriter, open_run
from mechlens.studies.patch.config import Patch
from mechlens.studies.patch.report import record_path
from mechlens.studies.patch.study import find_pairs, trace
from mechlens.studies.shared.inputs import data_inputs
from mechlens.studies.shared.model import chosen_model, record_inputs
from mechlens.studies.shared.training_data import LeftOut, leave_out_trained_pairs, record_left_out


@dataclass(frozen=True)
class Prepared:
    """Everything that goes in, with the fingerprints that a rerun is held to."""

    model: LanguageModel
    template: ChatTemplate
    pairs: tuple[PromptPair, ...]
    left_out: LeftOut
    inputs: Inputs


def prepare(config: Patch) -> Prepared:
    """Pairs and model; UserError for whatever can't be had."""
    pairs = load_pairs(config.pairs, sample=config.candidates, seed=config.seed)
    pairs, left_out = leave_out_trained_pairs(config, pairs)
    sides = [side for pair in pairs for side in (pair.clean, pair.corrupt)]
    model, template, inputs = chosen_model(config, data_inputs({"pairs": (config.pairs, sides)}))
    return Prepared(model, template, tuple(pairs), left_out, inputs)


def run(config: Patch) -> Path:
    """Patches and records; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="patch", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: Patch, writer: RunWriter) -> None:
    """The study itself, written to an open run."""
    record_inputs(writer, prepared.model, prepared.inputs)
    record_left_out(writer, prepared.left_out)
    writer.prompts([side for pair in prepared.pairs for side in (pair.clean, pair.corrupt)])
    chosen = find_pairs(
        prepared.model,
        prepared.pairs,
        config.n,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        template=prepared.template,
        shelf=writer.shelf,
    )
    metric: Metric = RefusalLogOdds(chosen.first_token.tokens.ids)
    plan = PatchPlan(config.site, positions=config.positions, layers=config.layers or None)
    result = trace(
        prepared.model,
        chosen,
        plan,
        metric=metric,
        template=prepared.template,
        shelf=writer.shelf,
        seed=config.seed,
    )
    record_path(writer, result, prepared.model)
