"""`mechlens jailbreaks`: what attacks do to the beliefs of harmfulness and refusal."""

from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.methods.cache import Cache
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.text import match_punctuation
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Preparation
from mechlens.studies.jailbreaks.category_directions import CategoryDirections, category_directions, category_refusals
from mechlens.studies.jailbreaks.config import JailbreakPlan, Jailbreaks
from mechlens.studies.jailbreaks.pairs import (
    OrdinaryPrompts,
    Pairs,
    attack_pairs,
    family_estimates,
    family_verdict,
    pair_table,
    reference_of,
)
from mechlens.studies.jailbreaks.restored import RestoredComponents, restore
from mechlens.studies.shared.harm_sets import read_harm_sets
from mechlens.studies.shared.inputs import asks, chosen_model, data_inputs, prepared, read_prompts
from mechlens.studies.shared.sources import SourcePrompts, load_source, read_sources, require_files
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
    attacks: pd.DataFrame
    """See `pair_table`."""

    @cached_property
    def by_family(self) -> dict[str, dict[str, Estimate]]:
        """See `family_estimates`."""
        return family_estimates(self.attacks, self.plan)

    @property
    def verdicts(self) -> dict[str, str]:
        """What each family of attacks does, in words."""
        return {family: family_verdict(measures) for family, measures in self.by_family.items()}

    def metrics(self) -> dict[str, Estimate]:
        """Every headline number by its name in run.json."""
        measured = self.by_family.items()
        numbers = {f"{name}.{family}": value for family, measures in measured for name, value in measures.items()}
        return numbers | (self.categories.means if self.categories else {})

    def families(self) -> pd.DataFrame:
        """One row per family and measure, with the family's verdict."""
        rows = [
            {"family": family, "verdict": self.verdicts[family], "measure": name, **estimate.row()}
            for family, measures in self.by_family.items()
            for name, estimate in measures.items()
        ]
        return pd.DataFrame(rows)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        tables = {
            "pairs": self.attacks,
            "families": self.families(),
            "left_out": self.pairs.left_out,
            "answers": self.pairs.attack_judged.table(),
        }
        if self.restored is not None:
            tables["restored"] = self.restored.table(self.plan)
        if self.categories is not None:
            tables["category_cosines"] = self.categories.pairs
            tables["category_reliability"] = self.categories.reliability
            tables["category_transfer"] = self.categories.transfer
        return tables

    def artifacts(self) -> dict[str, object]:
        """Directions and centroids of harmfulness and refusal."""
        return {
            "direction_harm": self.reference.harm_direction,
            "direction_refusal": self.reference.refusal_direction,
            "centroids_harm": self.reference.harm,
            "centroids_refusal": self.reference.refusal,
        }


def prepare(config: Jailbreaks) -> Preparation[AttackSets]:
    """Prompts and model; UserError for whatever can't be had."""
    sets = read_harm_sets(config, [config], config.extra_harmless)
    attacks = _attacks(config)  # `attack_pairs` leaves out those on trained goals, and counts them by family
    read = read_prompts(config.categories, "harmful", config, both_in_data=False) if config.categories else []
    (categories,), left_out = leave_out_trained([config], {"category": read})
    data = sets.data | data_inputs(
        {
            "categories": (config.categories or "", categories),
            **{f"family {source.source.name}": (source.source.data, source.prompts) for source in attacks},
        }
    )
    matched = match_punctuation(sets.harmful, [*sets.harmless, *sets.extra], config.punctuation)
    reference = (*matched.positive, *matched.negative)
    attacked = [prompt for family in attacks for prompt in family.prompts]
    chosen = chosen_model(config, asks([*reference, *attacked, *categories], new_tokens=config.max_new_tokens))
    content = AttackSets(*chosen, reference, attacks, tuple(categories), matched.note)
    return prepared(content, chosen.model, chosen.inputs(data), (), sets.left_out + left_out)


def execute(config: Jailbreaks, given: AttackSets, writer: RunWriter) -> JailbreakResult:
    """The study on the configured model and attacks."""
    model, template, cache = given.model, given.template, writer.cache
    reference = reference_of(model, given.reference, config, template=template, cache=cache)
    pairs = attack_pairs(model, given.attacks, reference, config, template=template, cache=cache)
    writer.prompts([*pairs.attacks, *pairs.goals])
    categories = _categories(config, given, reference, cache) if given.categories else None
    restored = restore(model, pairs, reference, config)
    return JailbreakResult(pairs, reference, restored, categories, config, pair_table(model, pairs, reference))


def _categories(config: Jailbreaks, given: AttackSets, reference: OrdinaryPrompts, cache: Cache) -> CategoryDirections:
    """Directions of harmfulness by category, and of refusal where enough of them are refused."""
    harmless = [prompt for prompt in given.reference if prompt.label == "harmless"]
    harm, refusal = (
        (direction.level, direction.position) for direction in (reference.harm_direction, reference.refusal_direction)
    )
    asked, template = (given.model, given.categories, harmless), given.template
    found = category_directions(*asked, [harm], seed=config.seed, template=template, cache=cache)
    try:
        refusals = category_refusals(*asked, refusal, config, seed=config.seed, template=template, cache=cache)
        return found.and_refusals(refusals)
    except UserError as error:
        return replace(found, no_refusals=str(error))


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
    require_files(paired, config.sources, folder)
    found = [load_source(source, folder, config.seed, config.n) for source in paired]
    if config.system is None:
        return tuple(found)
    return tuple(_with_system(one, config.system) for one in found)


def _with_system(given: SourcePrompts, system: str) -> SourcePrompts:
    prompts = tuple(replace(prompt, system=system) for prompt in given.prompts)
    goals = {family: replace(goal, system=system) for family, goal in given.goals.items()}
    return SourcePrompts(given.source, prompts, goals)
