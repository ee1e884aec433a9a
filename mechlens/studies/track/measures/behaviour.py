"""What each checkpoint does: refusals, first-token log-odds, plain text, and how it reacts to the directions."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.behaviour.judges import RefusalTokens, refusal_log_odds
from mechlens.methods.directions.direction import Direction, project, random_like
from mechlens.methods.probing.beliefs import Centroids, beliefs, centroids
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_weights, interval, mean_estimate
from mechlens.methods.steering.interventions import Add, Intervention
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.split import Split
from mechlens.studies.shared.quadrants import QUADRANTS
from mechlens.studies.shared.two_beliefs import MIN_FOR_A_POLE, POLES
from mechlens.studies.track.measures.reference import BaseReference, TrackedConcept
from mechlens.studies.track.measures.snapshot import Snapshot

BELIEFS = {"belief_harm": "inst", "belief_refusal": ""}
"""Beliefs with their positions; empty is the last token of the prompt."""


def quadrant_table(
    steps: Sequence[int],
    acts: Sequence[Activations],
    quadrants: Sequence[Sequence[str]],
    reference: BaseReference,
    *,
    seed: int,
    n_resamples: int,
) -> pd.DataFrame:
    """Mean of each number over the held-out prompts of each quadrant, with its interval: one row each.

    Columns step, by (reference or own), number, quadrant, mean, low, high, n. "reference": the base's quadrants and
    the base's directions and centroids; "own": quadrants by the checkpoint's own answers, with directions and
    centroids fitted on the checkpoint's own activations. A row with too few prompts has n and no mean.
    """
    held_out = sorted((*reference.split.validation, *reference.split.test))
    frozen = _centroids(acts[0], quadrants[0], reference.split)
    rows = []
    for k, step in enumerate(steps):
        part = acts[k].select(held_out)
        own = _centroids(acts[k], quadrants[k], reference.split)
        for by, labels, means, fitted in (
            ("reference", quadrants[0], frozen, acts[0]),
            ("own", quadrants[k], own, acts[k]),
        ):
            numbers = _projections(part, reference, fitted) | _beliefs(part, means)
            for name, values in numbers.items():
                for quadrant in QUADRANTS:
                    inside = [i for i, row in enumerate(held_out) if labels[row] == quadrant]
                    rows.append(
                        {"step": step, "by": by, "number": name, "quadrant": quadrant,
                         **_mean(values, inside, part.families, seed, n_resamples)}
                    )  # fmt: skip
    return pd.DataFrame(rows, columns=["step", "by", "number", "quadrant", "mean", "low", "high", "n"])


def _centroids(acts: Activations, quadrants: Sequence[str], split: Split) -> dict[str, Centroids]:
    """By belief; none where a pole has too few training prompts."""
    train = replace(acts, labels=tuple(quadrants)).select(split.train)
    if min(train.labels.count(name) for name in POLES) < MIN_FOR_A_POLE:
        return {}
    return {name: centroids(train, *POLES, position or acts.positions[-1]) for name, position in BELIEFS.items()}


def _projections(part: Activations, reference: BaseReference, fitted: Activations) -> dict[str, Tensor]:
    """Along each concept's direction at its home, in units of the residual stream."""
    found = {}
    for concept in reference.measurable:
        direction = concept.direction(fitted, reference.split)
        found[f"projection_{concept.name}"] = project(part.at(direction.level, direction.position), direction).double()
    return found


def _beliefs(part: Activations, means: dict[str, Centroids]) -> dict[str, Tensor]:
    found = {}
    for name in BELIEFS:
        if name in means:
            found[name] = beliefs(part, means[name], centered=False, skip_embedding=False)
            found[f"{name}.centered"] = beliefs(part, means[name], centered=True, skip_embedding=True)
    return found


def _mean(
    values: Tensor, inside: list[int], families: Sequence[str], seed: int, n_resamples: int
) -> dict[str, float | int]:
    if len(inside) < MIN_FOR_A_POLE:
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": len(inside)}
    found = mean_estimate(torch.as_tensor(values)[inside], [families[i] for i in inside], seed, n_resamples)
    return {"mean": found.value, "low": found.low, "high": found.high, "n": found.n}


NONE = "none"


def steered_log_odds(
    model: LanguageModel,
    batch: TokenBatch,
    directions: dict[str, Direction],
    tokens: RefusalTokens,
    *,
    n_random: int,
    seed: int,
) -> dict[str, Tensor]:
    """Refusal log-odds of each prompt with each direction added once at `inst` and all tokens after it.

    Settings: none, each name of `directions`, and NAME.random.K with random directions of the same length for
    every name that ends in ".reference".
    """
    settings: dict[str, Direction | None] = {NONE: None, **directions}
    for name, direction in directions.items():
        if name.endswith(".reference"):
            stem = name.removesuffix(".reference")
            drawn = random_like(direction, n_random, seed)
            settings |= {f"{stem}.random.{k}": one for k, one in enumerate(drawn)}
    names = list(settings)
    rows = [i for _ in names for i in range(len(batch.prompts))]
    plans = [_added(settings[name], n_layers(model)) for name in names for _ in batch.prompts]
    found = logits_under(
        model, batch.select(rows), plans, force=True,
        reduce=lambda logits, _: refusal_log_odds(logits, tokens.ids)[:, None],
    )  # fmt: skip
    return dict(zip(names, found[:, 0].reshape(len(names), -1), strict=True))


def _added(direction: Direction | None, depth: int) -> list[Intervention]:
    if direction is None or direction.norm == 0:
        return []
    # The last level is nobody's input, but the last block's output.
    layer, site = (depth - 1, "resid_post") if direction.level == depth else (direction.level, "resid_pre")
    where = ("inst", "post[*]")
    return [Add(direction, strength=1.0, unit="raw", layers=(layer,), positions=where, phase="prompt", site=site)]


def behaviour_table(
    found: Sequence[Snapshot], reference: BaseReference, *, seed: int, n_resamples: int
) -> pd.DataFrame:
    """One row for each checkpoint and number: step, number, value, low, high, n, and the change from the base.

    Refusal rates and empty answers on all prompts; log-odds on those that chose no refusal tokens; changes are paired
    by prompt.
    """
    prompts = reference.judged.prompts
    rest = sorted((*reference.split.validation, *reference.split.test))
    kinds = {kind: [i for i, prompt in enumerate(prompts) if prompt.label == kind] for kind in ("harmful", "harmless")}
    rows = []
    for one in found:
        for kind, members in kinds.items():
            now, before = (refused_by(each)[members] for each in (one, found[0]))
            families = [prompts[i].group for i in members]
            rows.append(_row(one.step, f"refusal_rate.{kind}", now, before, families, seed, n_resamples))
            now, before = (_silent(each)[members] for each in (one, found[0]))
            rows.append(_row(one.step, f"empty_rate.{kind}", now, before, families, seed, n_resamples))
            inside = [i for i in members if i in rest]
            now, before = (each.log_odds[inside] for each in (one, found[0]))
            families = [prompts[i].group for i in inside]
            rows.append(_row(one.step, f"log_odds.{kind}", now, before, families, seed, n_resamples))
        texts = [str(i) for i in range(len(one.text_loss))]
        rows.append(_row(one.step, "text_loss", one.text_loss, found[0].text_loss, texts, seed, n_resamples))
    return pd.DataFrame(rows)


def refused_by(found: Snapshot) -> Float[Tensor, " prompt"]:
    """1 where the checkpoint refuses, by the judge that places the quadrants."""
    return torch.tensor([verdict == "refused" for verdict in found.verdicts], dtype=torch.float64)


def _silent(found: Snapshot) -> Float[Tensor, " prompt"]:
    return torch.tensor([not text.strip() for text in found.answers.texts], dtype=torch.float64)


def gaps(
    one: Snapshot, base: Snapshot, concept: TrackedConcept, *, seed: int, n_resamples: int
) -> tuple[Estimate, Estimate]:
    """Refusal rate of the concept's positive prompts minus that of its negative ones, and its change from the base.

    What the model does with the difference that the concept is about. Paired bootstrap over families.
    """
    rows = [i for i, label in enumerate(concept.labels) if label in concept.contrast]
    positive = torch.tensor([concept.labels[i] == concept.contrast[0] for i in rows])
    families, labels = [one.acts.families[i] for i in rows], [concept.labels[i] for i in rows]
    drawn = family_weights(families, n_resamples, seed, labels)
    weights = torch.cat([torch.ones(1, len(rows), dtype=torch.float64), drawn])
    now, before = (_gap(refused_by(each)[rows], positive, weights) for each in (one, base))
    return _estimate(now, len(rows)), _estimate(now - before, len(rows))


def _gap(refused: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    up, down = weights * positive, weights * ~positive
    return up @ refused / up.sum(dim=1) - down @ refused / down.sum(dim=1)


def _estimate(draws: Tensor, n: int) -> Estimate:
    bounds = interval(draws[1:])
    return Estimate(float(draws[0]), float(bounds.low), float(bounds.high), n)


def effect_table(found: Sequence[Snapshot], families: Sequence[str], *, seed: int, n_resamples: int) -> pd.DataFrame:
    """How far adding each direction once moves the refusal log-odds: step, concept, direction, effect, low, high, n.

    `reference` is the base's direction, `own` the checkpoint's; `random_mean` and `random_maximum` are over random
    directions of the reference's length, the mean effect of each counted without its sign.
    """
    rows = []
    for one in found:
        shifts = {name: odds - one.steered[NONE] for name, odds in one.steered.items() if name != NONE}
        for name, shift in shifts.items():
            concept, _, which = name.partition(".")
            if which in ("reference", "own"):
                effect = mean_estimate(shift, families, seed, n_resamples)
                random = [abs(float(s.mean())) for n, s in shifts.items() if n.startswith(f"{concept}.random.")]
                rows.append(
                    {"step": one.step, "concept": concept, "direction": which, "effect": effect.value,
                     "low": effect.low, "high": effect.high, "n": effect.n,
                     "random_mean": sum(random) / len(random), "random_maximum": max(random)}
                )  # fmt: skip
    return pd.DataFrame(rows)


def _row(
    step: int, number: str, values: Tensor, before: Tensor, families: Sequence[str], seed: int, n_resamples: int
) -> dict[str, float | int | str]:
    found = mean_estimate(values, families, seed, n_resamples)
    change = mean_estimate(values - before, families, seed, n_resamples)
    return {
        "step": step, "number": number, "value": found.value, "low": found.low, "high": found.high, "n": found.n,
        "change": change.value, "change_low": change.low, "change_high": change.high,
    }  # fmt: skip
