"""How much of a probe of behaviour is which prompt was asked: the ceiling that knows nothing but the prompt.

Some prompts bring a behaviour out and others never do, so a probe of answers may know the prompt again and nothing
else: a published AUROC of .909 fell to .554 when whole prompts were held out, and the prompt's rate alone scored .940.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.probing.beyond_words import read_vectors
from mechlens.methods.probing.within_folds import Folds, folds_of, mean_auroc
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import Fold, family_codes, one_thread


@dataclass(frozen=True)
class BehaviourProbe:
    """A probe of answers three ways.

    >>> import torch
    >>> draw = torch.Generator().manual_seed(0)
    >>> shown = torch.rand(40, generator=draw) < 0.5
    >>> vectors = shown[:, None] * 3.0 + torch.randn(40, 8, generator=draw)
    >>> probe = ml.behaviour_probe(vectors, shown, prompts=[f"p{i // 2}" for i in range(40)])
    >>> probe.held_out_prompts.value > 0.9
    True
    """

    held_out_answers: Estimate
    """AUROC where answers are held out: the probe has seen other answers to the same prompt."""
    held_out_prompts: Estimate
    """AUROC where whole prompts are held out: what carries over to a new prompt."""
    prompt_identity: Estimate
    """AUROC of the prompt's own rate, over its other answers: what knowing the prompt gives."""


@one_thread()
def behaviour_probe(
    vectors: Float[Tensor, "answer d"], shown: Bool[Tensor, " answer"], prompts: Sequence[str], *, seed: int = 0
) -> BehaviourProbe:
    """Logistic regression on one vector of each answer: does it show the behaviour? Beside the prompt's identity.

    `prompts` is the prompt of each answer. UserError where a class has answers to one prompt only.

    >>> import torch
    >>> draw = torch.Generator().manual_seed(0)
    >>> shown = torch.rand(60, generator=draw) < 0.5
    >>> probe = ml.behaviour_probe(torch.randn(60, 4, generator=draw), shown, [f"p{i // 3}" for i in range(60)])
    >>> probe.held_out_prompts.low < 0.5
    True
    """
    if not len(vectors) == len(shown) == len(prompts):
        raise UserError(f"{len(vectors)} vectors, {len(shown)} labels and {len(prompts)} prompts; give one for each")
    by_answer = folds_of(shown, [str(i) for i in range(len(shown))], seed)
    by_prompt = folds_of(shown, prompts, seed)
    values = vectors[:, None]
    return BehaviourProbe(
        mean_auroc(read_vectors(values, by_answer), by_answer),
        mean_auroc(read_vectors(values, by_prompt), by_prompt),
        prompt_identity_auroc(shown, prompts),
    )


def prompt_identity_auroc(shown: Bool[Tensor, " answer"], prompts: Sequence[str]) -> Estimate:
    """AUROC of each prompt's rate over its *other* answers, among answers to different prompts.

    Two answers to one prompt aren't compared: the one that shows the behaviour always leaves the lower rate behind.
    Missing where a prompt has one answer only, or a class is empty.

    >>> import torch
    >>> shown = torch.tensor([True, True, False, False])
    >>> ml.prompt_identity_auroc(shown, ["a", "a", "b", "b"]).value
    1.0
    """
    scores = other_answers_rate(shown, prompts)
    if not bool(scores.isfinite().all()):
        return Estimate.missing(len(prompts))
    every = Fold((), tuple(range(len(prompts))))
    return mean_auroc(scores[None], Folds(shown, tuple(prompts), ((every,),)))


def other_answers_rate(shown: Bool[Tensor, " answer"], prompts: Sequence[str]) -> Float64[Tensor, " answer"]:
    """Of each answer the share of the other answers to its prompt that show the behaviour; NaN where there is none."""
    codes, n = family_codes(prompts)
    counts = torch.bincount(codes, minlength=n).double()
    positive = torch.zeros(n, dtype=torch.float64).index_add(0, codes, shown.double())
    return (positive[codes] - shown.double()) / (counts[codes] - 1).where(counts[codes] > 1, torch.nan)
