"""Which direction of a concept does something: each is added to negative prompts, and what the model then says is read.

A direction that reads a concept well may do nothing, and of a concept that the words tell too no read-out says whether
the model uses it. So candidates are tried, on validation prompts, beside random directions of the same length, and the
one that is taken is tried once more on test prompts.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float, Float64
from scipy import stats
from torch import Tensor

from mechlens.methods.behaviour.damage import plain_loss
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction, DirectionGrid, random_like
from mechlens.methods.progress import phase
from mechlens.methods.shown import html_with
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.methods.steering.candidates import SelectionRule, addition
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.split import Split
from mechlens.settings import Sampling

LEVELS = 8
"""Levels that are tried at each position, evenly spread below the last fifth of the depth."""
PROMPTS = 16
"""Negative prompts that a candidate is tried on; twice as many of a side say what they are answered with."""
FINALISTS = 4
"""Candidates that are compared with random directions: those that do most, and don't break plain text."""
HIGHEST_RISE = 1.0
"""A direction under which plain text is more surprising by more than this (nats per token) breaks the model."""
CHANCE = 0.05
"""Chance that a random direction is taken for one that steers, over all candidates."""
TRIED, BREAKS, FINALIST, CHOSEN = "tried", "breaks plain text", "beside random directions", "chosen"


@dataclass(frozen=True)
class RandomEffects:
    """Effects of random directions of one length at one layer, each the mean over the same prompts."""

    maximum: float
    bound: float
    """A further random direction is above it with a chance of `CHANCE` over the number of candidates tried, as the best
    of many is compared with few: the bound of a prediction interval by Student's t."""
    n: int


@dataclass(frozen=True, repr=False)
class SteeringTest:
    """What adding each candidate did to negative prompts, and the one that did most beyond random directions.

    The effect, in nats: how much likelier the first answer tokens that positive prompts get have become, less the same
    of those that negative prompts get; sum_v (P+(v) - P-(v)) (log q_steered(v) - log q(v)), where P+ and P- are the
    mean next-token distributions of training prompts and q is that of a held-out negative prompt. The direction is
    added as it is, at the input of its own layer, at every token.
    """

    direction: Direction | None
    """Of the largest effect beyond random directions; None where no effect on test prompts is above all of them."""
    effect: Estimate
    """Of the candidate taken, on negative test prompts."""
    random: RandomEffects | None
    """Of random directions of its length, on the same prompts; None where no candidate was taken."""
    table: pd.DataFrame
    """Everything tried, on validation prompts: position, level, effect, text_loss_rise, random_bound, outcome."""

    @property
    def place(self) -> str:
        """Of the candidate taken, as `inst, level 7`, whether or not it steers; "" where none was taken."""
        rows = self.table[self.table["outcome"] == CHOSEN].to_dict("records")
        return f"{rows[0]['position']}, level {rows[0]['level']}" if rows else ""

    @property
    def sentence(self) -> str:
        """What was found, for a report."""
        place = self.place
        if not place or self.random is None:
            return f"None of {len(self.table)} directions tried leaves plain text whole, so none is taken."
        does = (
            f"the effect on negative test prompts is {self.effect.of('nats')}, where chance reaches "
            f"{self.random.bound:.2f} (the best of {self.random.n} random directions of its length has "
            f"{self.random.maximum:.2f})"
        )
        if self.direction is None:
            return f"Of {len(self.table)} directions tried that of {place} does most, and no more than chance: {does}."
        return f"Of {len(self.table)} directions tried that of {place} steers the model: {does}."

    def __repr__(self) -> str:
        return f"SteeringTest: {self.sentence}"

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.table.sort_values("effect", ascending=False))


@dataclass(frozen=True)
class _Effect:
    """Logits of a row to the effect there."""

    contrast: Float64[Tensor, " vocab"]
    """P+ minus P-."""
    clean: Float64[Tensor, "prompt vocab"]
    """Log-probabilities with nothing done, of the prompts that the rows repeat."""

    @property
    def key(self) -> str:
        digest = hashlib.sha256(self.contrast.numpy().tobytes() + self.clean.numpy().tobytes())
        return f"effect {digest.hexdigest()}"

    def __call__(self, logits: Float[Tensor, "row vocab"], rows: list[int]) -> Float64[Tensor, "row 1"]:
        before = self.clean[[row % len(self.clean) for row in rows]]
        return (logits.double().log_softmax(dim=-1) - before) @ self.contrast[:, None]


@dataclass(frozen=True)
class _Trial:
    """Negative prompts to which directions are added."""

    model: LanguageModel
    batch: TokenBatch
    effect: _Effect
    cache: Cache | None

    def of(self, directions: Sequence[Direction]) -> Float64[Tensor, "direction prompt"]:
        """The effect of each direction on each prompt."""
        n = len(self.batch.prompts)
        rows = self.batch.select(list(range(n)) * len(directions))
        each = [[addition(one)] for one in directions for _ in range(n)]
        found = logits_under(self.model, rows, each, reduce=self.effect, cache=self.cache)
        return found.reshape(len(directions), n)


def steering_test(
    model: LanguageModel,
    grid: DirectionGrid,
    batch: TokenBatch,
    split: Split,
    plan: Sampling,
    *,
    cache: Cache | None = None,
) -> SteeringTest:
    """Tries directions above level 0 on negative prompts of the validation part; the one taken, on the test part.

    `batch` holds the prompts of the split, labelled as the grid's contrast is.
    """
    with phase("steering"):
        with phase("what to reach"):
            contrast = _contrast(model, grid.contrast, batch, split, cache)
            choose, report = (
                _trial(model, grid.contrast[1], batch, rows, contrast, cache) for rows in (split.validation, split.test)
            )
        return _chosen(choose, report, candidates_of(model, grid), plan)


def candidates_of(model: LanguageModel, grid: DirectionGrid) -> list[Direction]:
    """Every position's directions at some levels above 0, of which those of the last fifth write the output's words."""
    depth = n_layers(model)
    top = max(int((1 - SelectionRule().last_layers) * depth + 1e-9), 2)
    levels = [level for level in grid.levels if 0 < level < min(top, depth)]
    step = -(-len(levels) // LEVELS) or 1
    found = [grid.at(level, position) for position in grid.positions for level in levels[step - 1 :: step]]
    return [one for one in found if one.norm > 0]


def _contrast(
    model: LanguageModel, sides: tuple[str, str], batch: TokenBatch, split: Split, cache: Cache | None
) -> Float64[Tensor, " vocab"]:
    """Mean next-token distribution of the positive training prompts minus that of the negative ones."""
    means = []
    for side in sides:
        rows = _of_side(batch, split.train, side, 2 * PROMPTS)
        means.append(logits_under(model, batch.select(rows), [], cache=cache).double().softmax(dim=-1).mean(dim=0))
    return means[0] - means[1]


def _trial(
    model: LanguageModel,
    negative: str,
    batch: TokenBatch,
    rows: Sequence[int],
    contrast: Float64[Tensor, " vocab"],
    cache: Cache | None,
) -> _Trial:
    part = batch.select(_of_side(batch, rows, negative, PROMPTS))
    clean = logits_under(model, part, [], cache=cache).double().log_softmax(dim=-1)
    return _Trial(model, part, _Effect(contrast, clean), cache)


def _of_side(batch: TokenBatch, rows: Sequence[int], side: str, most: int) -> list[int]:
    return [i for i in rows if batch.prompts[i].label == side][:most]


def _chosen(choose: _Trial, report: _Trial, candidates: Sequence[Direction], plan: Sampling) -> SteeringTest:
    missing = Estimate.missing(len(report.batch.prompts))
    with phase(f"{len(candidates)} candidates"):
        effects = choose.of(candidates).mean(dim=1).tolist() if candidates else []
    rises: dict[int, float] = {}
    bounds: dict[int, float] = {}
    with phase("finalists beside random directions"):
        plain = plain_loss(choose.model, None).mean()
        for k in sorted(range(len(candidates)), key=lambda k: -effects[k]):
            if len(bounds) == FINALISTS:
                break
            rises[k] = float(plain_loss(choose.model, addition(candidates[k])).mean() - plain)
            if rises[k] <= HIGHEST_RISE:
                drawn = random_like(candidates[k], plan.random_directions, plan.seed + 6)
                bounds[k] = _random(choose.of(drawn), len(candidates)).bound
    if not bounds:
        return SteeringTest(None, missing, None, _table(candidates, effects, rises, bounds, None))
    taken = max(bounds, key=lambda k: effects[k] - bounds[k])
    drawn = random_like(candidates[taken], plan.random_directions, plan.seed + 7)
    with phase("the chosen one on held-out prompts"):
        effects_there = report.of([candidates[taken], *drawn])
    own = effects_there[0]
    random = _random(effects_there[1:], len(candidates))
    effect = mean_estimate(own, [prompt.group for prompt in report.batch.prompts], plan.seed, plan.resamples)
    steers = effect.low > 0 and effect.value > random.bound
    table = _table(candidates, effects, rises, bounds, taken)
    return SteeringTest(candidates[taken] if steers else None, effect, random, table)


def _random(effects: Float64[Tensor, "direction prompt"], tried: int) -> RandomEffects:
    means = effects.mean(dim=1)
    n = len(means)
    if n < 2:
        return RandomEffects(float(means.max()), math.inf, n)
    reach = float(stats.t.ppf(1 - CHANCE / tried, n - 1)) * float(means.std()) * math.sqrt(1 + 1 / n)
    return RandomEffects(float(means.max()), float(means.mean()) + reach, n)


def _table(
    candidates: Sequence[Direction],
    effects: Sequence[float],
    rises: Mapping[int, float],
    bounds: Mapping[int, float],
    taken: int | None,
) -> pd.DataFrame:
    def outcome(k: int) -> str:
        if k == taken:
            return CHOSEN
        return FINALIST if k in bounds else BREAKS if k in rises else TRIED

    rows = [
        {
            "position": one.position, "level": one.level, "effect": effects[k],
            "text_loss_rise": rises.get(k, math.nan), "random_bound": bounds.get(k, math.nan), "outcome": outcome(k),
        }
        for k, one in enumerate(candidates)
    ]  # fmt: skip
    columns = ["position", "level", "effect", "text_loss_rise", "random_bound", "outcome"]
    return pd.DataFrame(rows, columns=columns)
