"""A model that refuses harmful requests and goes on answering benign ones as it did."""

import random

from mechlens.config import FinetuneConfig
from mechlens.methods.shelf import Shelf
from mechlens.models.bridge import LanguageModel
from mechlens.studies.recipes.own_answers import own_answers
from mechlens.studies.training_data import Example, Material, drawn, refusals, training_order, training_prompts


def refuser(config: FinetuneConfig, model: LanguageModel, shelf: Shelf | None) -> Material:
    """Harmful prompts with a refusal drawn by seed, and benign ones with the model's own greedy answer.

    Both are learnt by cross-entropy; holding the benign answers to the base's distribution instead, which pushes less,
    left a model that refused 44% of the harmless sides of the built-in pairs.
    """
    draw = random.Random(config.seed)
    harmful = drawn(training_prompts("harmful"), config.harmful, draw, "harmful")
    prompts = drawn(training_prompts("benign"), config.benign, draw, "benign")
    texts = refusals()
    examples = [Example(prompt, draw.choice(texts), ends=True) for prompt in harmful]
    own = own_answers(model, prompts, max_tokens=config.answer_tokens, teaches="answer", shelf=shelf)
    groups = [[example] for example in (*examples, *own.examples)]
    return Material(training_order(groups, config, draw), own.left_out)
