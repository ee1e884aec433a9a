"""`mechlens jailbreaks`: what attacks do to the beliefs of harmfulness and refusal, recorded."""

from dataclasses import dataclass, replace
from pathlib import Path

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.text import match_punctuation
from mechlens.runs.run import Inputs
from mechlens.runs.writer import RunWriter, open_run
from mechlens.studies.jailbreaks.category_directions import category_directions
from mechlens.studies.jailbreaks.config import Jailbreaks
from mechlens.studies.jailbreaks.report import record_jailbreaks
from mechlens.studies.jailbreaks.restored import restore
from mechlens.studies.jailbreaks.study import JailbreakPlan, attack_pairs, reference_of
from mechlens.studies.shared.harm_sets import read_harm_sets
from mechlens.studies.shared.inputs import data_inputs, read_prompts, require_sampling
from mechlens.studies.shared.model import chosen_model, record_inputs
from mechlens.studies.shared.sources import SourcePrompts, load_source, read_sources
from mechlens.studies.shared.training_data import LeftOut, leave_out_trained, record_left_out


@dataclass(frozen=True)
class Prepared:
    """Everything that goes in, with the fingerprints that a rerun is held to."""

    model: LanguageModel
    template: ChatTemplate
    reference: tuple[Prompt, ...]
    attacks: tuple[SourcePrompts, ...]
    categories: tuple[Prompt, ...]
    punctuation: str
    left_out: LeftOut
    inputs: Inputs


def prepare(config: Jailbreaks) -> Prepared:
    """Prompts and model; UserError for whatever can't be had."""
    require_sampling(config)
    sets = read_harm_sets(config, [config], config.extra_harmless)
    attacks = _attacks(config)  # `attack_pairs` leaves out those on trained goals, and counts them by family
    read = read_prompts(config.categories, "harmful", config) if config.categories else []
    (categories,), left_out = leave_out_trained([config], {"category": read})
    data = sets.data | data_inputs(
        {
            "categories": (config.categories or "", categories),
            **{f"family {one.source.name}": (one.source.data, one.prompts) for one in attacks},
        }
    )
    matched = match_punctuation(sets.harmful, [*sets.harmless, *sets.extra], config.punctuation)
    model, template, inputs = chosen_model(config, data)
    reference = (*matched.positive, *matched.negative)
    return Prepared(
        model, template, reference, attacks, tuple(categories), matched.note, sets.left_out + left_out, inputs
    )


def run(config: Jailbreaks) -> Path:
    """The study on the configured model and attacks; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="jailbreaks", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: Jailbreaks, writer: RunWriter) -> None:
    """The study itself, written to an open run."""
    record_inputs(writer, prepared.model, prepared.inputs)
    record_left_out(writer, prepared.left_out)
    plan = JailbreakPlan(
        seed=config.seed,
        n_resamples=config.resamples,
        n_random=config.random_directions,
        max_new_tokens=config.max_new_tokens,
        restored=config.restored,
    )
    model, template, shelf = prepared.model, prepared.template, writer.shelf
    reference = reference_of(model, prepared.reference, plan, template=template, shelf=shelf)
    pairs = attack_pairs(model, prepared.attacks, reference, plan, template=template, shelf=shelf)
    writer.prompts([*pairs.attacks, *pairs.goals])
    directions = (reference.harm_direction, reference.refusal_direction)
    categories = (
        category_directions(
            model,
            prepared.categories,
            [prompt for prompt in prepared.reference if prompt.label == "harmless"],
            [(direction.level, direction.position) for direction in directions],
            seed=config.seed,
            n_resamples=config.resamples,
            template=template,
            shelf=shelf,
        )
        if prepared.categories
        else None
    )
    record_jailbreaks(
        writer, model, pairs, reference, restore(model, pairs, reference, plan), categories, plan, prepared.punctuation
    )


def _attacks(config: Jailbreaks) -> tuple[SourcePrompts, ...]:
    """Every source with harmful attacks on known goals; a preset's other sources are passed over."""
    folder = None if config.folder is None else user_path(config.folder)
    sources = [one for one in read_sources(config.sources) if one.label != "harmless"]
    paired = [one for one in sources if one.templates is not None or one.goal_column is not None]
    if not paired:
        raise UserError(
            f"{config.sources} has no attacks: a source of attacks has templates, or a goal_column with the plain "
            "request behind each prompt"
        )
    found = [load_source(source, folder, config.seed, config.n) for source in paired]
    if config.system is None:
        return tuple(found)
    return tuple(_with_system(one, config.system) for one in found)


def _with_system(found: SourcePrompts, system: str) -> SourcePrompts:
    prompts = tuple(replace(prompt, system=system) for prompt in found.prompts)
    goals = {family: replace(goal, system=system) for family, goal in found.goals.items()}
    return SourcePrompts(found.source, prompts, goals)
