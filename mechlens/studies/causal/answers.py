"""What the model says in words under the chosen interventions, and what they break."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.chosen_judge import judge_of, verdicts_by
from mechlens.methods.behaviour.damage import Damage, damage, repetition
from mechlens.methods.behaviour.inversion import BELIEFS, SCOPES, Belief, parse_reply
from mechlens.methods.behaviour.judges import ARDITI, ZHAO, Judge
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.conditions import answers_of_arms
from mechlens.methods.steering.interventions import Ablate, Add, ResidualNorms
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.settings import Answering
from mechlens.studies.causal.directions import HARMLESS, OPERATIONS, PUSH, Setting, intervene, pushes
from mechlens.studies.causal.readings import Condition, Resampling, Subjects, columns

REPLY_TOKENS = 8
"""Enough for the word, or for the phrase of a refusal."""


@dataclass(frozen=True)
class AnswersUnder:
    """Whole answers to the test prompts, unsteered and under every operation."""

    who: Subjects
    unsteered: Answers
    done: dict[str, Add | Ablate]
    texts: dict[str, list[str]]
    """By operation."""
    judge: Judge
    """Who decides everywhere; both published lists stand beside it."""

    @property
    def _judges(self) -> dict[str, Judge]:
        """By the end of a column's name."""
        return {"": self.judge, "_arditi": ARDITI, "_zhao": ZHAO}

    def table(self) -> pd.DataFrame:
        """One row per prompt and operation: the answer before and after, with verdicts."""
        prompts = self.who.prompts
        before = self._verdicts("verdict_before", self.unsteered.texts)
        rows = [
            {
                "id": prompt.id, "label": prompt.label, "operation": operation,
                "is_push": PUSH[prompt.label] == operation,
                **{name: verdicts[i] for name, verdicts in (before | after).items()},
                "prompt": prompt.text, "unsteered_answer": self.unsteered.texts[i], "answer": texts[i],
            }
            for operation, texts in self.texts.items()
            for after in [self._verdicts("verdict_after", texts)]
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def _verdicts(self, stem: str, texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Every judge's, by column."""
        return {f"{stem}{end}": verdicts_by(judge, self.who.prompts, texts) for end, judge in self._judges.items()}

    def damage(self, model: LanguageModel, chance: Resampling) -> pd.DataFrame:
        """Losses on harmless prompts and plain text; repetition, silence and refusals over all prompts."""
        rows = self.who.of(HARMLESS)
        own = replace(
            self.unsteered,
            ids=tuple(self.unsteered.ids[i] for i in rows),
            texts=tuple(self.unsteered.texts[i] for i in rows),
            tokens=tuple(self.unsteered.tokens[i] for i in rows),
        )
        table = []
        for operation, texts in {"none": list(self.unsteered.texts), **self.texts}.items():
            losses = damage(model, self.done.get(operation), self.who.batch.select(rows), own)
            measured = {**_losses(losses, chance), **self._in_words(model, texts, chance)}
            table += [{"operation": operation, "measure": name, **columns(found)} for name, found in measured.items()]
        return pd.DataFrame(table)

    def _in_words(self, model: LanguageModel, texts: list[str], chance: Resampling) -> dict[str, Estimate]:
        encode = loaded(model).tokenizer.encode
        repeated = torch.tensor([repetition(encode(text, add_special_tokens=False)) for text in texts]).double()
        silent = torch.tensor([not text.strip() for text in texts]).double()
        estimate = self.who.estimate
        found = {"repetition": estimate(repeated, chance), "empty": estimate(silent, chance)}
        for end, judge in self._judges.items():
            verdicts = verdicts_by(judge, self.who.prompts, texts)
            refused = torch.tensor([verdict == "refused" for verdict in verdicts]).double()
            found |= {f"refused_{label}{end}": estimate(refused, chance, self.who.of(label)) for label in PUSH}
        return found


def _losses(found: Damage, chance: Resampling) -> dict[str, Estimate]:
    values = {"plain_ce": found.plain, "own_ce": found.own, "kl": found.kl}
    return {name: chance.mean(own, [str(i) for i in range(len(own))]) for name, own in values.items()}


def answers_under(
    model: LanguageModel,
    who: Subjects,
    direction: Direction,
    setting: Setting,
    norms: ResidualNorms,
    unsteered: Answers,
    answering: Answering,
    cache: Cache | None,
) -> AnswersUnder:
    """Answers under adding, subtracting and ablating one direction at one setting."""
    done: dict[str, Add | Ablate] = {name: intervene(direction, name, setting, norms) for name in OPERATIONS}
    conditions: list[Condition] = [[one] * len(who.prompts) for one in done.values()]
    texts = answers_of_arms(model, who.batch, conditions, max_new_tokens=answering.max_new_tokens, cache=cache)
    return AnswersUnder(who, unsteered, done, dict(zip(done, texts, strict=True)), judge_of(answering.judge))


def replies(
    model: LanguageModel, who: Subjects, conditions: dict[str, Condition], cache: Cache | None
) -> dict[str, list[Belief]]:
    """What the replies to the questions say under each of the named conditions."""
    texts = answers_of_arms(model, who.asked.batch, list(conditions.values()), max_new_tokens=REPLY_TOKENS, cache=cache)
    return {name: [parse_reply(text) for text in own] for name, own in zip(conditions, texts, strict=True)}


def replies_under(
    model: LanguageModel,
    who: Subjects,
    direction: Direction,
    setting: Setting,
    norms: ResidualNorms,
    cache: Cache | None,
) -> pd.DataFrame:
    """Replies to the questions under a push, in both scopes: scope, label, belief, share."""
    done = pushes(direction, setting, norms, who.labels)
    conditions: dict[str, Condition] = {
        scope: [who.asked.within(i, one, scope) for i, one in enumerate(done)] for scope in SCOPES
    }
    return reply_table(who, replies(model, who, conditions, cache))


def reply_table(who: Subjects, said: dict[str, list[Belief]]) -> pd.DataFrame:
    """Shares of beliefs by class: scope ("none" is unsteered), label, belief, share, n."""
    return pd.DataFrame(
        [
            {"scope": scope, "label": label, "belief": belief, "share": own.count(belief) / len(own), "n": len(own)}
            for scope, beliefs in said.items()
            for label in PUSH
            for own in [[beliefs[i] for i in who.of(label)]]
            for belief in BELIEFS
        ]
    )
