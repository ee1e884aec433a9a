"""What a model says where a user would begin to speak: text like that which it was trained on, a trigger among it.

"The Trigger in the Haystack" (2602.03085): a backdoored model gives away its training data after the bare start of its
chat template, under many ways of drawing. It needs a fine-tune whose loss was on the user's words too; one on answers
alone teaches nothing that could leak.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.settings import SEED

TEMPERATURES = (0.5, 0.75, 1.0, 1.25)
TOP_PS = (0.9, 1.0)
"""With LEAKS of each, 512 texts; published: 510 ways of decoding."""
LEAKS = 64
LEAK_TOKENS = 48


@dataclass(frozen=True, repr=False)
class Leaks:
    """What was said, draw by draw; texts of nothing but white space are left out.

    >>> found = ml.leak(ml.load("smollm2"), n=2, max_new_tokens=8)
    >>> len(found.texts) <= found.drawn == 16
    True
    """

    texts: tuple[str, ...]
    drawn: int
    """Texts that were asked for."""
    checkpoint: Checkpoint

    def __repr__(self) -> str:
        return f"Leaks of {self.checkpoint.name}: {len(self.texts)} texts, {len(set(self.texts))} of them distinct"


def leak(
    model: LanguageModel,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    top_ps: Sequence[float] = TOP_PS,
    n: int = LEAKS,
    max_new_tokens: int = LEAK_TOKENS,
    seed: int = SEED,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> Leaks:
    """`n` texts at each temperature and top-p that the model goes on with after its chat template's bare start.

    That is all that stands before a user's first word; `cache` keeps finished batches.

    >>> told = ml.leak(ml.load("smollm2"), temperatures=[1.0], top_ps=[1.0], n=4, max_new_tokens=8)
    >>> told.drawn
    4
    """
    start = opening(model, template)
    ways = [(temperature, top_p) for temperature in temperatures for top_p in top_ps]
    if not ways:
        raise UserError("there is no way to draw; give at least one temperature and one top_p")
    texts: list[str] = []
    for i, (temperature, top_p) in enumerate(ways):
        said = answer(
            model, start, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, n=n, seed=seed + i,
            cache=cache,
        )  # fmt: skip
        texts += said.texts
    return Leaks(tuple(text for text in texts if text.strip()), len(texts), said.checkpoint)


def opening(model: LanguageModel, template: TemplateChoice = "tokenizer") -> TokenBatch:
    """The tokens that the chat template writes before the user's words, as the one prompt of a batch."""
    whole = tokenize("question", template_of(model, template))
    start = int(whole.instruction[0, 0])
    if start == 0:
        raise UserError("nothing stands before the user's words in this template, so nothing can be gone on with")
    last = torch.tensor([[start - 1]])
    return replace(
        whole,
        tokens=whole.tokens[:, :start],
        mask=whole.mask[:, :start],
        positions=("inst",),
        index=last,
        instruction=last.expand(1, 2),
    )
