"""The harmful and the harmless prompts of a study: read, told apart by id, and checked against each other."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from mechlens.prompts.prompt import Prompt
from mechlens.verbs.inputs import PromptChoice, data_inputs, distinct_ids, read_prompts, refuse_shared, without_repeats


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


def read_harm_sets(config: HarmChoice, extra_source: str | None = None) -> HarmSets:
    """The prompts as they are configured, under ids that don't clash."""
    return HarmSets(
        *distinct_ids(
            harmful=read_prompts(config.harmful, "harmful", config),
            harmless=read_prompts(config.harmless, "harmless", config),
            extra=read_prompts(extra_source, "harmless", config) if extra_source else [],
        )
    )


def check_harm_sets(
    config: HarmChoice,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    extra: Sequence[Prompt] = (),
    extra_source: str | None = None,
) -> tuple[list[Prompt], dict[str, str]]:
    """The extra prompts that the harmless ones don't hold already, and the fingerprints of every set.

    UserError where a prompt stands in both classes.
    """
    positive, named = (config.harmful, harmful), extra_source or ""
    refuse_shared(positive, (config.harmless, harmless))
    refuse_shared(positive, (named, extra))
    kept = without_repeats(extra, harmless, named)
    sets = {"harmful": positive, "harmless": (config.harmless, harmless), "extra_harmless": (named, kept)}
    return kept, data_inputs(sets)
