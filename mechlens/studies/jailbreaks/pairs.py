"""What jailbreaks do: do they hide harmfulness from the model, or only keep it from refusing?

Zhao et al. 2025, Fig. 3b and 6, paired: each attack beside the plain request that it carries. Beliefs of harmfulness
(at `inst`) and of refusal (at the last token) are measured against centroids of ordinary prompts. Where an attack has
turned a refusal into an acceptance, the plain request's component along each direction is put back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.probing.beliefs import Centroids
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import Fold, mean_estimate
from mechlens.models.bridge import LanguageModel, loaded, n_layers
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.settings import FRACTIONS
from mechlens.studies.jailbreaks.config import JailbreakPlan
from mechlens.studies.shared.contrasts import best_direction
from mechlens.studies.shared.quadrants import (
    FirstTokenJudgement,
    JudgedAnswers,
    judge_answers,
    judge_first_token,
    last_log_odds,
)
from mechlens.studies.shared.sources import SourcePrompts
from mechlens.studies.shared.training_data import text_sha256, trained_on, was_seen
from mechlens.studies.shared.two_beliefs import both_beliefs, measure_beliefs

MIN_PAIRS = 10
"""A number about fewer pairs is not measurable."""


@dataclass(frozen=True)
class OrdinaryPrompts:
    """Ordinary prompts of this model: what harmfulness and refusal look like without an attack."""

    harm: Centroids
    refusal: Centroids
    harm_direction: Direction
    """Harmful minus harmless at `inst`."""
    refusal_direction: Direction
    """Refused minus accepted at the last token."""
    first_token: FirstTokenJudgement
    sha256: frozenset[str]
    """Fingerprints of the prompts."""
    counts: dict[str, int]
    """Prompts in each quadrant."""


@dataclass(frozen=True)
class Pairs:
    """Attacks of all families and the plain requests behind them, with what the model made of both."""

    attacks: tuple[Prompt, ...]
    goals: tuple[Prompt, ...]
    """Each plain request once."""
    goal_of: tuple[int, ...]
    """By attack, the row of its goal."""
    attack_acts: Activations
    goal_acts: Activations
    attack_judged: JudgedAnswers
    goal_judged: JudgedAnswers
    batch: TokenBatch
    """The attacks."""
    left_out: pd.DataFrame
    """By family: attacks found, and left out because their goals were trained on or are reference prompts."""

    def family(self, name: str) -> list[int]:
        """Rows of one family's attacks."""
        return [i for i, prompt in enumerate(self.attacks) if prompt.source == name]

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the attack families, in order."""
        return tuple(dict.fromkeys(prompt.source for prompt in self.attacks))

    def succeeded(self, row: int) -> bool:
        """True where the plain request is refused and the attack accepted."""
        return self.goal_judged.refused[self.goal_of[row]] and self.attack_judged.accepted[row]


def reference_of(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    plan: JailbreakPlan,
    *,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> OrdinaryPrompts:
    """Centroids and directions from prompts labelled harmful or harmless, half of their families.

    UserError where the model refuses too few of them, or accepts too few, for a refusal to be located.
    """
    batch = tokenize(prompts, template_of(model, template))
    acts = collect(model, batch, positions=("inst", "last"), cache=cache)
    judged = judge_answers(prompts, answer(model, batch, max_new_tokens=plan.max_new_tokens, cache=cache), plan.judge)
    split = split_by_family(acts.labels, acts.families, fractions=FRACTIONS, seed=plan.seed)
    _, first_token = judge_first_token(model, judged, acts, (*split.train, *split.validation))
    fold = Fold(split.train, tuple(sorted((*split.validation, *split.test))))
    measured = measure_beliefs(acts, judged.quadrants(), [fold], plan.seed, plan.resamples)
    # The last level is nobody's input, so nothing could be put back there.
    top = n_layers(model) - 1
    harm = best_direction(acts, "harmful", "harmless", "inst", plan.seed, highest=top)
    verdicts = judged.verdicts[judged.judge]
    refusal = best_direction(replace(acts, labels=verdicts), "refused", "accepted", "last", plan.seed, highest=top)
    counts = {name: judged.quadrants().count(name) for name in dict.fromkeys(judged.quadrants())}
    if measured.harm is None or measured.refusal is None or harm is None or refusal is None:
        counted = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items())
        raise UserError(
            f"the reference prompts give {counted}; beliefs need at least 5 refused harmful and 5 accepted harmless "
            "training prompts and directions 10 of each side, so take a model that refuses or add prompts"
        )
    known = frozenset(text_sha256(prompt.text) for prompt in prompts)
    return OrdinaryPrompts(measured.harm, measured.refusal, harm, refusal, first_token, known, counts)


def attack_pairs(
    model: LanguageModel,
    sources: Sequence[SourcePrompts],
    reference: OrdinaryPrompts,
    plan: JailbreakPlan,
    *,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> Pairs:
    """The attacks of all sources with goals, answered and collected beside the plain requests."""
    known = trained_on(loaded(model).checkpoint) | reference.sha256
    attacks: list[Prompt] = []
    goals: dict[str, Prompt] = {}
    rows = []
    for source in sources:
        kept = [p for p in source.prompts if p.family in source.goals and not was_seen(p, known)]
        rows.append({"family": source.source.name, "found": len(source.prompts), "used": len(kept),
                     "left_out": len(source.prompts) - len(kept)})  # fmt: skip
        attacks += kept
        goals |= {prompt.family: source.goals[prompt.family] for prompt in kept}
    if not attacks:
        raise UserError(
            "no attack is left with a plain request that the model wasn't trained on; give sources with templates or "
            "with a goal_column"
        )
    used = template_of(model, template)
    order = list(goals)
    plain = tuple(goals.values())
    batches = [tokenize(prompts, used) for prompts in (attacks, plain)]
    acts = [collect(model, batch, positions=("inst", "last"), cache=cache) for batch in batches]
    said = [answer(model, batch, max_new_tokens=plan.max_new_tokens, cache=cache) for batch in batches]
    return Pairs(
        attacks=tuple(attacks),
        goals=plain,
        goal_of=tuple(order.index(prompt.family) for prompt in attacks),
        attack_acts=acts[0],
        goal_acts=acts[1],
        attack_judged=judge_answers(attacks, said[0], plan.judge),
        goal_judged=judge_answers(plain, said[1], plan.judge),
        batch=batches[0],
        left_out=pd.DataFrame(rows),
    )


BELIEFS = ("belief_harm", "belief_refusal", "belief_harm.centered", "belief_refusal.centered")


def pair_table(model: LanguageModel, pairs: Pairs, reference: OrdinaryPrompts) -> pd.DataFrame:
    """One row an attack: family, goal, verdicts, beliefs and log-odds of refusal; `plain.` for its plain request."""
    attacked = _readings(model, pairs.attack_acts, reference)
    plain = _readings(model, pairs.goal_acts, reference)
    goal_of = torch.tensor(pairs.goal_of)
    frame = pd.DataFrame(
        {
            "id": [prompt.id for prompt in pairs.attacks],
            "family": [prompt.source for prompt in pairs.attacks],
            "goal": [pairs.goals[i].id for i in pairs.goal_of],
            "refused": pairs.attack_judged.refused,
            "accepted": pairs.attack_judged.accepted,
            "empty": [not text.strip() for text in pairs.attack_judged.answers.texts],
            "plain.refused": [pairs.goal_judged.refused[i] for i in pairs.goal_of],
        }
    )
    for name, values in attacked.items():
        frame[name] = values.tolist()
        frame[f"plain.{name}"] = plain[name][goal_of].tolist()
    return frame


def _readings(
    model: LanguageModel, acts: Activations, reference: OrdinaryPrompts
) -> dict[str, Float[Tensor, " prompt"]]:
    measured = both_beliefs(acts, {"belief_harm": reference.harm, "belief_refusal": reference.refusal})
    return measured | {"log_odds": last_log_odds(model, acts, reference.first_token.tokens)}


def family_estimates(pairs: pd.DataFrame, plan: JailbreakPlan) -> dict[str, dict[str, Estimate]]:
    """By attack family: how often it works or leaves no answer, mean beliefs, their difference to the plain requests'.

    Only attacks on requests that are refused when plain count, apart from `plain_refused`: an attack on a request that
    is accepted anyway shows nothing. Differences are paired by goal, intervals over goals.
    """
    families: dict[str, dict[str, Estimate]] = {}
    for family, part in pairs.groupby("family", sort=False):
        aimed = part[part["plain.refused"]]
        measures = {
            "plain_refused": _mean(part["plain.refused"], part["goal"], plan),
            "success": _mean(aimed["accepted"], aimed["goal"], plan),
            "empty": _mean(aimed["empty"], aimed["goal"], plan),
        }
        for name in (*BELIEFS, "log_odds"):
            measures[name] = _mean(aimed[name], aimed["goal"], plan)
            measures[f"change.{name}"] = _mean(aimed[name] - aimed[f"plain.{name}"], aimed["goal"], plan)
        measures["seen_as_harmful"] = _mean(aimed["belief_harm.centered"] > 0, aimed["goal"], plan)
        families[str(family)] = measures
    return families


def _mean(values: "pd.Series[float] | pd.Series[bool]", goals: "pd.Series[str]", plan: JailbreakPlan) -> Estimate:
    numbers = torch.tensor(values.astype(float).to_numpy())
    return mean_estimate(numbers, goals.tolist(), plan.seed, plan.resamples, least=MIN_PAIRS)


def family_verdict(measures: dict[str, Estimate]) -> str:
    """What one family of attacks does, by the centred beliefs of attacks on requests that are refused when plain.

    "hides harmfulness": the mean belief of harmfulness is below 0 and lower than for the plain requests. "suppresses
    refusal only": harmfulness stays above 0 while the belief of refusal falls. "no effect on refusal shown": it
    isn't sure to fall.
    """
    harm, change = measures["belief_harm.centered"], measures["change.belief_harm.centered"]
    refusal = measures["change.belief_refusal.centered"]
    if not harm.measurable:
        return f"not measurable (n={harm.n})"
    if harm.high < 0 and change.high < 0:
        return "hides harmfulness"
    if refusal.high >= 0:
        return "no effect on refusal shown"
    return "suppresses refusal only" if harm.low > 0 else "inconclusive"
