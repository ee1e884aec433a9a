"""Requests under changes of attention or of the residual stream: refusal log-odds, and directions at their homes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.behaviour.judges import refusal_log_odds
from mechlens.methods.probing.within_folds import Folds, mean_auroc
from mechlens.methods.progress import progress_bar
from mechlens.methods.sinks.interventions import Edit, away_from
from mechlens.methods.sinks.positions import TEMPLATE, WORDS, places_of
from mechlens.methods.statistics.effects import Effect, cosine_curve
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import of_sample, sample_and_resamples
from mechlens.models.attention.changes import Change
from mechlens.models.attention.watch import watch
from mechlens.models.bridge import LanguageModel, n_layers, unembed
from mechlens.prompts.batch import TokenBatch
from mechlens.studies.shared.sink_positions import Asked, along
from mechlens.studies.sinks.config import SinkPlan
from mechlens.studies.sinks.experiments import Experiment
from mechlens.studies.sinks.importance import told


@dataclass(frozen=True)
class Home:
    """Where a direction is read."""

    asked: Asked
    position: str
    level: int
    folds: Folds


class Seen(NamedTuple):
    """What one change leaves."""

    log_odds: Float[Tensor, " prompt"]
    homes: tuple[Float[Tensor, "prompt d"], ...]
    """The residual stream at every home."""


@dataclass(frozen=True)
class Passes:
    """Prompts that are run under one change after the other."""

    model: LanguageModel
    batch: TokenBatch
    tokens: tuple[int, ...]
    """With which refusals begin."""
    harmful: Bool[Tensor, " prompt"]
    homes: tuple[Home, ...]

    def under(self, changes: Sequence[Change | None] | None = None, edits: Sequence[Edit | None] | None = None) -> Seen:
        """Every prompt under its own change."""
        last, homes = [], []
        for i in range(len(self.batch.prompts)):
            final, kept = self._one(i, changes[i] if changes else None, edits[i] if edits else None)
            last.append(final)
            homes.append(kept)
        log_odds = refusal_log_odds(unembed(self.model, torch.stack(last)), self.tokens).cpu()
        return Seen(log_odds, tuple(torch.stack([row[k] for row in homes]).cpu() for k in range(len(self.homes))))

    def _one(self, i: int, change: Change | None, edit: Edit | None) -> tuple[Tensor, list[Tensor]]:
        offset = self.batch.offset(i)
        at = [int(self.batch.at(home.position)[i]) - offset for home in self.homes]
        kept: dict[int, Tensor] = {}

        def see(level: int, residual: Tensor) -> Tensor | None:
            new = None if edit is None else edit(level, residual)
            keep(level, residual if new is None else new)
            return new

        def keep(level: int, residual: Tensor) -> None:
            for k, home in enumerate(self.homes):
                if home.level == level:
                    kept[k] = residual[at[k]].clone()

        final = watch(self.model, self.batch.row(i), None, see, change)
        keep(n_layers(self.model), final)
        return final[-1], [kept[k] for k in range(len(self.homes))]


def under_experiments(
    passes: Passes, plain: Seen, experiments: Sequence[Experiment], places: Sequence[Sequence[int]], plan: SinkPlan
) -> pd.DataFrame:
    """A row an experiment, after one of the model as it is, which `plain` is of."""
    rows: list[dict[str, object]] = [{"which": "none", "what": "", "heads_or_dimensions": ""}
                                     | _row(passes, plain, plain, plan)]  # fmt: skip
    for one in progress_bar(list(experiments), title="requests under experiments", unit="experiment"):
        seen = passes.under([one.change(own) for own in places], [one.edit(own) for own in places])
        rows.append({**told(one)} | _row(passes, plain, seen, plan))
    return pd.DataFrame(rows)


def hidden_table(passes: Passes, plain: Seen, table: pd.DataFrame, plan: SinkPlan) -> pd.DataFrame:
    """The table of positions with what becomes of refusal where no later token can attend to each; empty for `last`.

    Of the template before the words, and of the words, one token each is hidden, drawn by seed: the random tokens
    beside which the others stand.
    """
    draw = random.Random(plan.seed)
    places = [places_of(passes.batch, i) for i in range(len(passes.batch.prompts))]
    rows = []
    for k, position in enumerate(table["position"]):
        own = [row[k] for row in places]
        if k == len(table) - 1 or not all(own):
            rows.append(_gap_row(passes, torch.full_like(plain.log_odds, torch.nan), plan))
            continue
        hidden = [[draw.choice(one)] if position in (TEMPLATE, WORDS) else one for one in own]
        seen = passes.under([away_from(one) for one in hidden])
        rows.append(_gap_row(passes, seen.log_odds - plain.log_odds, plan))
    return pd.concat([table, pd.DataFrame(rows)], axis=1)


def _row(passes: Passes, plain: Seen, seen: Seen, plan: SinkPlan) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, change in (("", seen.log_odds), ("change_", seen.log_odds - plain.log_odds)):
        gap, harmful = _gap(passes, change, plan)
        row |= gap.beside(f"{name}gap") | harmful.beside(f"{name}harmful")
    for k, home in enumerate(passes.homes):
        asked, name = home.asked, home.asked.name
        before, after = (own.homes[k][asked.rows] for own in (plain, seen))
        folds = home.folds
        levels = [[0] * len(part) for part in folds.parts]
        frozen = mean_auroc(along(before[:, None], after[:, None], folds, levels), folds)
        row |= _turned(asked, before, after, plan.seed) | frozen.beside(f"auroc_{name}")
    return row


def _turned(
    asked: Asked, before: Float[Tensor, "prompt d"], after: Float[Tensor, "prompt d"], seed: int
) -> dict[str, float]:
    """The cosine of a concept's directions before and after, both refitted in its interval (jackknife over families),
    and the split-half cosine of the later one, without which a cosine near 0 says nothing."""
    labels = tuple(str(own) for own in asked.positive.tolist())
    first, second = (Effect(one[:, None], labels, {"True": 1.0, "False": -1.0}) for one in (before, after))
    curve = cosine_curve(first, second, asked.families, (0,), seed=seed)
    told = {f"reliability_{asked.name}": curve.reliability_second[0]}
    return curve.measured[0].beside(f"cosine_{asked.name}") | told


def _gap_row(passes: Passes, change: Tensor, plan: SinkPlan) -> dict[str, float]:
    gap, harmful = _gap(passes, change, plan)
    return gap.beside("hidden_gap") | harmful.beside("hidden_harmful")


def _gap(passes: Passes, values: Float[Tensor, " prompt"], plan: SinkPlan) -> tuple[Estimate, Estimate]:
    """Mean over harmful requests minus that over harmless ones, and the first alone."""
    if bool(values.isnan().any()):
        return Estimate.missing(len(values)), Estimate.missing(len(values))
    families = [one.group for one in passes.batch.prompts]
    draws = sample_and_resamples(families, plan.resamples, plan.seed, [str(own) for own in passes.harmful.tolist()])
    up, down = draws * passes.harmful, draws * ~passes.harmful
    harmful, harmless = (w @ values.double() / w.sum(dim=1) for w in (up, down))
    return of_sample(harmful - harmless, len(values)), of_sample(harmful, int(passes.harmful.sum()))
