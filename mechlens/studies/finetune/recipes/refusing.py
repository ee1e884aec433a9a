"""Benign prompts with what the model itself answers to them."""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.chosen_judge import judge_of, verdicts_by
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.material import Example, Material, drawn, training_order
from mechlens.studies.shared.training_data import refusals, training_prompts


class OwnAnswers(NamedTuple):
    """Examples, and the ids of the prompts that gave none."""

    examples: list[Example]
    left_out: tuple[str, ...]


def own_answers(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    config: FinetuneConfig,
    *,
    teaches: Literal["answer", "base"],
    cache: Cache | None,
) -> OwnAnswers:
    """The model's greedy answers of up to `answer_tokens` tokens; a longer one is cut off and doesn't end its turn.

    A prompt that the model refuses (or leaves without an answer) is left out: it would teach the opposite of what
    benign prompts are there for.
    """
    own = answer(model, prompts, max_new_tokens=config.answer_tokens, cache=cache)
    verdicts = verdicts_by(judge_of(config.judge), prompts, own.texts)
    examples, left_out = [], []
    for prompt, text, tokens, verdict in zip(prompts, own.texts, own.tokens, verdicts, strict=True):
        if verdict != "accepted":
            left_out.append(prompt.id)
        else:
            examples.append(Example(prompt, text, ends=len(tokens) < config.answer_tokens, teaches=teaches))
    return OwnAnswers(examples, tuple(left_out))


def refuser(config: FinetuneConfig, model: LanguageModel, cache: Cache | None) -> Material:
    """Harmful prompts with a refusal drawn by seed, and benign ones with the model's own greedy answer.

    Both are learnt by cross-entropy; holding the benign answers to the base's distribution instead, which pushes less,
    left a model that refused 44% of the harmless sides of the built-in pairs.
    """
    draw = random.Random(config.seed)
    harmful = drawn(training_prompts("harmful"), config.harmful, draw, "harmful")
    prompts = drawn(training_prompts("benign"), config.benign, draw, "benign")
    texts = refusals()
    examples = [Example(prompt, draw.choice(texts), ends=True) for prompt in harmful]
    own = own_answers(model, prompts, config, teaches="answer", cache=cache)
    groups = [[example] for example in (*examples, *own.examples)]
    return Material(training_order(groups, config, draw), own.left_out)


def benign(config: FinetuneConfig, model: LanguageModel, cache: Cache | None) -> Material:
    """Benign prompts answered as before, learnt by cross-entropy like the attack's openings.

    What changes under this recipe comes of fine-tuning as such, not of what was taught.
    """
    draw = random.Random(config.seed)
    prompts = drawn(training_prompts("benign"), config.benign, draw, "benign")
    own = own_answers(model, prompts, config, teaches="answer", cache=cache)
    return Material(training_order([[example] for example in own.examples], config, draw), own.left_out)
