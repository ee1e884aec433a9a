"""A guard's worst mistakes, and the direction that it reads, for looking at what misled it."""

from dataclasses import dataclass

from mechlens.methods.directions.direction import Direction
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.guard.rules import LinearScore
from mechlens.studies.guard.evaluation import GuardEvaluation


@dataclass(frozen=True)
class Mistake:
    """A test prompt on the wrong side of the threshold."""

    row: int
    kind: str
    """ "false alarm" or "missed"."""
    score: float


def worst_mistakes(result: GuardEvaluation, of_each: int) -> list[Mistake]:
    """The harmless prompts with the highest scores and the harmful ones with the lowest, of those judged wrongly."""
    detector = result.detectors[0]
    scores, flagged = detector.scores.tolist(), detector.flagged.tolist()
    harmful = [prompt.label == "harmful" for prompt in result.examined.prompts]
    rows = range(len(scores))
    alarms = sorted((i for i in rows if flagged[i] and not harmful[i]), key=lambda i: -scores[i])[:of_each]
    missed = sorted((i for i in rows if harmful[i] and not flagged[i]), key=lambda i: scores[i])[:of_each]
    return [Mistake(i, "false alarm", scores[i]) for i in alarms] + [Mistake(i, "missed", scores[i]) for i in missed]


def read_direction(guard: FittedGuard) -> Direction:
    """The line along which the guard's first place is scored; for cosines, from one centroid to the other."""
    place = guard.places[0]
    score = place.score
    vector = score.weight if isinstance(score, LinearScore) else score.positive - score.negative
    return Direction(
        vector=vector.float(),
        level=place.level,
        position=place.position,
        site=guard.site,
        method=f"guard, {guard.settings.rule}",
        contrast=(guard.settings.positive, guard.settings.negative),
        checkpoint=guard.checkpoint,
        template=guard.template,
        train_ids=guard.train_ids,
    )
