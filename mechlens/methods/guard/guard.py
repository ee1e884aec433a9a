"""The Latent Guard: the model's own belief of harmfulness as a detector (Zhao et al. 2025), in scikit-learn's terms.

An estimator: parameters in the constructor and untouched by it, `fit` gives the estimator back, what was learnt ends
in an underscore, `get_params`, `set_params` and `clone` work. In place of X and y it takes `Activations`, which carry
their labels. Files are no business of methods; `mechlens.LatentGuard` adds `save` and `load`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor

from mechlens.choices import RULES
from mechlens.errors import UserError, quoted
from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.guard.fitted import FittedGuard, GuardSettings, GuardVerdict, Place
from mechlens.methods.guard.rules import PlaceScore, needs_refusals, require_pools, score_by
from mechlens.methods.probing.auroc import auroc
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.calibration import calibrate
from mechlens.methods.statistics.resample import held_out_scores, one_thread
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.asked import Prompts
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import TemplateChoice

AS_GOOD, AS_FAR = 0.01, 0.8
"""A lower level does as well as the best one where its validation AUROC is at most so much lower, and its classes lie
at least this share of the best one's standard deviations apart: small parts often leave many levels at AUROC 1."""

FitPlace = Callable[[Activations, int, str], PlaceScore]
"""The rule fitted to activations at a level and a position."""
Estimator = TypeVar("Estimator", bound="GuardEstimator")


class GuardEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """Detects harmful prompts from the residual stream at `inst`, `last` or both.

    `rule`: a name of `mechlens.choices.RULES`, such as "faithful" (the paper's) or "logistic". `levels`: "best" chooses
    one for each position on validation: the lowest that does as well as the best one (`AS_GOOD`, `AS_FAR`), so that the
    guard leaves early, and never level 0, which knows only the token; "all" averages over all that were collected, as
    the paper does; or give them. `max_fpr` sets the threshold, None leaves it at the paper's 0. `positive` and
    `negative` are the labels to tell apart.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> guard = ml.GuardEstimator(rule="lda", max_fpr=0.1).fit(ml.collect(model, prompts))
    >>> guard.predict(ml.collect(model, prompts[:3])).shape
    (3,)
    """

    def __init__(
        self,
        rule: str = "logistic",
        positions: tuple[str, ...] = ("inst", "last"),
        levels: str | tuple[int, ...] = "best",
        max_fpr: float | None = 0.05,
        folds: int = 5,
        seed: int = 0,
        positive: str = "harmful",
        negative: str = "harmless",
    ) -> None:
        self.rule = rule
        self.positions = positions
        self.levels = levels
        self.max_fpr = max_fpr
        self.folds = folds
        self.seed = seed
        self.positive = positive
        self.negative = negative

    @classmethod
    def with_settings(cls: type[Estimator], settings: GuardSettings) -> Estimator:
        """The estimator that would fit a guard in the same way."""
        return cls(
            settings.rule, settings.positions, settings.levels, settings.max_fpr, settings.folds, settings.seed,
            settings.positive, settings.negative,
        )  # fmt: skip

    @one_thread()
    def fit(
        self: Estimator,
        acts: Activations,
        split: Split | None = None,
        train_sha256: Sequence[str] = (),
        refused: Mapping[str, bool] | None = None,
    ) -> Estimator:
        """Chooses levels, fits, and calibrates threshold and probabilities; no test prompt is touched.

        `split` holds row numbers of `acts` (by default 7 in 10 families train and the others choose); other labels
        are left out. Levels are chosen with fits to the training part by AUROC on the validation part. The rule is
        then fitted to both parts, and calibrated with scores of folds of them that it wasn't fitted to.
        `train_sha256`: fingerprints of the texts of `acts`, in order, to be known again by evaluations. `refused`: by
        prompt id, what the model refuses, for the rules that have to know (`ByRefusal`).
        """
        settings = self._settings()
        split = split or split_by_family(acts.labels, acts.families, fractions=(0.7, 0.3, 0.0), seed=self.seed)
        train, validation = (self._part(acts, rows) for rows in (split.train, split.validation))
        rows = [i for i in sorted({*split.train, *split.validation}) if acts.labels[i] in self._labels]
        known = acts.select(rows)
        fit = self._fit_of_place(known, refused)
        places = [place for name in self._named(acts) for place in self._places(train, validation, name, fit)]
        fitted = tuple(replace(place, score=fit(known, place.level, place.position)) for place in places)
        held_out = self._cross_fitted(known, fitted, fit)
        self.fitted_ = FittedGuard(
            settings=settings,
            places=fitted,
            calibration=calibrate(held_out, self._is_positive(known), self.max_fpr),
            site=acts.site,
            checkpoint=acts.checkpoint,
            template=acts.template,
            train_ids=known.ids,
            train_sha256=tuple(train_sha256[i] for i in rows) if train_sha256 else (),
        )
        self._learnt()
        return self

    def score(self, acts: Activations) -> Float[Tensor, " prompt"]:
        """The guard's score of every prompt (float64), harmful above `fitted_.calibration.threshold`."""
        return self.fitted.scores(acts)

    def decision_function(self, acts: Activations) -> NDArray[np.float64]:
        """scikit-learn's name for `score`, about the threshold: positive is harmful."""
        values: NDArray[np.float64] = (self.score(acts) - self.fitted.calibration.threshold).numpy()
        return values

    def predict(self, acts: Activations) -> NDArray[Any]:
        """One of `classes_` for every prompt."""
        chosen: NDArray[Any] = self.classes_[(self.decision_function(acts) > 0).astype(int)]
        return chosen

    def predict_proba(self, acts: Activations) -> NDArray[np.float64]:
        """Probabilities of `classes_`, where both are equally common."""
        chance = self.fitted.calibration.probability(self.score(acts)).numpy()
        return np.stack([1 - chance, chance], axis=1)

    def __call__(
        self,
        model: LanguageModel,
        texts: Prompts,
        template: TemplateChoice = "tokenizer",
        *,
        other_weights: bool = False,
    ) -> list[GuardVerdict]:
        """Judges requests by the model that the guard was fitted on, running only the blocks that it reads."""
        return self.fitted.ask(model, texts, template, other_weights=other_weights)

    @property
    def fitted(self) -> FittedGuard:
        """What was fitted; NotFittedError before."""
        if not hasattr(self, "fitted_"):
            raise NotFittedError("this guard is not fitted yet; call fit with activations, or load one")
        return self.fitted_

    def _learnt(self) -> None:
        """scikit-learn's names for what `fitted_` holds."""
        self.classes_ = np.array([self.negative, self.positive])
        self.n_features_in_ = self.fitted_.d_model

    def _settings(self) -> GuardSettings:
        RULES.require(self.rule)
        if isinstance(self.levels, str) and self.levels not in ("best", "all"):
            raise UserError(f"levels is {self.levels!r}; choose best, all, or give their numbers")
        if self.max_fpr is not None and not 0 < self.max_fpr < 1:
            raise UserError(f"max_fpr is {self.max_fpr}; give a share between 0 and 1, or None for a threshold of 0")
        if not self.positions:
            raise UserError("the guard has no position to read; give inst, last or both")
        return GuardSettings(**self.get_params())

    @property
    def _labels(self) -> tuple[str, str]:
        return self.positive, self.negative

    def _named(self, acts: Activations) -> list[str]:
        """The positions under the names that the activations keep them by."""
        columns = [column_of(name, acts.positions, acts.last) for name in self.positions]
        return [acts.positions[column] for column in dict.fromkeys(columns)]

    def _part(self, acts: Activations, rows: Sequence[int]) -> Activations:
        part = acts.select([i for i in rows if acts.labels[i] in self._labels])
        counts = {label: part.labels.count(label) for label in self._labels}
        if min(counts.values()) < 2:
            raise UserError(
                f"a part of the split has {counts} prompts; a guard needs at least 2 of each label to be fitted and "
                "to choose levels, so add prompts"
            )
        if part.broken_levels():
            raise UserError("activations are not finite; collect them again in float32 or bfloat16")
        return part

    def _is_positive(self, acts: Activations) -> Bool[Tensor, " prompt"]:
        return torch.tensor([label == self.positive for label in acts.labels])

    def _fit_of_place(self, known: Activations, refused: Mapping[str, bool] | None) -> FitPlace:
        """The rule as a function of activations and a place; UserError where it has to know more of their prompts."""
        if needs_refusals(self.rule) and refused is not None:
            require_pools(self.rule, self._is_positive(known), _flags(known, refused))

        def fit(acts: Activations, level: int, position: str) -> PlaceScore:
            flags = None if refused is None else _flags(acts, refused)
            return score_by(self.rule, acts.at(level, position), self._is_positive(acts), flags)

        return fit

    def _places(self, train: Activations, validation: Activations, position: str, fit: FitPlace) -> list[Place]:
        """The places of one position, fitted to the training part."""
        candidates = self._candidates(train)
        bar = progress_bar(candidates, title=f"levels at {position}", unit="level")
        found = [self._tried(train, validation, fit, level, position) for level in bar]
        if self.levels != "best":
            return [place for place, _ in found]
        # Of equals, which small validation parts bring, the one that separates most.
        best, furthest = max(found, key=lambda one: (one[0].validation_auroc, one[1]))
        as_good = (
            place
            for place, apart in found
            if place.validation_auroc >= best.validation_auroc - AS_GOOD and apart >= min(furthest, AS_FAR * furthest)
        )
        return [min(as_good, key=lambda place: place.level)]

    def _candidates(self, acts: Activations) -> tuple[int, ...]:
        wanted = tuple(level for level in acts.levels if level > 0) if self.levels == "best" else acts.levels
        levels = wanted if isinstance(self.levels, str) else self.levels
        if not levels:
            raise UserError("there is no level to choose from beside the embedding; collect at least one above it")
        return levels

    def _tried(
        self, train: Activations, validation: Activations, fit: FitPlace, level: int, position: str
    ) -> tuple[Place, float]:
        """A place fitted to the training part, and how far apart the validation classes are in standard deviations."""
        score = fit(train, level, position)
        values, positive = score(validation.at(level, position)), self._is_positive(validation)
        up, down = values[positive], values[~positive]
        spread = float(((up.var(correction=0) + down.var(correction=0)) / 2).sqrt())
        gap = float(up.mean() - down.mean())
        return Place(level, position, score, float(auroc(values, positive))), gap / spread if spread else 0.0

    def _cross_fitted(self, acts: Activations, places: Sequence[Place], fit: FitPlace) -> Float[Tensor, " prompt"]:
        """Every prompt's score by a fit to the folds that don't hold its family."""

        def score(fitted: list[int], held_out: list[int]) -> Tensor:
            inside, outside = acts.select(fitted), acts.select(held_out)
            where = [(place.level, place.position) for place in places]
            values = [fit(inside, *place)(outside.at(*place)) for place in where]
            return torch.stack(values).mean(dim=0)

        return held_out_scores(score, self._is_positive(acts), acts.families, self.folds, self.seed)


def _flags(acts: Activations, refused: Mapping[str, bool]) -> Bool[Tensor, " prompt"]:
    unknown = [name for name in acts.ids if name not in refused]
    if unknown:
        raise UserError(f"nothing says whether the model refuses {quoted(unknown[0])}; give `refused` for every prompt")
    return torch.tensor([refused[name] for name in acts.ids])
