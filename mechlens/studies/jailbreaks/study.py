"""`mechlens jailbreaks`: what attacks do to the beliefs of harmfulness and refusal."""

from dataclasses import dataclass, replace

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.text import match_punctuation
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Preparation
from mechlens.studies.jailbreaks.category_directions import CategoryDirections, category_directions
from mechlens.studies.jailbreaks.config import Jailbreaks
from mechlens.studies.jailbreaks.pairs import JailbreakPlan, OrdinaryPrompts, Pairs, attack_pairs, reference_of
from mechlens.studies.jailbreaks.restored import RestoredComponents, restore
from mechlens.studies.shared.harm_sets import read_harm_sets
from mechlens.studies.shared.inputs import data_inputs, read_prompts, require_sampling
from mechlens.studies.shared.model import chosen_model, prepared
from mechlens.studies.shared.sources import SourcePrompts, load_source, read_sources
from mechlens.studies.shared.training_data import leave_out_trained


@dataclass(frozen=True)
class AttackSets:
    """A model, the attacks on it and the prompts that they are measured against."""

    model: LanguageModel
    template: ChatTemplate
    reference: tuple[Prompt, ...]
    attacks: tuple[SourcePrompts, ...]
    categories: tuple[Prompt, ...]
    punctuation: str


@dataclass(frozen=True)
class JailbreakResult:
    """All that the study found."""

    pairs: Pairs
    reference: OrdinaryPrompts
    restored: RestoredComponents | None
    categories: CategoryDirections | None
    plan: JailbreakPlan


def prepare(config: Jailbreaks) -> Preparation[AttackSets]:
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
    chosen = chosen_model(config)
    reference = (*matched.positive, *matched.negative)
    content = AttackSets(*chosen, reference, attacks, tuple(categories), matched.note)
    return prepared(content, chosen.model, chosen.inputs(data), (), sets.left_out + left_out)


def execute(config: Jailbreaks, given: AttackSets, writer: RunWriter) -> JailbreakResult:
    """The study on the configured model and attacks."""
    plan = JailbreakPlan(
        seed=config.seed,
        n_resamples=config.resamples,
        n_random=config.random_directions,
        max_new_tokens=config.max_new_tokens,
        restored=config.restored,
        judge=config.judge,
    )
    model, template, cache = given.model, given.template, writer.cache
    reference = reference_of(model, given.reference, plan, template=template, cache=cache)
    pairs = attack_pairs(model, given.attacks, reference, plan, template=template, cache=cache)
    writer.prompts([*pairs.attacks, *pairs.goals])
    directions = (reference.harm_direction, reference.refusal_direction)
    categories = (
        category_directions(
            model,
            given.categories,
            [prompt for prompt in given.reference if prompt.label == "harmless"],
            [(direction.level, direction.position) for direction in directions],
            seed=config.seed,
            n_resamples=config.resamples,
            template=template,
            cache=cache,
        )
        if given.categories
        else None
    )
    return JailbreakResult(pairs, reference, restore(model, pairs, reference, plan), categories, plan)


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
