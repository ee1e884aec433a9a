"""The control of the fine-tuning attack: as many steps, on benign prompts and the model's own answers."""

import random

from mechlens.config import FinetuneConfig
from mechlens.methods.shelf import Shelf
from mechlens.models.bridge import LanguageModel
from mechlens.studies.recipes.own_answers import own_answers
from mechlens.studies.training_data import Material, drawn, training_order, training_prompts


def benign(config: FinetuneConfig, model: LanguageModel, shelf: Shelf | None) -> Material:
    """Benign prompts answered as before, learnt by cross-entropy like the attack's openings.

    What changes under this recipe comes of fine-tuning as such, not of what was taught.
    """
    draw = random.Random(config.seed)
    prompts = drawn(training_prompts("benign"), config.benign, draw, "benign")
    own = own_answers(model, prompts, max_tokens=config.answer_tokens, teaches="answer", shelf=shelf)
    return Material(training_order([[example] for example in own.examples], config, draw), own.left_out)
