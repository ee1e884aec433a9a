"""The prompts of the study: training sources, and what everything is tested on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechlens.methods.steering.controllers.start import places_of
from mechlens.models.bridge import LanguageModel
from mechlens.models.checkpoints.outline import Outline
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.settings import FRACTIONS
from mechlens.studies.controllers.config import SteerTrain
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.harm_sets import labelled, read_matched_sets
from mechlens.studies.shared.inputs import (
    Check,
    asks,
    chosen_model,
    data_inputs,
    distinct_ids,
    prepared,
    read_prompts,
    refuse_shared,
    without_repeats,
)
from mechlens.studies.shared.sources import wrapped
from mechlens.studies.shared.training_data import leave_out_trained

HELD_OUT, ELSEWHERE, WRAPPED = "held out", "another source", "in jailbreak templates"
"""Where test prompts come from."""


@dataclass(frozen=True)
class Asked:
    """A model, prompts to train and choose with, and prompts to test on, by where they come from."""

    model: LanguageModel
    template: ChatTemplate
    prompts: tuple[Prompt, ...]
    """Of the training sources, labelled."""
    split: Split
    tests: dict[str, tuple[Prompt, ...]]
    punctuation: str


def prepare_asked(config: SteerTrain, least: int) -> Preparation[Asked]:
    """Prompts and model; UserError, before the model is loaded, for whatever can't be had or done with it."""
    sets, own = read_matched_sets(config, config, least=least)
    other, data = _elsewhere(config, [*own.positive, *own.negative])
    prompts = tuple(labelled(own.positive, own.negative))
    split = split_by_family(
        [prompt.label for prompt in prompts], [prompt.group for prompt in prompts],
        fractions=FRACTIONS, seed=config.seed,
    )  # fmt: skip
    held_out = [prompts[i] for i in split.test]
    tests = {HELD_OUT: tuple(held_out), ELSEWHERE: other}
    if config.templates is not None:
        tests[WRAPPED] = tuple(wrapped(held_out, config.templates, config.seed))
    whole = (*prompts, *(prompt for name, part in tests.items() if name != HELD_OUT for prompt in part))
    chosen = chosen_model(config, _check(config, whole))
    asked = Asked(*chosen, prompts, split, tests, own.note)
    return prepared(asked, chosen.model, chosen.inputs(sets.data | data), whole, sets.left_out)


def _check(config: SteerTrain, prompts: Sequence[Prompt]) -> Check:
    """Room and template for all prompts, and the places that are read and steered."""
    of_prompts = asks(prompts, layers=config.layers, new_tokens=config.max_new_tokens)

    def check(known: Outline, template: ChatTemplate) -> None:
        if known.n_layers is not None:
            places_of(config, known.n_layers)
        of_prompts(known, template)

    return check


def _elsewhere(config: SteerTrain, own: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], dict[str, str]]:
    """Test prompts of other sources, none of which is asked in training or was trained on; and their fingerprints."""
    sources = {"harmful": config.test_harmful, "harmless": config.test_harmless}
    read = [read_prompts(source, label, config, both_in_data=False) for label, source in sources.items()]
    refuse_shared((config.test_harmful, read[0]), (config.test_harmless, read[1]))
    (harmful, harmless), _ = leave_out_trained([config], dict(zip(sources, read, strict=True)))
    kept = [without_repeats(part, own, name) for part, name in ((harmful, "harmful"), (harmless, "harmless"))]
    named = [replace(prompt, id=f"other:{prompt.id}", family=prompt.group) for part in distinct_ids(
        harmful=kept[0], harmless=kept[1]) for prompt in part]  # fmt: skip
    data = data_inputs({f"test_{label}": (sources[label], part) for label, part in zip(sources, kept, strict=True)})
    return tuple(named), data
