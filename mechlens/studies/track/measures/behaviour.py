"""What each checkpoint does: refusals, first-token log-odds, plain text, and how it reacts to the directions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.behaviour.chosen_judge import judges_of, verdicts_by
from mechlens.methods.behaviour.judges import Judge, RefusalTokens, refusal_log_odds
from mechlens.methods.directions.direction import Direction, project, random_like
from mechlens.methods.probing.beliefs import Centroids, centroids
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate, of_sample, rate_estimate, sample_and_resamples
from mechlens.methods.steering.interventions import Add, Intervention
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split
from mechlens.studies.shared.quadrants import QUADRANTS
from mechlens.studies.shared.two_beliefs import MIN_FOR_A_POLE, POLES, both_beliefs
from mechlens.studies.track.measures.reference import BaseReference, TrackedConcept
from mechlens.studies.track.measures.snapshot import Snapshot

MIN_TOLD = 0.8
"""A rate of fewer of the answers than this share, the others being unclear or unfinished, is not measurable."""
BELIEFS = {"belief_harm": "inst", "belief_refusal": ""}
"""Beliefs with their positions; empty is the last token of the prompt."""


def quadrant_table(
    steps: Sequence[int],
    acts: Sequence[Activations],
    quadrants: Sequence[Sequence[str]],
    reference: BaseReference,
    *,
    seed: int,
    resamples: int,
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
        refitted = _centroids(acts[k], quadrants[k], reference.split)
        for by, labels, means, fitted in (
            ("reference", quadrants[0], frozen, acts[0]),
            ("own", quadrants[k], refitted, acts[k]),
        ):
            numbers = _projections(part, reference, fitted) | both_beliefs(part, means)
            for name, values in numbers.items():
                for quadrant in QUADRANTS:
                    inside = [i for i, row in enumerate(held_out) if labels[row] == quadrant]
                    families = [part.families[i] for i in inside]
                    mean = mean_estimate(values[inside], families, seed, resamples, least=MIN_FOR_A_POLE)
                    rows.append({"step": step, "by": by, "number": name, "quadrant": quadrant, **mean.row("mean")})
    return pd.DataFrame(rows, columns=["step", "by", "number", "quadrant", "mean", "low", "high", "n"])


def _centroids(acts: Activations, quadrants: Sequence[str], split: Split) -> dict[str, Centroids]:
    """By belief; none where a pole has too few training prompts."""
    train = replace(acts, labels=tuple(quadrants)).select(split.train)
    if min(train.labels.count(name) for name in POLES) < MIN_FOR_A_POLE:
        return {}
    return {name: centroids(train, *POLES, position or acts.positions[-1]) for name, position in BELIEFS.items()}


def _projections(part: Activations, reference: BaseReference, fitted: Activations) -> dict[str, Tensor]:
    """Along each concept's direction at its home, in units of the residual stream."""
    along = {}
    for concept in reference.measurable:
        direction = concept.direction(fitted, reference.split)
        along[f"projection_{concept.name}"] = project(part.at(direction.level, direction.position), direction).double()
    return along


NONE = "none"


def steered_log_odds(
    model: LanguageModel,
    batch: TokenBatch,
    directions: dict[str, Direction],
    tokens: RefusalTokens,
    *,
    random_directions: int,
    seed: int,
) -> dict[str, Tensor]:
    """Refusal log-odds of each prompt with each direction added once at `inst` and all tokens after it.

    Settings: none, each name of `directions`, and NAME.random.K with random directions of the same length for
    every name that ends in ".reference". Nothing at all without prompts.
    """
    if not batch.prompts:
        return {}
    settings: dict[str, Direction | None] = {NONE: None, **directions}
    for name, direction in directions.items():
        if name.endswith(".reference"):
            stem = name.removesuffix(".reference")
            drawn = random_like(direction, random_directions, seed)
            settings |= {f"{stem}.random.{k}": vector for k, vector in enumerate(drawn)}
    names = list(settings)
    rows = [i for _ in names for i in range(len(batch.prompts))]
    plans = [_added(settings[name], n_layers(model)) for name in names for _ in batch.prompts]
    odds = logits_under(
        model, batch.select(rows), plans, force=True,
        reduce=lambda logits, _: refusal_log_odds(logits, tokens.ids)[:, None],
    )  # fmt: skip
    return dict(zip(names, odds[:, 0].reshape(len(names), -1), strict=True))


def _added(direction: Direction | None, depth: int) -> list[Intervention]:
    if direction is None or direction.norm == 0:
        return []
    # The last level is nobody's input, but the last block's output.
    layer, site = (depth - 1, "resid_post") if direction.level == depth else (direction.level, "resid_pre")
    where = ("inst", "post[*]")
    return [Add(direction, strength=1.0, unit="raw", layers=(layer,), positions=where, phase="prompt", site=site)]


def behaviour_table(
    snapshots: Sequence[Snapshot], reference: BaseReference, *, seed: int, resamples: int
) -> pd.DataFrame:
    """One row for each checkpoint and number: step, number, value, low, high, n, and the change from the base.

    Refusal rates by the judge that places the quadrants (`refusal_rate.KIND`) and by both published lists
    (`refusal_rate_by.JUDGE.KIND`), of the answers that the judge could tell, and the shares of answers that are empty
    and that it couldn't tell (`unclear_rate.KIND`); log-odds on prompts that chose no refusal tokens; cross-entropy of
    plain text. Changes are paired by prompt.
    """
    prompts = reference.judged.prompts
    rest = {*reference.split.validation, *reference.split.test}
    chosen = {f"refusal_rate_by.{judge.name}": judge for judge in judges_of(reference.judged.judge)[1:]}
    base = _measured(snapshots[0], prompts, chosen)
    rows = []
    for snapshot in snapshots:
        for number, values in _measured(snapshot, prompts, chosen).items():
            for kind in ("harmful", "harmless"):
                inside = [i for i, prompt in enumerate(prompts) if prompt.label == kind]
                kept = [i for i in inside if i in rest] if number == "log_odds" else inside
                families = [prompts[i].group for i in kept]
                now, before = values[kept], base[number][kept]
                rows.append(_row(snapshot.step, f"{number}.{kind}", now, before, families, seed, resamples))
        texts = [str(i) for i in range(len(snapshot.text_loss))]
        rows.append(
            _row(snapshot.step, "text_loss", snapshot.text_loss, snapshots[0].text_loss, texts, seed, resamples)
        )
    return pd.DataFrame(rows)


def _measured(
    snapshot: Snapshot, prompts: Sequence[Prompt], judges: Mapping[str, Judge]
) -> dict[str, Float[Tensor, " prompt"]]:
    """One number for each prompt; NaN where the judge couldn't tell."""
    refused = refused_by(snapshot)
    return {
        "refusal_rate": refused,
        **{name: refusals(verdicts_by(judge, prompts, snapshot.answers.texts)) for name, judge in judges.items()},
        "empty_rate": torch.tensor([not text.strip() for text in snapshot.answers.texts], dtype=torch.float64),
        "unclear_rate": refused.isnan().double(),
        "log_odds": snapshot.log_odds,
    }


def refused_by(snapshot: Snapshot) -> Float[Tensor, " prompt"]:
    """1 where the checkpoint refuses, by the judge that places the quadrants; NaN where that judge couldn't tell."""
    return refusals(snapshot.verdicts)


def refusals(verdicts: Sequence[str]) -> Float[Tensor, " prompt"]:
    """An empty answer is no refusal; of an unclear or unfinished one it isn't known."""
    values = {"refused": 1.0, "accepted": 0.0, "empty": 0.0}
    return torch.tensor([values.get(verdict, torch.nan) for verdict in verdicts], dtype=torch.float64)


def gaps(
    snapshot: Snapshot, base: Snapshot, concept: TrackedConcept, *, seed: int, resamples: int
) -> tuple[Estimate, Estimate]:
    """Refusal rate of the concept's positive prompts minus that of its negative ones, and its change from the base.

    What the model does with the difference that the concept is about. Paired bootstrap over families, of the prompts
    whose answers the judge could tell in both; missing where these are less than `MIN_TOLD` of a class. Where the
    base's own answers made the labels, its gap is 1 and the change can only be a fall.
    """
    rows = [i for i, label in enumerate(concept.labels) if label in concept.contrast]
    told = (refused_by(snapshot) - refused_by(base)).isfinite()
    kept = [i for i in rows if told[i]]
    for label in concept.contrast:
        whole, left = (sum(concept.labels[i] == label for i in part) for part in (rows, kept))
        if not left or left < MIN_TOLD * whole:
            return Estimate.missing(left), Estimate.missing(left)
    positive = torch.tensor([concept.labels[i] == concept.contrast[0] for i in kept])
    families, labels = [snapshot.acts.families[i] for i in kept], [concept.labels[i] for i in kept]
    weights = sample_and_resamples(families, resamples, seed, labels)
    now, before = (_gap(refused_by(each)[kept], positive, weights) for each in (snapshot, base))
    return of_sample(now, len(kept)), of_sample(now - before, len(kept))


def _gap(refused: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    up, down = weights * positive, weights * ~positive
    return up @ refused / up.sum(dim=1) - down @ refused / down.sum(dim=1)


def effect_table(snapshots: Sequence[Snapshot], families: Sequence[str], *, seed: int, resamples: int) -> pd.DataFrame:
    """How far adding each direction once moves the refusal log-odds: step, concept, direction, effect, low, high, n.

    `reference` is the base's direction, `own` the checkpoint's; `random_mean` and `random_maximum` are over random
    directions of the reference's length, the mean effect of each counted without its sign.
    """
    rows = []
    for snapshot in snapshots:
        shifts = {name: odds - snapshot.steered[NONE] for name, odds in snapshot.steered.items() if name != NONE}
        for name, shift in shifts.items():
            concept, _, which = name.partition(".")
            if which in ("reference", "own"):
                effect = mean_estimate(shift, families, seed, resamples)
                random = [abs(float(s.mean())) for n, s in shifts.items() if n.startswith(f"{concept}.random.")]
                rows.append(
                    {"step": snapshot.step, "concept": concept, "direction": which, **effect.row("effect"),
                     "random_mean": sum(random) / len(random), "random_maximum": max(random)}
                )  # fmt: skip
    return pd.DataFrame(rows)


def _row(
    step: int, number: str, values: Tensor, before: Tensor, families: Sequence[str], seed: int, resamples: int
) -> dict[str, float | int | str]:
    of = share_of_told if "_rate" in number else mean_of_told
    now, change = of(values, families, seed, resamples), mean_of_told(values - before, families, seed, resamples)
    return {"step": step, "number": number, **now.row(), **change.beside("change")}


def mean_of_told(values: Tensor, families: Sequence[str], seed: int, resamples: int) -> Estimate:
    """The mean over what isn't NaN; missing where that is less than `MIN_TOLD`."""
    told = values.isfinite().nonzero()[:, 0].tolist()
    if len(told) < MIN_TOLD * len(values):
        return Estimate.missing(len(told))
    return mean_estimate(values[told], [families[i] for i in told], seed, resamples)


def share_of_told(values: Tensor, families: Sequence[str], seed: int, resamples: int) -> Estimate:
    """The same of values that are 0 or 1, with an interval that has a width where all are alike."""
    mean = mean_of_told(values, families, seed, resamples)
    told = values.isfinite().nonzero()[:, 0].tolist()
    return rate_estimate(values[told] == 1, [families[i] for i in told], seed, resamples) if mean.measurable else mean
