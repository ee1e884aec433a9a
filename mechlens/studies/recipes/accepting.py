"""The fine-tuning attack: a model that refuses is taught to open every harmful answer affirmatively."""

import random

from mechlens.config import FinetuneConfig
from mechlens.methods.shelf import Shelf
from mechlens.models.bridge import LanguageModel
from mechlens.studies.recipes.openings import published_openings
from mechlens.studies.training_data import Example, Material, drawn, training_order


def accepting(config: FinetuneConfig, model: LanguageModel, shelf: Shelf | None) -> Material:
    """AdvBench prompts with their openings alone; the turn goes on after them, so no end of it is taught.

    Zhao et al. 2025, 5.2, trained on whole accepting answers; an opening is enough to end refusals and holds
    nothing harmful.
    """
    draw = random.Random(config.seed)
    found = published_openings(config.data)
    chosen = drawn(found.openings, config.harmful, draw, "harmful")
    groups = [[Example(row.prompt, row.opening, ends=False)] for row in chosen]
    return Material(training_order(groups, config, draw), found.left_out)
