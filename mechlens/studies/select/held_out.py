"""The chosen direction on test prompts: what taking it out and adding it does, beside random directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.behaviour.chosen_judge import judge_of, once_refused, verdicts_by
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction, random_like
from mechlens.methods.statistics.by_prompt import ByPrompt
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate, rate_estimate
from mechlens.methods.steering.candidates import CandidateScores, ablation, addition, score_candidates
from mechlens.methods.steering.interventions import Intervention
from mechlens.methods.steering.steering import SteeredAnswers, answer_under
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import TokenBatch
from mechlens.studies.select.config import SelectionPlan

BYPASSES, INDUCES = 0, 1
"""Which of the random controls is which."""


@dataclass(frozen=True)
class SelectionTest:
    """Scores and refusals on test prompts, where nothing was fitted or chosen."""

    chosen: Direction
    random_controls: tuple[Direction, ...]
    """Of the random candidates the best at bypassing and the best at inducing on validation; or none."""
    scores: CandidateScores
    """Of the chosen direction, the random controls where there are any, and `random_directions` of its length."""
    refused: dict[str, tuple[bool, ...]]
    """By what was done: "harmful", "harmless.added", "harmful.ablated.random_best", ...; one verdict a prompt."""
    answers: dict[str, SteeredAnswers]
    """What was said with the chosen direction taken out ("harmful.ablated") and added ("harmless.added")."""
    families: dict[str, tuple[str, ...]]
    """By class."""
    plan: SelectionPlan

    def metrics(self) -> dict[str, Estimate]:
        """Every number by its name in run.json; scores are log-odds, KL in nats, rates shares of the prompts."""
        scores = self.scores
        numbers = {
            "refusal_score.harmful": self._mean(scores.bare_harmful, "harmful"),
            "refusal_score.harmless": self._mean(scores.bare_harmless, "harmless"),
            **self._of("refusal_score.harmful.ablated", scores.bypass, "harmful", BYPASSES, lowest=True),
            **self._of("refusal_score.harmless.added", scores.induce, "harmless", INDUCES),
            **self._of("kl.harmless.ablated", scores.kl, "harmless", BYPASSES),
            "bypass_shift": self._mean(scores.bypass[0] - scores.bare_harmful, "harmful"),
            "induce_shift": self._mean(scores.induce[0] - scores.bare_harmless, "harmless"),
            "bypass_shift.beyond_chance": self._mean(scores.bypass[0] - self._rival(scores.bypass, -1.0), "harmful"),
            "induce_shift.beyond_chance": self._mean(scores.induce[0] - self._rival(scores.induce, 1.0), "harmless"),
        }
        for name, verdicts in self.refused.items():
            numbers[f"refusal_rate.{name}"] = self._rate(verdicts, name.split(".")[0])
        for name, said in self.answers.items():
            numbers[f"empty_rate.{name}"] = self._rate([not text.strip() for text in said.texts], name.split(".")[0])
        return numbers

    def by_prompt(self, ids: Mapping[str, Sequence[str]]) -> dict[str, ByPrompt]:
        """What the numbers of the chosen direction were made of; `ids` are the test prompts' of each class."""
        scores = self.scores
        rows = {
            "refusal_score.harmful": ("harmful", scores.bare_harmful),
            "refusal_score.harmless": ("harmless", scores.bare_harmless),
            "refusal_score.harmful.ablated": ("harmful", scores.bypass[0]),
            "refusal_score.harmless.added": ("harmless", scores.induce[0]),
            "kl.harmless.ablated": ("harmless", scores.kl[0]),
            "bypass_shift": ("harmful", scores.bypass[0] - scores.bare_harmful),
            "induce_shift": ("harmless", scores.induce[0] - scores.bare_harmless),
        }
        for name, flags in self.refused.items():
            rows[f"refusal_rate.{name}"] = (name.split(".")[0], torch.tensor(flags).double())
        return {name: ByPrompt(ids[label], self.families[label], values) for name, (label, values) in rows.items()}

    def _rival(self, values: Float[Tensor, "candidate prompt"], sign: float) -> Float[Tensor, " prompt"]:
        """Scores of the random direction that does best on these prompts, the best random candidate among them."""
        random = values[1:]
        return random[int((sign * random.mean(dim=1)).argmax())]

    def _of(
        self,
        name: str,
        values: Float[Tensor, "candidate prompt"],
        label: str,
        random_control: int,
        lowest: bool = False,
    ) -> dict[str, Estimate]:
        """A score of the chosen direction, its random control, and random directions: mean and extreme."""
        numbers = {name: self._mean(values[0], label)}
        numbers[f"{name}.random_best"] = self._mean(
            values[1 + random_control] if self.random_controls else torch.empty(0), label
        )
        random = values[len(values) - self.plan.random_directions :]
        means = random.mean(dim=1)
        extreme = int(means.argmin() if lowest else means.argmax())
        numbers[f"{name}.random"] = self._mean(random.mean(dim=0), label)
        numbers[f"{name}.random_{'min' if lowest else 'max'}"] = self._mean(random[extreme], label)
        return numbers

    def _rate(self, flags: Sequence[bool], label: str) -> Estimate:
        return rate_estimate(torch.tensor(list(flags)), self.families[label], self.plan.seed, self.plan.resamples)

    def _mean(self, values: Float[Tensor, " prompt"], label: str) -> Estimate:
        families = self.families[label] if len(values) else ()
        return mean_estimate(values, families, self.plan.seed, self.plan.resamples)


def run_selection_test(
    model: LanguageModel,
    batch: TokenBatch,
    refused: Sequence[bool],
    chosen: Direction,
    random_controls: Sequence[Direction],
    tokens: Sequence[int],
    plan: SelectionPlan,
    *,
    cache: Cache | None = None,
) -> SelectionTest:
    """Scores and judged answers of test prompts; `refused` are the verdicts on the answers with nothing done."""
    rows = {
        label: [i for i, prompt in enumerate(batch.prompts) if prompt.label == label]
        for label in ("harmful", "harmless")
    }
    matched = random_like(chosen, plan.random_directions, plan.seed + 3)
    scores = score_candidates(
        model, [chosen, *random_controls, *matched], batch, rows["harmful"], rows["harmless"], tokens, cache=cache
    )
    # Only random directions are cut short once they are refused: what the chosen one makes the model say is shown.
    judge = judge_of(plan.judge)
    decided = once_refused(judge, loaded(model).tokenizer, batch)
    verdicts = {label: tuple(refused[i] for i in rows[label]) for label in rows}
    answers = {}
    asked: list[tuple[Intervention, str, str]] = [
        (ablation(chosen), "harmful", "harmful.ablated"),
        (addition(chosen), "harmless", "harmless.added"),
    ]
    if random_controls:
        asked += [
            (ablation(random_controls[BYPASSES]), "harmful", "harmful.ablated.random_best"),
            (addition(random_controls[INDUCES]), "harmless", "harmless.added.random_best"),
        ]
    for done, label, name in asked:
        shown = not name.endswith("random_best")
        said = answer_under(
            model, batch.select(rows[label]), [done],
            max_new_tokens=plan.max_new_tokens, decided=None if shown else decided, cache=cache,
        )  # fmt: skip
        judged = verdicts_by(judge, [batch.prompts[i] for i in rows[label]], said.texts)
        verdicts[name] = tuple(verdict == "refused" for verdict in judged)
        if shown:
            answers[name] = said
    return SelectionTest(
        chosen=chosen,
        random_controls=tuple(random_controls),
        scores=scores,
        refused=verdicts,
        answers=answers,
        families={label: tuple(batch.prompts[i].group for i in rows[label]) for label in rows},
        plan=plan,
    )
