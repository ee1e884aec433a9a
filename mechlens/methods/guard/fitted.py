"""A fitted guard as a value: what it reads, how it decides, and for which model that holds."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.guard.rules import PlaceScore
from mechlens.methods.shown import few, lines
from mechlens.methods.statistics.calibration import Calibration
from mechlens.models.bridge import LanguageModel, checkpoint_now, d_model
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.difference import require_same_template, require_same_weights
from mechlens.prompts.asked import Prompts
from mechlens.prompts.same import Comparable
from mechlens.prompts.templates.template import TemplateChoice


@dataclass(frozen=True)
class Place:
    """One level and position that a guard reads, and how it is scored there."""

    level: int
    position: str
    score: PlaceScore
    validation_auroc: float
    """Of a fit to the training part, on the validation part; where levels were chosen, the reason for this one."""


@dataclass(frozen=True)
class GuardSettings:
    """What was asked for; the parameters of the estimator that fitted the guard."""

    rule: str
    positions: tuple[str, ...]
    levels: str | tuple[int, ...]
    max_fpr: float | None
    folds: int
    seed: int
    positive: str
    negative: str


@dataclass(frozen=True)
class GuardVerdict:
    """What a guard says of one prompt.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> fitting = ml.fit_guard(model, prompts, ml.LatentGuard(max_fpr=0.1))
    >>> (said,) = fitting.guard.ask(model, fitting.test[:1])
    >>> 0 <= said.probability <= 1
    True
    """

    harmful: bool
    score: float
    """In the rule's own units; harmful above the guard's threshold."""
    probability: float
    """That the prompt is harmful, where harmful and harmless prompts are equally common."""


@dataclass(frozen=True, repr=False, eq=False)
class FittedGuard(Comparable):
    """The mean score over places, with its threshold, for one checkpoint and one chat template.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> fitting = ml.fit_guard(model, prompts, ml.LatentGuard(max_fpr=0.1))
    >>> len(fitting.guard.ask(model, fitting.test)) == len(fitting.test)
    True
    """

    settings: GuardSettings
    places: tuple[Place, ...]
    calibration: Calibration
    site: str
    checkpoint: Checkpoint
    template: str
    """Fingerprint of the chat template."""
    train_ids: tuple[str, ...]
    train_sha256: tuple[str, ...]
    """Fingerprints of the texts it was fitted and calibrated on, where given; evaluations leave them out."""

    def __post_init__(self) -> None:
        if not self.places or min(place.level for place in self.places) < 0:
            raise UserError("a guard reads at least one place, at a level from 0 on; fit it anew")
        sizes = {place.score.d_model for place in self.places}
        if len(sizes) > 1:
            raise UserError(f"a guard's places have vectors of {sorted(sizes)} entries; fit it anew")
        # At level 0 a template's token is the same in every prompt, so there a fit may find nothing.
        blind = [place for place in self.places if place.score.is_blind]
        if len(blind) == len(self.places) or any(place.level > 0 for place in blind):
            raise UserError(
                f"a guard's weights at level {blind[-1].level}, {blind[-1].position}, are all zero, or its centroids "
                "the same, so every prompt scores alike there; fit it anew, elsewhere"
            )
        low, high = (sum(ends) / len(self.places) for ends in zip(*(p.score.reach for p in self.places), strict=True))
        if not low < self.calibration.threshold < high:
            raise UserError(
                f"a guard's threshold is {self.calibration.threshold:.3g} and its scores lie between {low:.3g} and "
                f"{high:.3g}, so it decides nothing; fit it anew"
            )

    @property
    def d_model(self) -> int:
        """Width of the residual stream that it reads."""
        return self.places[0].score.d_model

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that are read; no block above the last of them is run."""
        return tuple(sorted({place.level for place in self.places}))

    @property
    def positions(self) -> tuple[str, ...]:
        """The positions that are read."""
        return tuple(dict.fromkeys(place.position for place in self.places))

    def scores(self, acts: Activations, *, other_weights: bool = False) -> Float[Tensor, " prompt"]:
        """The score of every prompt (float64), each of them finite.

        UserError where one isn't, or where the activations come from other weights (unless `other_weights`), another
        weight regime, another template, or lack a place.
        """
        self.require(acts.checkpoint, acts.template, acts.values.shape[-1], other_weights=other_weights)
        if acts.site != self.site:
            raise UserError(f"the guard reads {self.site} and the activations are of {acts.site}; collect them there")
        found = [place.score(acts.at(place.level, place.position)) for place in self.places]
        scores = torch.stack(found).mean(dim=0)
        _require_finite(scores)
        return scores

    def verdicts(self, scores: Float[Tensor, " prompt"]) -> list[GuardVerdict]:
        """Decisions and probabilities for scores; UserError where one isn't finite, which would pass as harmless."""
        _require_finite(scores)
        chances = self.calibration.probability(scores)
        flagged = scores > self.calibration.threshold
        rows = zip(flagged.tolist(), scores.tolist(), chances.tolist(), strict=True)
        return [GuardVerdict(harmful, score, chance) for harmful, score, chance in rows]

    def ask(
        self,
        model: LanguageModel,
        prompts: Prompts,
        template: TemplateChoice = "tokenizer",
        *,
        other_weights: bool = False,
    ) -> list[GuardVerdict]:
        """Runs the prompts through the blocks up to the last level that is read, without logits, and judges them."""
        used = template_of(model, template)
        # Before anything is run: a wrong model should not cost a forward pass.
        self.require(checkpoint_now(model), used.fingerprint, d_model(model), other_weights=other_weights)
        acts = collect(model, prompts, positions=self.positions, levels=self.levels, site=self.site, template=used)
        return self.verdicts(self.scores(acts, other_weights=other_weights))

    def require(self, checkpoint: Checkpoint, template: str, width: int, *, other_weights: bool = False) -> None:
        """UserError unless the guard was fitted for these weights, this weight regime, template and d_model."""
        made = self.checkpoint
        if self.d_model != width:
            raise UserError(
                f"the guard reads vectors of {self.d_model} entries and the model's have {width}; fit a guard for this "
                "model, or load the model that it was fitted on"
            )
        if not other_weights or made.regime != checkpoint.regime:
            require_same_weights("guard", made, checkpoint, TRANSFER if made.regime == checkpoint.regime else ANEW)
        require_same_template("guard", self.template, template, ANEW)

    def __repr__(self) -> str:
        asked = self.settings
        facts = {
            "reads": f"levels {few(self.levels)} at {few(self.positions)}",
            "threshold": f"{self.calibration.threshold:.4g}",
            "fitted on": f"{len(self.train_ids)} prompts",
        }
        sides = f"{asked.positive} against {asked.negative}"
        return lines(f"FittedGuard by {asked.rule}, {sides}, of {self.checkpoint.name}", facts)


ANEW = "fit a guard for this model"
TRANSFER = f"{ANEW}, or see how it transfers with --other-weights (other_weights=True in Python)"


def _require_finite(scores: Float[Tensor, " prompt"]) -> None:
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"the score of prompt {bad[0] + 1} of {len(scores)} is {float(scores[bad[0]])}, so it can't be judged; the "
            "model's activations are not finite there: load it in float32 or bfloat16"
        )
