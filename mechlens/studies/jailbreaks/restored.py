"""Does an attack stop working when the plain request's component along a direction is put back?

Directional patching: at the level and position where a direction is read, the component of a successful attack's
residual along it is set to that of the plain request. Random directions, treated alike, are the null.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.behaviour.judges import refusal_log_odds
from mechlens.methods.directions.direction import Direction, project, random_like
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.methods.steering.interventions import Intervention, ReplaceComponent
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.models.bridge import LanguageModel
from mechlens.studies.jailbreaks.config import JailbreakPlan
from mechlens.studies.jailbreaks.pairs import MIN_PAIRS, OrdinaryPrompts, Pairs
from mechlens.studies.shared.quadrants import judge_answers

WAYS = ("harmfulness", "refusal", "both")


@dataclass(frozen=True)
class RestoredComponents:
    """Log-odds of refusal and verdicts of successful attacks, as they are and with a component put back."""

    rows: tuple[int, ...]
    """Of the attacks in `Pairs`."""
    families: tuple[str, ...]
    goals: tuple[str, ...]
    before: Float[Tensor, " attack"]
    """Log-odds that the answer begins with a refusal."""
    after: dict[str, Float[Tensor, " attack"]]
    """By way: harmfulness, refusal, both."""
    refused: dict[str, tuple[bool, ...]]
    random: dict[str, Float[Tensor, "direction attack"]]
    """Log-odds with the component along random directions put back, at the place of harmfulness and of refusal."""

    def table(self, plan: JailbreakPlan) -> pd.DataFrame:
        """One row a family and way: change of the log-odds, share refused again, the random directions' changes."""
        rows = []
        for family in dict.fromkeys(self.families):
            rows_of_family = [i for i, name in enumerate(self.families) if name == family]
            for way in WAYS:
                change = self._mean(self.after[way] - self.before, rows_of_family, plan)
                again = self._mean(torch.tensor(self.refused[way]).double(), rows_of_family, plan)
                null = [float((draw - self.before)[rows_of_family].mean()) for draw in self.random.get(way, ())]
                rows.append(
                    {
                        "family": family, "way": way, "n": len(rows_of_family),
                        "log_odds_change": change.value, "low": change.low, "high": change.high,
                        "refused_again": again.value, "again_low": again.low, "again_high": again.high,
                        "random_mean": sum(null) / len(null) if null else float("nan"),
                        "random_maximum": max(null, default=float("nan")),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def _mean(self, values: Float[Tensor, " attack"], rows: Sequence[int], plan: JailbreakPlan) -> Estimate:
        goals = [self.goals[i] for i in rows]
        return mean_estimate(values[list(rows)], goals, plan.seed, plan.resamples, least=MIN_PAIRS)


def restore(
    model: LanguageModel, pairs: Pairs, reference: OrdinaryPrompts, plan: JailbreakPlan
) -> RestoredComponents | None:
    """Puts components back into the first successful attacks of every family; None where no attack succeeded."""
    rows = [
        row
        for family in pairs.families
        for row in [i for i in pairs.family(family) if pairs.succeeded(i)][: plan.restored]
    ]
    if not rows:
        return None
    batch = pairs.batch.select(rows)
    tokens = reference.first_token.tokens.ids

    def log_odds(interventions: list[list[Intervention]]) -> Tensor:
        odds = logits_under(
            model, batch, interventions, reduce=lambda logits, _: refusal_log_odds(logits, tokens)[:, None]
        )
        return odds[:, 0]

    directions = {"harmfulness": reference.harm_direction, "refusal": reference.refusal_direction}
    single = {way: _put_back(pairs, rows, direction) for way, direction in directions.items()}
    ways: dict[str, list[list[Intervention]]] = {way: [[edit] for edit in single[way]] for way in directions}
    ways["both"] = [list(two) for two in zip(*single.values(), strict=True)]
    answers = {way: answer_under(model, batch, done, max_new_tokens=plan.max_new_tokens) for way, done in ways.items()}
    random = {
        way: torch.stack(
            [
                log_odds([[edit] for edit in _put_back(pairs, rows, draw)])
                for draw in random_like(direction, plan.random_directions, plan.seed)
            ]
        )
        for way, direction in directions.items()
    }
    return RestoredComponents(
        rows=tuple(rows),
        families=tuple(pairs.attacks[i].source for i in rows),
        goals=tuple(pairs.goals[pairs.goal_of[i]].id for i in rows),
        before=log_odds([[] for _ in rows]),
        after={way: log_odds(done) for way, done in ways.items()},
        refused={way: judge_answers(batch.prompts, said, plan.judge).refused for way, said in answers.items()},
        random=random,
    )


def _put_back(pairs: Pairs, rows: Sequence[int], direction: Direction) -> list[ReplaceComponent]:
    """One intervention an attack: the component along the direction becomes that of its plain request."""
    values = project(pairs.goal_acts.at(direction.level, direction.position).double(), direction)
    retold = replace(direction, template=pairs.attack_acts.template)
    return [
        ReplaceComponent(
            retold,
            value=float(values[pairs.goal_of[row]]),
            unit="unit",
            layers=(direction.level,),
            positions=(direction.position,),
            phase="prompt",
        )
        for row in rows
    ]
