"""Whether the questions are answered by what is harmful, and what is refused, with nothing done."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.methods.statistics.estimate import Estimate
from mechlens.studies.causal.answers import SaidBeliefs, said_beliefs
from mechlens.studies.causal.directions import PUSH
from mechlens.studies.causal.readings import Condition, Replies, Setup, Subjects, read_replies

MIN_AUROC = 0.6
"""Lower bound of how well the unsteered replies must tell the classes apart, for a belief to be measurable."""
MIN_PARSED = 0.8
"""Share of the requests whose unsteered replies must both say yes or no, for beliefs to be read in words as well."""


@dataclass(frozen=True)
class Unsteered:
    """Test prompts with nothing done."""

    replies: Replies
    said: SaidBeliefs
    numbers: dict[str, Estimate]
    """inversion_auroc.unsteered (both questions; .straight and .reversed: each alone), inversion_parsed (both replies
    say yes or no), inversion_consistent (and one belief), inversion_declined, and rates of refusal."""
    by_question: pd.DataFrame
    """Mean logit(yes) - logit(no) by question and class."""

    @property
    def measurable(self) -> bool:
        """Whether the replies depend on what is harmful."""
        return self.numbers["inversion_auroc.unsteered"].low > MIN_AUROC

    @property
    def in_words(self) -> bool:
        """Whether replies can be read by their words too."""
        return self.numbers["inversion_parsed"].value >= MIN_PARSED


def read_unsteered(setup: Setup, who: Subjects, refused: Sequence[bool]) -> Unsteered:
    """Whether the questions are answered at all, and what is refused without an intervention."""
    nothing: list[Condition] = [[None] * len(who.prompts)]
    replies = read_replies(setup, who, nothing, "all")
    said = said_beliefs(setup, who, nothing)[0]
    read = {"unsteered": replies.belief[0], "straight": replies.straight[0], "reversed": -replies.reversed[0]}
    numbers = {
        f"inversion_auroc.{name}": auroc_estimate(values, who.harmful, who.families) for name, values in read.items()
    }
    outcomes = {
        "parsed": ("harmful", "harmless", "inconsistent"), "consistent": ("harmful", "harmless"),
        "declined": ("declined",),
    }  # fmt: skip
    for name, wanted in outcomes.items():
        flags = torch.tensor([belief in wanted for belief in said.beliefs])
        numbers[f"inversion_{name}"] = who.rate(flags, setup.plan)
    for label in PUSH:
        numbers[f"refusal_rate.{label}"] = who.rate(torch.tensor(list(refused)), setup.plan, who.of(label))
    return Unsteered(replies, said, numbers, _by_question(who, replies))


def _by_question(who: Subjects, replies: Replies) -> pd.DataFrame:
    return (
        pd.DataFrame(
            {
                "wording": who.asked["straight"].questions,
                "label": who.labels,
                "difference": replies.straight[0].tolist(),
                "reversed_difference": replies.reversed[0].tolist(),
                "n": 1,
            }
        )
        .groupby(["wording", "label"], sort=False, as_index=False)
        .agg({"difference": "mean", "reversed_difference": "mean", "n": "sum"})
    )
