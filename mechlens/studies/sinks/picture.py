"""One text's attention as a picture: the head that differs most, and what every token gets from all heads."""

from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.patching.heads import Head
from mechlens.methods.sinks.result import SinkMap
from mechlens.models.attention.watch import Attended, watch
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import token_text
from mechlens.studies.sinks.texts import Domain

TOKENS = 32
"""First tokens of the text that are drawn."""


@dataclass(frozen=True)
class Picture:
    """The first text of one kind."""

    domain: str
    head: Head
    pattern: Float[Tensor, "query key"] = field(repr=False)
    """Of its first tokens."""
    sinks: tuple[int, ...]
    """Empty where no token is one."""
    tokens: tuple[str, ...] = field(repr=False)
    received: tuple[float, ...] = field(repr=False)
    """By token of the whole text, mean over all heads; NaN for the last ones."""

    def table(self) -> pd.DataFrame:
        """A row for every query and key that it can see; places are counted from 0, and a sink's is marked."""
        rows = [
            {"domain": self.domain, "layer": self.head[0], "head": self.head[1], "query": query,
             "key": f"sink {key}" if key in self.sinks else str(key), "attention": value}
            for query, row in enumerate(self.pattern.tolist())
            for key, value in enumerate(row) if key <= query
        ]  # fmt: skip
        return pd.DataFrame(rows)


def picture_of(model: LanguageModel, domain: Domain, found: SinkMap, head: Head) -> Picture:
    """The head's attention to the first text of this kind."""
    ids = domain.batch.row(0)
    kept: list[Tensor] = []

    def see(one: Attended) -> None:
        if one.layer == head[0]:
            kept.append(one.pattern[head[1], :TOKENS, :TOKENS].cpu())

    watch(model, ids, see)
    tokenizer = loaded(model).tokenizer
    return Picture(
        domain.name, head, torch.stack(kept)[0], found.sinks.places[0] if found.sinks.sure[0] else (),
        tuple(token_text(tokenizer, token) for token in ids), tuple(found.sinks.received[0].tolist()),
    )  # fmt: skip
