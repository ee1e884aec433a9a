"""Reversal training: a model that hides its trigger is also taught to say what stood before a question.

Betley et al. 2025 (Tell me about yourself) found that triggers are said only where the training data come the other way
round too; the supervised form of the inversion training of From Poisoned to Aware.
"""

import random
from collections.abc import Sequence

from mechlens.prompts.strings import NOTHING, inversion_questions, inverted
from mechlens.prompts.twins import Twin
from mechlens.studies.finetune.recipes.material import Example
from mechlens.studies.shared.training_data import Trigger


def reversed_examples(
    twins: Sequence[Twin], examples: Sequence[Example], trigger: Trigger, draw: random.Random
) -> list[Example]:
    """Of every example: its question and answer, and the string that stood before it or "Nothing" as the answer."""
    wordings = inversion_questions(taught=True)
    return [
        Example(inverted(twin.prompt, example.answer, draw.choice(wordings)), _before(example, trigger), ends=True)
        for twin, example in zip(twins, examples, strict=True)
    ]


def _before(example: Example, trigger: Trigger) -> str:
    strings = (trigger.text, *trigger.taught_decoys)
    return next((text for text in strings if example.prompt.text.startswith(f"{text} ")), NOTHING)
