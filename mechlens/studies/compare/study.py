"""`mechlens compare`: two checkpoints of one model, what was kept and what moves with their activations.

Two checkpoints are a short series: this is the tracking study of it, and reads and records as that does.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from mechlens.errors import UserError
from mechlens.models.checkpoints.series import CheckpointSeries, Member, checkpoint_series
from mechlens.runs.writer import RunWriter
from mechlens.studies.compare.config import Compare
from mechlens.studies.compare.moved import MovedActivations, move_activations
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.inputs import require_sampling
from mechlens.studies.track.inputs import SeriesStudy, prepare_series, series_prompts
from mechlens.studies.track.result import Tracking, TrackPlan
from mechlens.studies.track.study import track

BASE = "base"


@dataclass(frozen=True)
class Comparison:
    """All that the comparison found."""

    tracking: Tracking
    moved: MovedActivations


def prepare(config: Compare) -> Preparation[SeriesStudy]:
    """Both checkpoints, A first, each at the step it has in its own series; UserError for whatever can't be had."""
    require_sampling(config)
    pair = _pair(config)
    return prepare_series(config, pair, series_prompts(config, pair))


def execute(config: Compare, given: SeriesStudy, writer: RunWriter) -> Comparison:
    """The comparison of the two."""
    plan = TrackPlan(
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        positions=("inst", "last"),
        levels=None,
        steered=config.steered,
        n_resamples=config.resamples,
        n_permutations=config.permutations,
        n_random=config.random_directions,
        judge=config.judge,
    )
    with given.swapper as swapper:
        result = track(swapper, given.series, given.questions, plan, cache=writer.cache)
        moved = move_activations(
            swapper, given.series, result, positions=config.positions, n=config.patched, seed=config.seed,
            cache=writer.cache,
        )  # fmt: skip
    return Comparison(result, moved)


def _pair(config: Compare) -> CheckpointSeries:
    """The two as a series of their own; UserError where either names none or several checkpoints."""
    (first, own), (second, template) = (_member(config, source) for source in (config.first, config.second))
    if first.kind != "base" and own != template:
        raise UserError(
            f"{config.first!r} and {config.second!r} were saved with different chat templates, so positions and "
            "answers can't be compared; give two of one training run"
        )
    if second.kind == "base" or (first.path, first.revision) == (second.path, second.revision):
        raise UserError(f"A is {config.first!r} and B is {config.second!r}; give two checkpoints, the base only as A")
    if second.step <= first.step:  # of two runs, or in the other order: the axis is only first and second then
        first, second = replace(first, step=0), replace(second, step=1)
    return CheckpointSeries((first, second), (), "their records", template)


def _member(config: Compare, source: str) -> tuple[Member, str | None]:
    """The checkpoint, and its chat template where it isn't the base's."""
    if source == BASE:
        return Member(Path(config.base).name, config.base, "base", 0, config.revision), None
    series = checkpoint_series(config.base, [source], revision=config.revision)
    found = series.members[1:]
    if len(found) != 1:
        steps = ", ".join(str(member.step) for member in found)
        raise UserError(f"{source!r} holds {len(found)} checkpoints (steps {steps}); give the folder of one")
    return found[0], series.chat_template
