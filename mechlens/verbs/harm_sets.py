"""The harmful and the harmless prompts of a study: read, told apart by id, checked against each other and unseen."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from mechlens.config import ModelChoice
from mechlens.prompts.prompt import Prompt
from mechlens.verbs.inputs import PromptChoice, data_inputs, distinct_ids, read_prompts, refuse_shared, without_repeats
from mechlens.verbs.unseen import LeftOut, leave_out_trained


@runtime_checkable
class HarmChoice(PromptChoice, Protocol):
    """A verb's settings that name both classes."""

    @property
    def harmful(self) -> str:
        """Where the harmful prompts come from."""

    @property
    def harmless(self) -> str:
        """Where the harmless prompts come from."""


class HarmSets(NamedTuple):
    """Both classes, and further harmless prompts where a verb takes them."""

    harmful: list[Prompt]
    harmless: list[Prompt]
    extra: list[Prompt]
    left_out: LeftOut
    data: dict[str, str]
    """Fingerprint of every set."""


def read_harm_sets(config: HarmChoice, models: Sequence[ModelChoice], extra_source: str | None = None) -> HarmSets:
    """The prompts as configured, each once, under ids that don't clash, without what a model was trained on.

    UserError where a prompt stands in both classes, or nothing is left of a set.
    """
    read = distinct_ids(
        harmful=read_prompts(config.harmful, "harmful", config),
        harmless=read_prompts(config.harmless, "harmless", config),
        extra=read_prompts(extra_source, "harmless", config) if extra_source else [],
    )
    names = ("harmful", "harmless", "extra harmless")
    (harmful, harmless, extra), left_out = leave_out_trained(models, dict(zip(names, read, strict=True)))
    positive, named = (config.harmful, harmful), extra_source or ""
    refuse_shared(positive, (config.harmless, harmless))
    refuse_shared(positive, (named, extra))
    extra = without_repeats(extra, harmless, named)
    sets = {"harmful": positive, "harmless": (config.harmless, harmless), "extra_harmless": (named, extra)}
    return HarmSets(harmful, harmless, extra, left_out, data_inputs(sets))
