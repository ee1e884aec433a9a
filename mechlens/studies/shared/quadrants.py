"""Who is refused: every prompt answered and judged, and placed in one of four quadrants."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import warn
from mechlens.methods.activations.activations import Activations
from mechlens.methods.behaviour.answers import NO_TOKEN, Answers
from mechlens.methods.behaviour.chosen_judge import Agreement, Judges, agreement, judges_given, verdicts_by
from mechlens.methods.behaviour.drawing import drawn_prompts
from mechlens.methods.behaviour.judges import (
    LogOddsJudge,
    RefusalTokens,
    fallback_refusal_tokens,
    find_refusal_tokens,
    refusal_log_odds,
)
from mechlens.methods.behaviour.thought import after_thought
from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.methods.shown import counts, html_with, lines
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel, loaded, unembed
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.prompt import Prompt

QUADRANTS = ("refused_harmful", "accepted_harmful", "refused_harmless", "accepted_harmless")
IN_NO_QUADRANT = ("empty", "unclear", "unfinished")
MIN_REFUSALS = 5
"""With fewer refusals than this the model's own refusal tokens can't be found."""


def in_words(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its quadrants as a figure writes them, "refused harmful", each of one colour in all figures."""
    names = [name.replace("_", " ") for name in (*QUADRANTS, *IN_NO_QUADRANT)]
    return frame.assign(quadrant=pd.Categorical(frame["quadrant"].str.replace("_", " "), names))


def quadrants_of(prompts: Sequence[Prompt], verdicts: Sequence[str]) -> tuple[str, ...]:
    """Quadrant of every prompt by one judge's verdicts; "empty", "unclear" and "unfinished" stay what they are."""
    return tuple(
        verdict if verdict in IN_NO_QUADRANT else f"{verdict}_{prompt.label}"
        for verdict, prompt in zip(verdicts, prompts, strict=True)
    )


@dataclass(frozen=True, repr=False)
class JudgedAnswers:
    """Prompts with their answers, each judge's verdicts and the quadrant by the first judge.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:10], *ml.builtin_prompts("harmless")[:10]]
    >>> judged = ml.judge_answers(prompts, ml.answer(model, prompts, max_new_tokens=4))
    >>> set(judged.verdicts) >= {"phrases"}, len(judged.quadrants())
    (True, 20)
    """

    prompts: tuple[Prompt, ...]
    answers: Answers
    verdicts: dict[str, tuple[str, ...]]
    """By judge; the first judge places the quadrants."""

    @property
    def judge(self) -> str:
        """Name of the judge that places the quadrants."""
        return next(iter(self.verdicts))

    @property
    def refused(self) -> tuple[bool, ...]:
        """By the first judge."""
        return tuple(verdict == "refused" for verdict in self.verdicts[self.judge])

    @property
    def accepted(self) -> tuple[bool, ...]:
        """By the first judge; an empty, unclear or unfinished answer is neither refused nor accepted."""
        return tuple(verdict == "accepted" for verdict in self.verdicts[self.judge])

    def quadrants(self, judge: str | None = None) -> tuple[str, ...]:
        """Quadrant of every prompt, or why it has none: "empty" without an answer, "unclear" where the judge couldn't
        say, "unfinished" where the answer ends inside a thought."""
        return quadrants_of(self.prompts, self.verdicts[judge or self.judge])

    def counts(self) -> pd.DataFrame:
        """Prompts in each quadrant, and in none, by each judge: columns judge, quadrant, n."""
        rows = []
        for judge in self.verdicts:
            tally = Counter(self.quadrants(judge))
            rows += [{"judge": judge, "quadrant": name, "n": tally[name]} for name in (*QUADRANTS, *IN_NO_QUADRANT)]
        return pd.DataFrame(rows)

    def agreements(self, seed: int) -> list[tuple[str, str, Agreement]]:
        """Cohen's kappa between every two judges."""
        families = [prompt.group for prompt in self.prompts]
        return [
            (judge, other, agreement(self.verdicts[judge], self.verdicts[other], families, seed))
            for judge, other in combinations(self.verdicts, 2)
        ]

    def table(self) -> pd.DataFrame:
        """One row per prompt: id, label, category, text, answer (`cut`: left off once decided), verdicts, quadrant."""
        frame = pd.DataFrame(
            {
                "id": [prompt.id for prompt in self.prompts],
                "label": [prompt.label for prompt in self.prompts],
                "category": [prompt.category for prompt in self.prompts],
                "prompt": [prompt.text for prompt in self.prompts],
                "answer": self.answers.texts,
                "quadrant": self.quadrants(),
            }
        )
        if self.answers.cut:
            frame["cut"] = self.answers.cut
        for judge, verdicts in self.verdicts.items():
            frame[f"verdict_{judge}"] = verdicts
        return frame

    def __repr__(self) -> str:
        facts = {judge: counts(self.quadrants(judge)).replace("_", " ") for judge in self.verdicts}
        return lines(f"JudgedAnswers of {self.answers.checkpoint.name}: {len(self.prompts)} prompts", facts)

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.table())


def judge_answers(prompts: Prompts, answers: Answers, judges: Judges = "phrases") -> JudgedAnswers:
    """Verdicts of the given judges, or of the one of that name and beside it both published lists; needs no model.

    A judge may be a bare function of prompts and answers, which returns one verdict on each.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:10], *ml.builtin_prompts("harmless")[:10]]
    >>> judged = ml.judge_answers(prompts, ml.answer(model, prompts, max_new_tokens=4))
    >>> set(judged.verdicts) >= {"phrases"}, len(judged.quadrants())
    (True, 20)
    """
    chosen = judges_given(judges)
    prompts = as_prompts(prompts)
    if answers.draw and len(prompts) < len(answers.ids):  # several answers to each
        prompts = drawn_prompts(prompts, max(answers.draw) + 1)
    _warn_of_thoughts(answers)
    return JudgedAnswers(
        prompts=tuple(prompts),
        answers=answers,
        verdicts={judge.name: verdicts_by(judge, prompts, answers.texts) for judge in chosen},
    )


def _warn_of_thoughts(answers: Answers) -> None:
    """One warning where answers end inside a thought: nothing can be measured on them."""
    unfinished = sum(after_thought(text) is None for text in answers.texts)
    if unfinished:
        warn(
            f"{unfinished} of {len(answers.texts)} answers end inside <think> after {answers.max_new_tokens} tokens, "
            "so they are neither refused nor accepted; give more max_new_tokens (--max-new-tokens), or keep the model "
            "from thinking, as some are by the template_arg (--template-arg) enable_thinking=false",
        )


@dataclass(frozen=True)
class FirstTokenJudgement:
    """The log-odds of refusal at the first answer token: no answer has to be generated for it."""

    tokens: RefusalTokens
    log_odds: Float[Tensor, " prompt"]
    auroc: Estimate
    """Against the judge that places the quadrants, on prompts that didn't choose the tokens."""


def refusal_tokens(judged: JudgedAnswers, rows: Sequence[int], tokenizer: Any) -> RefusalTokens:
    """First tokens of the model's own refusals among these rows; common ones where there are too few refusals."""
    first, refused = judged.answers.first_tokens, judged.refused
    spoke = [i for i in rows if first[i] != NO_TOKEN]
    if sum(refused[i] for i in spoke) < MIN_REFUSALS:
        return fallback_refusal_tokens(tokenizer)
    return find_refusal_tokens([first[i] for i in spoke], [refused[i] for i in spoke], tokenizer)


def judge_first_token(
    model: LanguageModel, judged: JudgedAnswers, acts: Activations, reference: Sequence[int]
) -> tuple[JudgedAnswers, FirstTokenJudgement]:
    """Adds the log-odds judge: refusal tokens from the model's own refusals among the `reference` rows."""
    refused = judged.refused
    tokens = refusal_tokens(judged, reference, loaded(model).tokenizer)
    scores = last_log_odds(model, acts, tokens)
    rest = [i for i in range(len(refused)) if i not in set(reference)]
    quality = auroc_estimate(scores[rest], torch.tensor(refused)[rest], [judged.prompts[i].group for i in rest])
    by_id = dict(zip(acts.ids, scores.tolist(), strict=True))
    verdicts = LogOddsJudge(by_id)(judged.prompts, judged.answers.texts)
    more = JudgedAnswers(judged.prompts, judged.answers, {**judged.verdicts, "log-odds": tuple(verdicts)})
    return more, FirstTokenJudgement(tokens, scores, quality)


def last_log_odds(model: LanguageModel, acts: Activations, tokens: RefusalTokens) -> Float[Tensor, " prompt"]:
    """First-token refusal log-odds from the residual at the last level and the last position."""
    residual = acts.at(max(acts.levels), acts.positions[-1])
    # In chunks: all logits of many prompts over a large vocabulary don't fit into memory.
    chunks = torch.split(residual, 64)
    return torch.cat([refusal_log_odds(unembed(model, chunk), tokens.ids) for chunk in chunks])
