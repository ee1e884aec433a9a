"""Benign prompts with what the model itself answers to them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from mechlens.methods.answers import answer
from mechlens.methods.judges import PHRASES
from mechlens.methods.shelf import Shelf
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.studies.training_data import Example


class OwnAnswers(NamedTuple):
    """Examples, and the ids of the prompts that gave none."""

    examples: list[Example]
    left_out: tuple[str, ...]


def own_answers(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    teaches: Literal["answer", "base"],
    shelf: Shelf | None,
) -> OwnAnswers:
    """The model's greedy answers of up to `max_tokens` tokens; a longer one is cut off and doesn't end its turn.

    A prompt that the model refuses (or leaves without an answer) is left out: it would teach the opposite of what
    benign prompts are there for.
    """
    own = answer(model, prompts, max_new_tokens=max_tokens, shelf=shelf)
    verdicts = PHRASES(prompts, own.texts)
    examples, left_out = [], []
    for prompt, text, tokens, verdict in zip(prompts, own.texts, own.tokens, verdicts, strict=True):
        if verdict != "accepted":
            left_out.append(prompt.id)
        else:
            examples.append(Example(prompt, text, ends=len(tokens) < max_tokens, teaches=teaches))
    return OwnAnswers(examples, tuple(left_out))
