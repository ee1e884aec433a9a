"""Ways to detect harmful prompts beside the Latent Guard, fitted to the same prompts and tested on the same ones.

Every detector that is fitted gets its threshold as the guard does: from scores of folds of the training prompts that
it wasn't fitted to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import Direction
from mechlens.methods.directions.nulls import refitted_scores
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.guard.guard_model import GuardModelOpinion
from mechlens.methods.probing.baselines import mean_embedding_scores, tfidf_scores
from mechlens.methods.statistics.calibration import fpr_threshold
from mechlens.methods.statistics.resample import ScoreFold, held_out_scores
from mechlens.studies.shared.contrasts import Surface, best_direction
from mechlens.studies.shared.quadrants import FirstTokenJudgement, JudgedAnswers

FOLDS = 5


@dataclass(frozen=True)
class Detector:
    """One detector's word on every test prompt."""

    name: str
    scores: Float[Tensor, " prompt"] | None
    """Higher is more harmful, in units of its own; None where it only says yes or no, so that it has no AUROC."""
    flagged: Bool[Tensor, " prompt"]
    probabilities: Float[Tensor, " prompt"] | None = None
    note: str = ""


@dataclass(frozen=True)
class TrainAndTest:
    """Something known of training and of test prompts: rows of the first come before rows of the second."""

    labels: tuple[str, ...]
    families: tuple[str, ...]
    n_train: int
    max_fpr: float
    seed: int

    @property
    def positive(self) -> Bool[Tensor, " prompt"]:
        """True for harmful prompts, training and test."""
        return torch.tensor([label == "harmful" for label in self.labels])

    @property
    def train(self) -> list[int]:
        """Rows of the training prompts."""
        return list(range(self.n_train))

    @property
    def test(self) -> list[int]:
        """Rows of the test prompts."""
        return list(range(self.n_train, len(self.labels)))

    def detector(self, name: str, score: ScoreFold, note: str = "") -> Detector:
        """The detector that `score` makes of rows to fit on, calibrated on held-out folds of the training prompts."""
        labels, families = self.positive[: self.n_train], self.families[: self.n_train]
        held_out = held_out_scores(score, labels, families, FOLDS, self.seed)
        threshold = fpr_threshold(held_out[~labels], self.max_fpr)
        scores = score(self.train, self.test).double()
        return Detector(name, scores, scores > threshold, note=note)


def guard_detector(name: str, guard: FittedGuard, test: Activations, *, other_weights: bool) -> Detector:
    """The guard's own scores, decisions and probabilities."""
    scores = guard.scores(test, other_weights=other_weights)
    threshold, chances = guard.calibration.threshold, guard.calibration.probability(scores)
    places = ", ".join(f"{place.position} level {place.level}" for place in guard.places[:4])
    more = f" and {len(guard.places) - 4} more" if len(guard.places) > 4 else ""
    return Detector(name, scores, scores > threshold, chances, f"{guard.settings.rule}: {places}{more}")


def surface_detectors(both: TrainAndTest, surface: Surface, tokens: Float[Tensor, "prompt d_model"]) -> list[Detector]:
    """The words, their mean embedding, the token at `inst` (`tokens`: level 0 there), the length."""
    positive = both.positive

    def words(fit: list[int], on: list[int]) -> Tensor:
        return tfidf_scores([surface.texts[i] for i in fit], positive[fit], [surface.texts[i] for i in on])

    def embeddings(fit: list[int], on: list[int]) -> Tensor:
        return mean_embedding_scores(surface.mean_embeddings[fit], positive[fit], surface.mean_embeddings[on])

    def token(fit: list[int], on: list[int]) -> Tensor:
        labels = positive[fit][None].double()
        return refitted_scores(tokens[fit], tokens[on], labels, 1 - labels)[0]

    return [
        both.detector("tfidf", words, "logistic regression on TF-IDF of words and pairs"),
        both.detector("mean_embedding", embeddings, "logistic regression on the mean token embedding"),
        both.detector("token_identity", token, "the token at inst before any block has run"),
        signed_detector(both, "length", surface.n_tokens.double(), "number of tokens"),
    ]


def signed_detector(both: TrainAndTest, name: str, values: Float[Tensor, " prompt"], note: str) -> Detector:
    """One number a prompt, higher or lower counting as harmful as it does among the prompts fitted on."""
    positive = both.positive

    def score(fit: list[int], on: list[int]) -> Tensor:
        fitted = values[fit]
        up, down = fitted[positive[fit]].mean(), fitted[~positive[fit]].mean()
        return values[on] * (1.0 if bool(up >= down) else -1.0)

    return both.detector(name, score, note)


def refusal_direction(train: Activations, verdicts: Sequence[str], seed: int) -> Direction | None:
    """Refused minus accepted training prompts at the last token; None where there are too few of either."""
    return best_direction(replace(train, labels=tuple(verdicts)), "refused", "accepted", "last", seed)


def refusal_detectors(
    both: TrainAndTest,
    judged: JudgedAnswers,
    first_token: FirstTokenJudgement,
    direction: Direction | None,
    residuals: Float[Tensor, "prompt d_model"] | None,
) -> list[Detector]:
    """The projection on the refusal direction (`residuals` at its level and the last token), and the model's refusal.

    The model's own refusal is scored by the log-odds of a refusal in the first token and decided by its answer.
    """
    detectors = []
    if direction is not None and residuals is not None:
        refused = torch.tensor(judged.refused)

        def score(fit: list[int], on: list[int]) -> Tensor:
            labels = refused[fit][None].double()
            if not bool(labels.any()) or bool(labels.all()):
                labels = both.positive[fit][None].double()
            return refitted_scores(residuals[fit], residuals[on], labels, 1 - labels)[0]

        note = f"refused minus accepted at {direction.position}, level {direction.level}"
        detectors.append(both.detector("refusal_direction", score, note))
    flagged = torch.tensor(judged.refused)[both.test]
    note = f"answers by the judge {judged.judge}; scores: first-token log-odds ({first_token.tokens.origin} tokens)"
    detectors.append(Detector("own_refusal", first_token.log_odds[both.test].double(), flagged, note=note))
    return detectors


def guard_model_detector(name: str, said: GuardModelOpinion) -> Detector:
    """A guard model, scored by its log-odds, flagging by its words: an answer without a verdict flags nothing."""
    flagged = torch.tensor([answer.harmful is True for answer in said.answers])
    note = f"{said.note}; {said.unread} of {len(said.answers)} answers without a verdict"
    return Detector(name, said.log_odds, flagged, note=note)
