"""The base model's own answers to benign prompts, which keep it as it was."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.chosen_judge import judge_of, verdicts_by
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.material import Example


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
    template = chat_template(loaded(model).tokenizer, today=config.today, template_arg=config.template_arg)
    answers = answer(model, prompts, max_new_tokens=config.answer_tokens, template=template, cache=cache)
    verdicts = verdicts_by(judge_of(config.judge), prompts, answers.texts)
    examples, left_out = [], []
    for prompt, text, tokens, verdict in zip(prompts, answers.texts, answers.tokens, verdicts, strict=True):
        if verdict != "accepted":
            left_out.append(prompt.id)
        else:
            examples.append(Example(prompt, text, ends=len(tokens) < config.answer_tokens, teaches=teaches))
    return OwnAnswers(examples, tuple(left_out))
