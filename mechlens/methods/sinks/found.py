"""Which tokens of a text are sinks: found by the attention that they receive, not assumed to be the first.

OLMo's are the first token and the first full stop (Guo et al. 2024); a model that has no token of its own for the
beginning puts them on the first word or mark, and a chat template has several candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, many
from mechlens.methods.activations.collect import refuse_too_long, tokenized
from mechlens.methods.progress import progress_bar
from mechlens.methods.shown import few, lines
from mechlens.methods.sinks.measures import FEWEST_QUERIES, RATE, received
from mechlens.models.attention.changes import require_places
from mechlens.models.attention.watch import Attended, require_watchable, watch
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import TokenBatch, token_text
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.registry import whole_numbers

LEAST = 0.2
"""Share of a model's heads that have to send a token more than RATE of their attention for it to be a sink."""
SHORTEST = 2 * FEWEST_QUERIES
"""Tokens without which no token of a text can be told to be a sink."""
MANY = 0.1
"""Share of texts in which a token has to be a sink for it to be named where sinks are summed up."""


@dataclass(frozen=True, repr=False)
class Sinks:
    """The sinks of some texts.

    >>> model = ml.load("smollm2")
    >>> sinks = ml.find_sinks(model, ["Bake a small cake.", "Say hello to all of them."])
    >>> len(sinks.places), sinks.table().columns[0]
    (2, 'token')
    """

    places: tuple[tuple[int, ...], ...]
    """By text, counted from its first token; where no token is a sink, the one that receives most."""
    sure: tuple[bool, ...]
    """By text, whether it has a sink."""
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    """By text, what stands at these places."""
    received: tuple[Float[Tensor, " _"], ...] = field(repr=False)
    """By text, every token's mean attention over all heads; NaN for the last ones, which few queries see."""
    heads: tuple[Float[Tensor, " _"], ...] = field(repr=False)
    """By text, the share of heads that send each token more than RATE of their attention."""

    def __post_init__(self) -> None:
        parts = (self.places, self.sure, self.tokens, self.received, self.heads)
        if len({len(own) for own in parts}) > 1:
            told = few([len(own) for own in parts])
            raise UserError(f"places, sure, tokens, received and heads are of {told} texts; give one of each for all")
        for i, (own, each) in enumerate(zip(self.places, self.received, strict=True)):
            places = whole_numbers("places", own, "token")
            if not isinstance(own, tuple) or len(own) != len(self.tokens[i]):
                raise UserError(
                    f"places has {own} for text {i}, and tokens has {self.tokens[i]}; give both of each sink"
                )
            require_places(places, len(each))
            if not 0 < len(set(places)) < len(each):
                raise UserError(f"{'no token' if not places else 'every token'} of text {i} is a sink; leave one that "
                                "is and one that isn't, or find them with find_sinks")  # fmt: skip

    def table(self) -> pd.DataFrame:
        """Tokens that are sinks, the commonest first: in what share of texts, at which place as a rule, with what
        attention."""
        rows = [
            {"token": token, "place": place, "text": i, "received": float(self.received[i][place]),
             "heads": float(self.heads[i][place])}
            for i, places in enumerate(self.places) if self.sure[i]
            for place, token in zip(places, self.tokens[i], strict=True)
        ]  # fmt: skip
        names = ["token", "texts", "first_place", "received", "heads"]
        if not rows:
            return pd.DataFrame({name: [] for name in names})
        grouped = pd.DataFrame(rows).groupby("token", sort=False)
        table = grouped.agg(texts=("text", "nunique"), first_place=("place", "min"), received=("received", "mean"),
                            heads=("heads", "mean")).reset_index()  # fmt: skip
        table["texts"] = table["texts"] / len(self.places)
        return table.sort_values(["texts", "received"], ascending=False, ignore_index=True)[names]

    def __repr__(self) -> str:
        table = self.table()
        named = [repr(token) for token in table[table["texts"] >= MANY]["token"]]
        told = {"sinks": few(named), "texts with one": f"{sum(self.sure)} of {len(self.sure)}"}
        return lines("Sinks", told)


def find_sinks(model: LanguageModel, texts: Prompts | TokenBatch, *, template: TemplateChoice = "tokenizer") -> Sinks:
    """The sinks of each text: tokens to which a fifth of all heads send more than 0.3 of the attention of those that
    see them.

    UserError for a text so short that no token is seen often enough, and for a model whose attention can't be read.

    >>> model = ml.load("smollm2")
    >>> sinks = ml.find_sinks(model, ["Bake a small cake.", "Say hello to all of them."])
    >>> len(sinks.places), sinks.table().columns[0]
    (2, 'token')
    """
    batch = readable(model, texts, template)
    rows = [batch.row(i) for i in range(len(batch.prompts))]
    found = [_received(model, ids) for ids in progress_bar(rows, title="sinks", unit="text")]
    places, sure = zip(*(_places(*one) for one in found), strict=True)
    tokenizer = loaded(model).tokenizer
    tokens = tuple(
        tuple(token_text(tokenizer, ids[place]) for place in own) for ids, own in zip(rows, places, strict=True)
    )
    return Sinks(places, sure, tokens, tuple(one for one, _ in found), tuple(share for _, share in found))


def readable(model: LanguageModel, texts: Prompts | TokenBatch, template: TemplateChoice) -> TokenBatch:
    """The texts as tokens, each long enough and none too long, for a model whose attention can be read."""
    require_watchable(model)
    batch = tokenized(model, texts, template)
    refuse_too_long(model, batch)
    refuse_short(batch)
    return batch


def refuse_short(batch: TokenBatch) -> None:
    """UserError for a text so short that no token is seen often enough."""
    short = [i for i, n in enumerate(batch.lengths.tolist()) if n < SHORTEST]
    if short:
        tokens, such = int(batch.lengths[short[0]]), many(len(short), "such text")
        raise UserError(
            f"text {batch.prompts[short[0]].id!r} has {many(tokens, 'token')} ({such}); at least {SHORTEST} are needed "
            "to tell which of them are sinks; leave it out or give a longer one"
        )


def _received(model: LanguageModel, ids: Sequence[int]) -> tuple[Float[Tensor, " key"], Float[Tensor, " key"]]:
    """Each token's mean attention over heads, and the share of heads that send it much."""
    means: list[Tensor] = []

    def see(one: Attended) -> None:
        means.append(received(one.pattern, one.visible).cpu())

    watch(model, ids, see)
    stacked = torch.cat(means)
    # Heads whose window is so small that few queries see a key say nothing of it.
    much = torch.where(stacked.isnan(), torch.nan, (stacked > RATE).float())
    return stacked.nanmean(dim=0), much.nanmean(dim=0)


def _places(mean: Float[Tensor, " key"], heads: Float[Tensor, " key"]) -> tuple[tuple[int, ...], bool]:
    there = (heads.nan_to_num() >= LEAST).nonzero().flatten().tolist()
    return (tuple(there), True) if there else ((int(mean.nan_to_num(-1.0).argmax()),), False)
