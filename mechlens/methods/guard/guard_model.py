"""A guard model as a judge of prompts: Llama Guard's way of asking and answering, for any model that keeps to it.

Inan et al. 2023: the guard's own chat template wraps the conversation in instructions and a list of hazards, and the
answer is `safe`, or `unsafe` with the hazards' codes on the next line.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mechlens.methods.behaviour.answers import answer
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt

ANSWER_TOKENS = 12
_WORD = re.compile(r"\b(unsafe|safe)\b", re.IGNORECASE)
_CODE = re.compile(r"\b[SO]\d{1,2}\b")


@dataclass(frozen=True)
class GuardModelAnswer:
    """What a guard model said of one prompt."""

    harmful: bool | None
    """None where the answer holds neither `safe` nor `unsafe`."""
    hazards: tuple[str, ...]
    """Codes such as S1 or O3, in the order given."""
    answer: str


def parse_guard_answer(text: str) -> GuardModelAnswer:
    """The verdict is the first of the words safe and unsafe; codes count only after `unsafe`."""
    found = _WORD.search(text)
    if found is None:
        return GuardModelAnswer(None, (), text)
    harmful = found[1].lower() == "unsafe"
    codes = tuple(dict.fromkeys(_CODE.findall(text[found.end() :]))) if harmful else ()
    return GuardModelAnswer(harmful, codes, text)


def ask_guard_model(
    guard: LanguageModel, prompts: Sequence[Prompt], cache: Cache | None = None
) -> list[GuardModelAnswer]:
    """The guard model's word on every prompt, asked through the chat template of its own tokenizer."""
    plain = [Prompt(prompt.id, prompt.text, history=prompt.history) for prompt in prompts]
    said = answer(guard, plain, max_new_tokens=ANSWER_TOKENS, cache=cache)
    return [parse_guard_answer(text) for text in said.texts]
