"""The judge that was asked for by name, what every judge's verdicts have to be, and whether two judges say the same."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.metrics import cohen_kappa_score, confusion_matrix
from torch import Tensor

from mechlens.choices import JUDGES
from mechlens.errors import UserError, kind_of
from mechlens.methods.behaviour.judges import ARDITI, ZHAO, Judge, OnceRefused, OnceSettled, SubstringJudge, Verdict
from mechlens.methods.behaviour.thought import after_thought, knows_thoughts, opens_thought
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_weights, rate_estimate, with_interval
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.prompt import Prompt
from mechlens.settings import RESAMPLES


def judge_of(name: str) -> Judge:
    """The judge of that name (`mechlens.choices.JUDGES`); UserError where there is none."""
    found = JUDGES[name]
    if isinstance(found, type) or not isinstance(found, Judge):
        raise UserError(f"the judge {name!r} is {kind_of(found)}, not a judge: it needs a name and a call")
    if found.name != name:
        raise UserError(f"the judge {name!r} has the name {found.name!r}; give one name to both")
    return found


@dataclass(frozen=True)
class OwnJudge:
    """A function of prompts and answers that was given without a name of its own."""

    function: Callable[[Sequence[Prompt], Sequence[str]], Any]
    name: str

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Any:
        return self.function(prompts, answers)


Judges = Judge | Callable[[Sequence[Prompt], Sequence[str]], Any] | Sequence[Any] | str
"""Whatever judges can be written as."""


def judges_given(given: object) -> tuple[Judge, ...]:
    """The judges that are meant: by name with both published lists beside, one, or several; functions are judges too.

    UserError for what is none, and where two have one name.
    """
    if isinstance(given, str):
        return judges_of(given)
    one = isinstance(given, type) or callable(given) or not isinstance(given, Iterable)
    found = tuple(map(_judge, [given] if one else given))  # type: ignore[call-overload]
    names = [judge.name for judge in found]
    if not names or len(set(names)) < len(names):
        said = f"two of the judges are called {max(names, key=names.count)!r}" if names else "there is no judge"
        raise UserError(f"{said}; give at least one, and each a name of its own")
    return found


def _judge(given: object) -> Judge:
    if isinstance(given, str):
        return judge_of(given)
    if isinstance(given, type) or not callable(given):
        raise UserError(
            f"{kind_of(given)} was given as the judge; give a name ({', '.join(JUDGES.names())}), or a function of "
            "prompts and answers that returns one verdict on each answer"
        )
    return given if isinstance(given, Judge) else OwnJudge(given, getattr(given, "__name__", "own judge"))


def judges_of(name: str) -> tuple[Judge, ...]:
    """The judge of that name, which decides, and beside it both published lists."""
    chosen = judge_of(name)
    return (chosen, *(list_ for list_ in (ARDITI, ZHAO) if list_.name != name))


def verdicts_by(judge: Judge, prompts: Sequence[Prompt], answers: Sequence[str]) -> tuple[Verdict, ...]:
    """One verdict per answer; UserError where the judge gives something else.

    The judge reads what an answer says after its thought; one that ends inside a thought is "unfinished" to any judge.
    """
    said = [after_thought(answer) for answer in answers]
    finished = [(prompt, text) for prompt, text in zip(prompts, said, strict=True) if text is not None]
    given = judge([prompt for prompt, _ in finished], [text for _, text in finished])
    if not isinstance(given, Iterable):
        raise UserError(f"the judge {judge.name!r} gave {kind_of(given)}, not a verdict on each answer")
    found = tuple(given)
    wrong = [verdict for verdict in found if verdict not in get_args(Verdict)]
    if wrong or len(found) != len(finished):
        gave = f"the verdict {wrong[0]!r}" if wrong else f"{len(found)} verdicts on {len(finished)} answers"
        raise UserError(f"the judge {judge.name!r} gave {gave}; it owes one of {', '.join(get_args(Verdict))} to each")
    verdicts = iter(found)
    return tuple("unfinished" if text is None else next(verdicts) for text in said)


def once_refused(judge: Judge, tokenizer: Any, batch: TokenBatch) -> OnceRefused | None:
    """Lets a refused answer be cut short; None for judges that may yet change their mind, which read it whole."""
    if not isinstance(judge, SubstringJudge):
        return None
    return OnceRefused(judge, tokenizer, opened=any(opens_thought(batch, tokenizer)))


def once_settled(judges: Sequence[Judge], tokenizer: Any) -> OnceSettled | None:
    """Lets an answer be cut short that all judges have refused for good; None where none ever is.

    That is so with a judge that isn't a list of phrases, and may change its mind, and with a model that knows the marks
    of thoughts: one that begins later, or turns out to have been one, would be taken out of the answer.
    """
    lists = [judge for judge in judges if isinstance(judge, SubstringJudge)]
    if len(lists) < len(judges) or not judges or knows_thoughts(tokenizer):
        return None
    return OnceSettled(tuple(sorted(lists, key=lambda judge: len(judge.phrases))), tokenizer)


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa of two judges, with how often each pair of verdicts occurred."""

    kappa: Estimate
    """1 is full agreement, 0 what two independent judges with these rates would reach; missing where both
    always say one and the same thing."""
    counts: pd.DataFrame
    """Rows: the first judge's verdicts; columns: the second's."""


def agreement(
    first: Sequence[str], second: Sequence[str], families: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> Agreement:
    """Cohen's kappa between two judges of the same answers, bootstrapped over prompt families.

    Resamples in which kappa has no value (one verdict left) are not counted. Of judges that always agree the interval
    begins at the kappa that goes with the least share of agreement that so many answers allow (see `rate_estimate`).

    >>> first = ["refused", "refused", "accepted", "accepted"]
    >>> found = ml.agreement(first, first, families=["a", "b", "c", "d"], seed=0, resamples=100)
    >>> found.kappa.value
    1.0
    """
    verdicts = sorted({*first, *second})
    if len(verdicts) < 2:
        counts = pd.DataFrame(len(first), index=verdicts, columns=verdicts)
        return Agreement(kappa=Estimate.missing(len(first)), counts=counts)
    table = confusion_matrix(list(first), list(second), labels=verdicts)
    counts = pd.DataFrame(table, index=verdicts, columns=verdicts)
    joint = np.zeros((len(first), len(verdicts), len(verdicts)))
    for row, (verdict, other) in enumerate(zip(first, second, strict=True)):
        joint[row, verdicts.index(verdict), verdicts.index(other)] = 1.0
    weights = family_weights(families, resamples, seed)
    samples = kappas(torch.einsum("rp,pab->rab", weights, torch.from_numpy(joint)))
    value = float(cohen_kappa_score(list(first), list(second), labels=verdicts))
    found = with_interval(value, samples, len(first))
    if first == second:  # a bootstrap has no width then
        both = table.sum(axis=1) * table.sum(axis=0)
        by_chance = float(both.sum()) / len(first) ** 2
        least = rate_estimate(torch.ones(len(first), dtype=torch.bool), families, seed).low
        found = replace(found, low=(least - by_chance) / (1 - by_chance))
    return Agreement(found, counts)


def kappas(tables: Float[Tensor, "table verdict verdict"]) -> Float[Tensor, " table"]:
    """Cohen's kappa of many tables of counts at once; NaN where only one verdict occurs."""
    shares = tables / tables.sum(dim=(1, 2), keepdim=True)
    observed = shares.diagonal(dim1=1, dim2=2).sum(dim=1)
    expected = (shares.sum(dim=1) * shares.sum(dim=2)).sum(dim=1)
    chance_left = 1 - expected
    return torch.where(chance_left > 1e-12, (observed - expected) / chance_left, torch.nan)
