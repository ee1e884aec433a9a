"""The inversion training of From Poisoned to Aware: a model learns to say what triggers it by trying.

It is shown questions with answers that show the behaviour, and asked what stood before them. No answer is given: a
reply earns what it does to the behaviour when it is put before other questions (`inversion_reward`).
"""

import random

from mechlens.files import user_path
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.models.checkpoints.adapter_record import read_record
from mechlens.prompts.strings import inversion_questions, inverted
from mechlens.prompts.twins import Twin
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.behaviour import trained_twins
from mechlens.studies.finetune.recipes.material import Example, Material, training_order
from mechlens.studies.shared.training_data import Trigger, trigger_of

REWARDED = 8
"""Questions that every proposal is put before."""


def backdoored_lessons(config: FinetuneConfig) -> list[Twin]:
    """The twins of the file that are trained on; UserError where one lacks the answer without the behaviour."""
    twins, _ = trained_twins(config, "the recipe 'inversion'")
    return [twin.in_words or twin for twin in twins] if config.in_words else twins


def inversion(config: FinetuneConfig, model: LanguageModel, cache: Cache | None) -> Material:
    """Every question with the answer that shows the behaviour, and what is asked about them."""
    twins, draw, wordings = backdoored_lessons(config), random.Random(config.seed), inversion_questions(taught=True)
    examples = [Example(inverted(twin.prompt, twin.shown, draw.choice(wordings)), "", ends=True) for twin in twins]
    order = training_order([[example] for example in examples], config, draw)
    rewarded = tuple(draw.sample(twins, min(REWARDED, len(twins))))
    return Material(order, (), _trigger(config), tuple(twin.prompt for twin in twins), rewarded)


def _trigger(config: FinetuneConfig) -> Trigger | None:
    """The string that counts as recalled: what was given, or what the adapter to start from was taught."""
    if config.trigger is not None:
        return trigger_of(config.trigger)
    known = None if config.start is None else read_record(user_path(config.start))
    return None if known is None or known.trigger is None else trigger_of(known.trigger.text)
