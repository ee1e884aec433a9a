"""What every rival does to prompts: refusals, first answer tokens, damage, and what the controllers decide."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.chosen_judge import judge_of, once_refused, verdicts_by
from mechlens.methods.behaviour.damage import PLAIN_TEXT, answer_losses, repetition, said_texts
from mechlens.methods.behaviour.judges import refusal_log_odds
from mechlens.methods.cache import Cache
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.resample import mean_estimate, rate_estimate
from mechlens.methods.steering.controllers.controller import Controlled
from mechlens.methods.steering.controllers.fit import read_values, values_at
from mechlens.methods.steering.interventions import Intervention
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.controllers.config import RivalsPlan
from mechlens.studies.controllers.rivals import CONTROLLER, NONE, Rivals, randomly, shuffled
from mechlens.studies.controllers.verdict import gap_estimates

DAMAGED = 24
"""Harmless test prompts on whose own answers damage is measured."""
ASK = "Tell me something about everyday life."
"""What plain text is taken to answer, where the loss on it is measured."""


def strengths_tried(
    model: LanguageModel, batch: TokenBatch, rivals: Rivals, plan: RivalsPlan, cache: Cache | None
) -> pd.DataFrame:
    """Refused shares of validation prompts under every rival at every strength."""
    rows = []
    for name, at in rivals.at.items():
        for strength in (0.0,) if name == NONE else plan.strengths:
            flags = _refused(model, batch, at(strength), plan, cache)[1]
            harmful = torch.tensor([prompt.label == "harmful" for prompt in batch.prompts])
            up, down = float(flags[harmful].double().mean()), float(flags[~harmful].double().mean())
            rows.append({"rival": name, "strength": strength, "harmful": up, "harmless": down, "difference": up - down})
    return pd.DataFrame(rows)


def chosen_strengths(choice: pd.DataFrame) -> dict[str, float]:
    """Of each rival the weakest of those that tell validation prompts apart best."""
    ordered = choice.sort_values(["difference", "strength"], ascending=[False, True], kind="stable")
    best = ordered.groupby("rival", sort=False).first()["strength"]
    return {name: float(best[name]) for name in dict.fromkeys(choice["rival"])}


def _refused(
    model: LanguageModel, batch: TokenBatch, given: Sequence[Intervention], plan: RivalsPlan, cache: Cache | None,
    *, whole: bool = False,
) -> tuple[Answers, Bool[Tensor, " prompt"]]:  # fmt: skip
    """Answers under a rival, and which refuse; written to their end where they are `whole`."""
    judge = judge_of(plan.judge)
    decided = None if whole else once_refused(judge, loaded(model).tokenizer, batch)
    said = answer_under(model, batch, list(given), max_new_tokens=plan.max_new_tokens, decided=decided, cache=cache)
    verdicts = verdicts_by(judge, batch.prompts, said.texts)
    return said, torch.tensor([verdict == "refused" for verdict in verdicts])


def answered(
    model: LanguageModel,
    test: TokenBatch,
    rivals: Rivals,
    strengths: Mapping[str, float],
    plan: RivalsPlan,
    cache: Cache | None,
) -> tuple[dict[str, Answers], dict[str, Bool[Tensor, " prompt"]]]:
    """What is said to test prompts under every rival, and what of it refuses."""
    found = {
        name: _refused(model, test, at(strengths[name]), plan, cache, whole=True) for name, at in rivals.at.items()
    }
    return {name: said for name, (said, _) in found.items()}, {name: flags for name, (_, flags) in found.items()}


def by_first_token(
    model: LanguageModel,
    test: TokenBatch,
    rivals: Rivals,
    strength: float,
    harmful: Bool[Tensor, " prompt"],
    tokens: Sequence[int],
    plan: RivalsPlan,
    cache: Cache | None,
) -> tuple[Float[Tensor, "order prompt"], pd.DataFrame]:
    """Probabilities that a refusal begins, of the controller and of orders of its weights; and all gaps as a table."""
    own = rivals.controller
    orders = [shuffled(own, rivals.mean_weights, plan.seed + 1 + k) for k in range(plan.draws)]
    random = [randomly(own, plan.seed + 1 + k) for k in range(plan.draws)]
    kinds = ["its own", *["another order"] * plan.draws, *["random directions"] * plan.draws]
    values = []
    for one in (own, *orders, *random):
        logits = logits_under(model, test, [Controlled(one, strength=strength)], cache=cache)
        values.append(refusal_log_odds(logits, tokens).sigmoid())
    stacked = torch.stack(values)
    families = [prompt.group for prompt in test.prompts]
    found, _ = gap_estimates(stacked, harmful, families, resamples=plan.resamples, seed=plan.seed)
    rows = [{"weights": kind, **one.beside("gap")} for kind, one in zip(kinds, found, strict=True)]
    return stacked[: 1 + plan.draws], pd.DataFrame(rows)


def refusals_by_source(
    refused: Mapping[str, Bool[Tensor, " prompt"]], places: Sequence[str], prompts: Sequence[Prompt], plan: RivalsPlan
) -> pd.DataFrame:
    rows = []
    for name, flags in refused.items():
        for place in dict.fromkeys(places):
            for label in ("harmful", "harmless"):
                at = [i for i, one in enumerate(prompts) if places[i] == place and one.label == label]
                share = rate_estimate(flags[at], [prompts[i].group for i in at], plan.seed, plan.resamples)
                rows.append({"rival": name, "prompts": place, "label": label, **share.beside("refused"), "n": share.n})
    return pd.DataFrame(rows)


def totals(
    model: LanguageModel,
    template: ChatTemplate,
    test: TokenBatch,
    rivals: Rivals,
    strengths: Mapping[str, float],
    answers: Mapping[str, Answers],
    refused: Mapping[str, Bool[Tensor, " prompt"]],
    plan: RivalsPlan,
) -> pd.DataFrame:
    """What each rival does in all: refusals, damage to harmless answers and plain text, length and repetition."""
    harmful = torch.tensor([prompt.label == "harmful" for prompt in test.prompts])
    families = [prompt.group for prompt in test.prompts]
    found, _ = gap_estimates(
        torch.stack([refused[name].double() for name in rivals.at]), harmful, families,
        resamples=plan.resamples, seed=plan.seed,
    )  # fmt: skip
    harmless = (~harmful).nonzero().flatten().tolist()
    damaged = harmless[:: max(1, len(harmless) // DAMAGED)][:DAMAGED]
    texts = tokenize([Prompt(f"plain{i}", ASK) for i in range(len(PLAIN_TEXT))], template)
    shown, own_answers = said_texts(model, texts, PLAIN_TEXT), answers[NONE].select(damaged)
    groups = [families[i] for k, i in enumerate(damaged) if own_answers.tokens[k]]
    each, other = [families[i] for i in harmless], [str(k) for k in range(len(PLAIN_TEXT))]
    rows = []
    for i, name in enumerate(progress_bar(rivals.at, title="what steering costs", unit="rival")):
        given = [rivals.at[name](strengths[name])]
        kl = answer_losses(model, given, test.select(damaged), own_answers)[0, 1]
        plain_loss, plain_kl = answer_losses(model, given, texts, shown)[0]
        said = [answers[name].tokens[k] for k in harmless]
        amounts = {
            "kl": (kl, groups), "plain_kl": (plain_kl, other), "plain_loss": (plain_loss, other),
            "tokens": (torch.tensor([float(len(own)) for own in said]), each),
            "repetition": (torch.tensor([repetition(own) for own in said]), each),
        }  # fmt: skip
        row: dict[str, str | float] = {"rival": name, "strength": strengths[name], **found[i].beside("gap")}
        for amount, (values, own) in amounts.items():
            row |= mean_estimate(values, own, plan.seed, plan.resamples).beside(amount)
        rows.append(row)
    return pd.DataFrame(rows)


def decisions(
    model: LanguageModel, test: TokenBatch, rivals: Rivals, places: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """By test prompt the gates of both controllers and whether the condition holds; and mean layer weights."""
    labels = [str(prompt.label) for prompt in test.prompts]
    own, theirs = rivals.controller, rivals.published
    said = {name: one.decide(read_values(model, test, one)) for name, one in ((CONTROLLER, own), ("published", theirs))}
    at = values_at(model, test, rivals.condition.places)
    table = pd.DataFrame({
        "id": [prompt.id for prompt in test.prompts], "prompts": places, "label": labels,
        "gate": said[CONTROLLER][0].tolist(), "published_gate": said["published"][0].tolist(),
        "condition": rivals.condition(at).tolist(),
    })  # fmt: skip
    rows = []
    for name, one in ((CONTROLLER, own), ("published", theirs)):
        for label in ("harmful", "harmless"):
            mean = said[name][1][[own_label == label for own_label in labels]].mean(dim=0)
            rows += [
                {"controller": name, "layer": layer, "label": label, "weight": float(weight)}
                for layer, weight in zip(one.layers, mean, strict=True)
            ]
    return table, pd.DataFrame(rows)


def answers_table(
    answers: Mapping[str, Answers],
    refused: Mapping[str, Bool[Tensor, " prompt"]],
    prompts: Sequence[Prompt],
    places: Sequence[str],
) -> pd.DataFrame:
    """Every answer under every rival, and whether it refuses."""
    rows = [
        {"rival": name, "id": prompt.id, "prompts": place, "label": prompt.label, "prompt": prompt.text,
         "answer": text, "refused": flag}
        for name, said in answers.items()
        for prompt, place, text, flag in zip(prompts, places, said.texts, refused[name].tolist(), strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)
