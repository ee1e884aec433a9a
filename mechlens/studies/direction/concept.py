"""A concept's direction with its evidence: what `find_concept` and `mechlens direction` give."""

from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.directions.direction import Direction
from mechlens.methods.probing.auroc_grid import contrast_part, is_positive, score_grid
from mechlens.methods.probing.confounds import Confound
from mechlens.methods.probing.detect import ChosenLevel, Detection
from mechlens.methods.shown import html_with, lines
from mechlens.methods.statistics.by_prompt import ByPrompt, by_prompt_table
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import fewest_families
from mechlens.methods.steering.steering_test import SteeringTest
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.split import Split
from mechlens.runs.headline import Headline
from mechlens.runs.results.paired import BY_PROMPT
from mechlens.settings import DetectionPlan
from mechlens.studies.direction.sides import NEGATIVE, POSITIVE
from mechlens.studies.direction.verdict import DirectionVerdict, direction_verdict, steering_headline
from mechlens.studies.shared.contrasts import ContrastMeasurement


@dataclass(frozen=True, repr=False)
class Concept:
    """A concept's direction in every cell, tested on held-out prompts.

    `verdict` says what the numbers allow, `verdict.headline` in one sentence. `direction` is the one to use, or None;
    `best` is the strongest position that is more than the prompts' surface, or None, and `detection.strongest` and
    `detection.at(position)` are there in any case. `steered` is what adding directions did (`causal=True`),
    `confounds` what else differs between the sides. `table()` has every level and position, `baselines()` what the
    surface reaches, `differences()` the confounds, `tables()` everything, `metrics()` the numbers by name.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> concept = ml.find_concept(model, harmful, harmless, plan=ml.DetectionPlan(permutations=20))
    >>> list(concept.table().columns[:3])
    ['level', 'position', 'auroc']
    """

    measured: ContrastMeasurement
    reliability: Float[Tensor, "level position"]
    """Split-half reliability of the direction, from training prompts."""
    acts: Activations
    batch: TokenBatch
    split: Split
    plan: DetectionPlan
    confounds: tuple[Confound, ...]
    """What else tells the two sides apart better than chance, by the lower bound; the most telling first."""
    punctuation: str
    """What became of final punctuation, in words."""
    steered: SteeringTest | None = None
    """What adding the directions to negative prompts did, where that was asked for."""

    @property
    def direction(self) -> Direction | None:
        """The direction to use: the one that steers, where that was tried, else the best one; None where none is."""
        if self.steered is not None:
            return self.steered.direction
        return None if self.best is None else self.best.direction

    @property
    def best(self) -> ChosenLevel | None:
        """The strongest position whose direction is more than what the prompts' surface tells; None where none is."""
        return self.detection.best

    @property
    def verdict(self) -> DirectionVerdict:
        """What the numbers allow to be said of reading it."""
        positive = is_positive(self.acts, (POSITIVE, NEGATIVE))
        return direction_verdict(self.detection, fewest_families(positive, self.acts.families))

    @property
    def headline(self) -> Headline:
        """The one sentence: of the direction that steers, where that was tried, else of reading it."""
        return self.verdict.headline if self.steered is None else steering_headline(self.steered, self.verdict)

    @property
    def detection(self) -> Detection:
        """The held-out detection; `find_concept` refuses sets that are too small for one."""
        assert self.measured.detection is not None
        return self.measured.detection

    def metrics(self) -> dict[str, Estimate]:
        """AUROC of each position and of the strongest, its gains over the surface, and the baselines."""
        strongest, best = self.detection.strongest, self.best
        numbers = {f"auroc.{choice.position}": choice.auroc for choice in self.detection.chosen}
        numbers["auroc.strongest"] = strongest.auroc
        if best is not None:
            numbers["auroc.best"] = best.auroc
        shown, n = best or strongest, strongest.auroc.n
        numbers["permutation_p"] = Estimate.exact(shown.permutation.p, n)
        numbers["random_maximum"] = Estimate.exact(shown.random.maximum, n)
        reliable = float(self.reliability[self.acts.levels.index(shown.level), self._column(shown.position)])
        numbers["reliability"] = Estimate.exact(reliable, len(self.split.train))
        numbers |= self.verdict.deciding
        if self.steered is not None:
            numbers["steering.effect"] = self.steered.effect
            if self.steered.random is not None:
                random = self.steered.random
                numbers["steering.random_maximum"] = Estimate.exact(random.maximum, random.n)
                numbers["steering.random_bound"] = Estimate.exact(random.bound, random.n)
        return numbers | self.measured.baselines

    def table(self) -> pd.DataFrame:
        """One row per level and position, with the reliability of the direction there."""
        return self.detection.table().assign(reliability=self.reliability.flatten().tolist())

    def baselines(self) -> pd.DataFrame:
        """One row per surface baseline."""
        rows = [{"baseline": name, **auroc.row("auroc")} for name, auroc in self.measured.baselines.items()]
        return pd.DataFrame(rows)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        return {
            "auroc_by_level": self.table(),
            "auroc_chosen": self.measured.chosen(),
            "baselines": self.baselines(),
            "surface": pd.concat([one.table() for one in self.detection.ahead], ignore_index=True),
            "confounds": self.differences(),
            "split": pd.DataFrame({"id": self.acts.ids, "part": self.split.parts()}),
            BY_PROMPT: self._by_prompt(),
            **({"steered": self.steered.table} if self.steered is not None else {}),
        }

    def _by_prompt(self) -> pd.DataFrame:
        """Scores of the test prompts behind the AUROC of every position."""
        grid, sides = self.detection.directions, (POSITIVE, NEGATIVE)
        test = contrast_part(self.acts, self.split.test, sides)
        scores, positive = score_grid(test, grid), is_positive(test, sides)
        roles = {"strongest": self.detection.strongest, "best": self.best}
        rows: dict[str, ByPrompt] = {}
        for one in self.detection.chosen:
            own = scores[grid.levels.index(one.level), grid.positions.index(one.position)]
            names = (one.position, *(role for role, choice in roles.items() if choice is one))
            rows |= {f"auroc.{name}": ByPrompt(test.ids, test.families, own, positive) for name in names}
        return by_prompt_table(rows)

    def differences(self) -> pd.DataFrame:
        """One row for each thing in which the sides differ, with the AUROC that it alone reaches."""
        rows = [
            {"confound": one.name, **one.auroc.row("auroc"), "telling": one.telling, "difference_text": one.words}
            for one in self.confounds
        ]
        return pd.DataFrame(rows, columns=["confound", "auroc", "low", "high", "n", "telling", "difference_text"])

    def artifacts(self) -> dict[str, object]:
        """The direction in every cell, and one more: `direction`, the one to use, or where none is, the `strongest`."""
        found: dict[str, object] = {"directions": self.detection.directions}
        if self.direction is not None:
            found["direction"] = self.direction
        else:
            found["strongest"] = self.detection.strongest.direction
        return found

    def _column(self, position: str) -> int:
        return column_of(position, self.acts.positions, self.acts.last)

    def __repr__(self) -> str:
        facts = {
            **self.detection.in_words,
            "steering effect": "" if self.steered is None else self.steered.effect,
            "direction": "none to use" if self.direction is None else repr(self.direction),
            "final punctuation": self.punctuation.removeprefix("final punctuation "),
        }
        return lines(f"Concept in {self.acts.checkpoint.name}: {self.verdict.headline}", facts)

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.detection.by_position())
