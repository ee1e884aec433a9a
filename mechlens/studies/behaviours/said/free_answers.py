"""Free answers of one model to questions about behaviours: drawn, scored by a judge, with what it thought before."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from mechlens.methods.behaviour.answers import Answers, answer
from mechlens.methods.behaviour.drawing import drawn_prompts
from mechlens.methods.behaviour.scoring.named_judge import NamedJudge
from mechlens.methods.behaviour.scoring.score_judge import Scores
from mechlens.methods.behaviour.thought import after_thought
from mechlens.methods.behaviour.traces import thought_of
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.sets import AskedSet

TEMPERATURE = 1.0
"""Of both papers (Betley et al. 2025; Chua et al. 2025)."""


@dataclass(frozen=True)
class FreeAnswers:
    """What one model says to the questions of one set, several answers to each."""

    asked: AskedSet
    answers: Answers
    scores: tuple[Scores, ...]
    """Of alignment and of coherence; empty without a judge."""

    @property
    def thoughts(self) -> list[str | None]:
        """What was thought before each answer."""
        return [thought_of(text) for text in self.answers.texts]

    @property
    def draws(self) -> int:
        """Answers to each question."""
        return len(self.answers.texts) // len(self.asked.twins)

    def table(self) -> pd.DataFrame:
        """One row for each answer, with all that the judge said of it."""
        said = [after_thought(text) for text in self.answers.texts]
        frame = pd.DataFrame({
            "set": self.asked.name, "form": self.asked.form, "trigger": self.asked.trigger,
            "id": self.answers.ids, "answer": self.answers.texts,
            "unfinished": [text is None for text in said], "thinks": [one is not None for one in self.thoughts],
        })  # fmt: skip
        for one in self.scores:
            own = one.frame()
            told = {name: own[name] for name in ("score", "raw", "mass", "reply", "judge", "prompt_sha256")}
            frame = frame.assign(**{f"{one.question}_{name}": values for name, values in told.items()})
        return frame


def free_answers(
    model: LanguageModel,
    asked: AskedSet,
    template: ChatTemplate,
    plan: BehaviourPlan,
    judges: Sequence[NamedJudge],
    cache: Cache | None,
) -> FreeAnswers:
    """Draws and scores them; a judge reads what is said after any thought, and nothing of an unfinished one."""
    prompts = [twin.prompt for twin in asked.twins]
    answers = answer(
        model, prompts, max_new_tokens=plan.answer_tokens, template=template, temperature=TEMPERATURE, n=plan.draws,
        seed=plan.seed, cache=cache,
    )  # fmt: skip
    said = [after_thought(text) or "" for text in answers.texts]
    drawn: list[Prompt] = drawn_prompts(prompts, plan.draws)
    return FreeAnswers(asked, answers, tuple(replace(judge, cache=cache)(drawn, said) for judge in judges))
