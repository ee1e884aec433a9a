"""The harmful and the harmless prompts of a study: read, told apart by id, checked against each other and unseen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.text import MatchedPrompts, match_punctuation
from mechlens.settings import ModelChoice
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.inputs import (
    PromptChoice,
    asks,
    chosen_model,
    data_inputs,
    distinct_ids,
    prepared,
    read_prompts,
    refuse_shared,
    without_repeats,
)
from mechlens.studies.shared.likely_pairs import BY_COLUMN, warn_of_twins
from mechlens.studies.shared.sources import wrapped
from mechlens.studies.shared.training_data import LeftOut, leave_out_trained


@runtime_checkable
class HarmChoice(PromptChoice, Protocol):
    """A study's settings that name both classes."""

    @property
    def harmful(self) -> str:
        """Where the harmful prompts come from."""

    @property
    def harmless(self) -> str:
        """Where the harmless prompts come from."""

    @property
    def punctuation(self) -> Literal["match", "keep", "strip"]:
        """What becomes of final punctuation."""


class HarmSets(NamedTuple):
    """Both classes, and further harmless prompts where a study takes them."""

    harmful: list[Prompt]
    harmless: list[Prompt]
    extra: list[Prompt]
    left_out: LeftOut
    data: dict[str, str]
    """Fingerprint of every set."""


def read_harm_sets(
    config: HarmChoice, models: Sequence[ModelChoice], extra_source: str | None = None, templates: str | None = None
) -> HarmSets:
    """The prompts as configured, each once, under ids that don't clash, without what a model was trained on.

    `templates` is a file of templates that they are then put into, those of both classes alike.
    UserError where a prompt stands in both classes, or nothing is left of a set.
    """
    read = distinct_ids(
        harmful=read_prompts(config.harmful, "harmful", config),
        harmless=read_prompts(config.harmless, "harmless", config),
        extra=read_prompts(extra_source, "harmless", config, both_in_data=False) if extra_source else [],
    )
    names = ("harmful", "harmless", "extra harmless")
    (harmful, harmless, extra), left_out = leave_out_trained(models, dict(zip(names, read, strict=True)))
    warn_of_twins(read[0], read[1], BY_COLUMN)
    named = extra_source or ""
    refuse_shared((config.harmful, harmful), (config.harmless, harmless))
    refuse_shared((config.harmful, harmful), (named, extra))
    extra = without_repeats(extra, harmless, named)
    if templates is not None:
        harmful, harmless, extra = (wrapped(prompts, templates, config.seed) for prompts in (harmful, harmless, extra))
    sets = {
        "harmful": (config.harmful, harmful),
        "harmless": (config.harmless, harmless),
        "extra_harmless": (named, extra),
    }
    return HarmSets(harmful, harmless, extra, left_out, data_inputs(sets))


@dataclass(frozen=True)
class ContrastSets:
    """A model, and the prompts of two classes that are contrasted in it."""

    model: LanguageModel
    template: ChatTemplate
    positive: tuple[Prompt, ...]
    """Harmful ones, or those that have the concept."""
    negative: tuple[Prompt, ...]
    extra: tuple[Prompt, ...]
    """Further negative prompts, as they are."""
    punctuation: str
    """What became of final punctuation, in words."""


def labelled(harmful: Prompts, harmless: Prompts, extra_harmless: Prompts = ()) -> list[Prompt]:
    """All prompts with their class; refuses an empty class and ids that clash."""
    sides = {
        name: as_prompts(given, name=name, label=name) for name, given in (("harmful", harmful), ("harmless", harmless))
    }
    for name, members in sides.items():
        if not members:
            raise UserError(f"there are no {name} prompts; the study contrasts two classes, so give both")
    extra = as_prompts(extra_harmless, name="extra", label="harmless")
    prompts = [*sides["harmful"], *sides["harmless"], *extra]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise UserError(f"two prompts have the id {prompt.id!r}; ids must be unique over all sets of a study")
        seen.add(prompt.id)
    return prompts


def prepare_harm_study(
    config: HarmChoice,
    model: ModelChoice,
    extra_source: str | None = None,
    templates: str | None = None,
    *,
    new_tokens: int,
    layers: tuple[int, ...] = (),
    least: int = 1,
) -> Preparation[ContrastSets]:
    """Prompts, model and template of a study of both classes; UserError for whatever can't be had."""
    sets, matched = read_matched_sets(config, model, extra_source, templates, least=least)
    prompts = (*matched.positive, *matched.negative, *sets.extra)
    chosen = chosen_model(model, asks(prompts, layers=layers, new_tokens=new_tokens))
    content = ContrastSets(*chosen, matched.positive, matched.negative, tuple(sets.extra), matched.note)
    return prepared(content, chosen.model, chosen.inputs(sets.data), prompts, sets.left_out)


def read_matched_sets(
    config: HarmChoice,
    model: ModelChoice,
    extra_source: str | None = None,
    templates: str | None = None,
    *,
    least: int = 1,
) -> tuple[HarmSets, MatchedPrompts]:
    """The prompts as configured, and both classes alike in final punctuation, at least so many families of each."""
    sets = read_harm_sets(config, [model], extra_source, templates)
    matched = match_punctuation(sets.harmful, sets.harmless, config.punctuation)
    for name, own in (("harmful", matched.positive), ("harmless", matched.negative)):
        families = len({prompt.group for prompt in own})
        if families < least:
            raise UserError(
                f"there are {families} families of {name} prompts, and the study needs {least} of each class; "
                "give more prompts, or a larger --n"
            )
    return sets, matched
