"""`mechlens compare`: two checkpoints of one model, what was kept and what moves with their activations.

Two checkpoints are a short series: this is the tracking study of it, and reads and records as that does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mechlens.errors import UserError
from mechlens.methods.cache import Cache
from mechlens.methods.patching.metrics import RefusalLogOdds
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.result import PatchResult
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.models.bridge import device_of, dtype_of
from mechlens.models.checkpoints.series import CheckpointSeries, Member, checkpoint_series
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.models.load import load
from mechlens.prompts.prompt import PromptPair
from mechlens.runs.writer import RunWriter
from mechlens.studies.compare.config import FEWEST, Compare
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.inputs import asks
from mechlens.studies.track.config import SeriesPlan, TrackPlan
from mechlens.studies.track.inputs import SeriesStudy, prepare_series, series_prompts
from mechlens.studies.track.measures.behaviour import refused_by
from mechlens.studies.track.result import Tracking
from mechlens.studies.track.study import track

BASE = "base"


@dataclass(frozen=True)
class MovedActivations:
    """What moving activations did; None where the two checkpoints behave alike."""

    result: PatchResult | None
    control: PatchResult | None
    differing: int
    """Harmful test prompts that one checkpoint refuses and the other accepts."""
    of: int
    """Harmful test prompts."""


@dataclass(frozen=True)
class Comparison:
    """All that the comparison found."""

    tracking: Tracking
    moved: MovedActivations


def prepare(config: Compare) -> Preparation[SeriesStudy]:
    """Both checkpoints, A first, each at the step it has in its own series; UserError for whatever can't be had."""
    if 0 < config.patched < FEWEST:
        raise UserError(
            f"--patched is {config.patched}, and nothing is said of fewer than {FEWEST} prompts; give {FEWEST} or "
            "more, or 0 to leave patching out"
        )
    pair = _pair(config)
    asked = series_prompts(config, pair)
    check = asks(asked.prompts, config.positions, new_tokens=config.max_new_tokens)
    return prepare_series(config, pair, asked, check=check)


def execute(config: Compare, given: SeriesStudy, writer: RunWriter) -> Comparison:
    """The comparison of the two."""
    plan = TrackPlan(**{field.name: getattr(config, field.name) for field in fields(SeriesPlan)})
    with given.swapper as swapper:
        result = track(swapper, given.series, given.questions, plan, cache=writer.cache)
        moved = move_activations(
            swapper, given.series, result, positions=config.positions, n=config.patched, seed=config.seed,
            cache=writer.cache,
        )  # fmt: skip
    return Comparison(result, moved)


def _pair(config: Compare) -> CheckpointSeries:
    """The two as a series of their own; UserError where either names none or several checkpoints."""
    (first, before), (second, after) = (_member(config, source) for source in (config.first, config.second))
    if first.kind != "base" and before != after:
        raise UserError(
            f"{config.first!r} and {config.second!r} were saved with different chat templates, so positions and "
            "answers can't be compared; give two of one training run"
        )
    if second.kind == "base" or (first.path, first.revision) == (second.path, second.revision):
        raise UserError(f"A is {config.first!r} and B is {config.second!r}; give two checkpoints, the base only as A")
    if second.step <= first.step:  # of two runs, or in the other order: the axis is only first and second then
        first, second = replace(first, step=0), replace(second, step=1)
    return CheckpointSeries((first, second), (), "their records", after)


def _member(config: Compare, source: str) -> tuple[Member, str | None]:
    """The checkpoint, and its chat template where it isn't the base's."""
    if source == BASE:
        return Member(Path(config.base).name, config.base, "base", 0, config.revision), None
    series = checkpoint_series(config.base, [source], revision=config.revision)
    members = series.members[1:]
    if len(members) != 1:
        steps = ", ".join(str(member.step) for member in members)
        raise UserError(f"{source!r} holds {len(members)} checkpoints (steps {steps}); give the folder of one")
    return members[0], series.chat_template


LEAST = 2
"""With fewer prompts than this on which the two behave differently there is nothing to move."""


def move_activations(
    swapper: CheckpointSwapper,
    pair: CheckpointSeries,
    tracking: Tracking,
    *,
    positions: Sequence[str],
    n: int,
    seed: int,
    cache: Cache | None = None,
) -> MovedActivations:
    """Patches B's residual stream into A on the first `n` harmful test prompts where they behave differently.

    Holds both checkpoints in memory. Recovery 0 is A's own refusal log-odds, 1 is B's.
    """
    first, second = tracking.snapshots
    differs = ((refused_by(first) - refused_by(second)).abs() == 1).tolist()  # NaN where a judge couldn't tell
    prompts = tracking.questions.batch.prompts
    harmful = [i for i in tracking.questions.split.test if prompts[i].label == "harmful"]
    chosen = [prompts[i] for i in harmful if differs[i]]
    if min(len(chosen), n) < LEAST:
        return MovedActivations(None, None, len(chosen), len(harmful))
    a, b = pair.members
    target = swapper.put(a)
    dtype, device = str(dtype_of(target)).removeprefix("torch."), str(device_of(target))
    source = (
        load(swapper.base.path, adapter=b.path, revision=swapper.base.revision, dtype=dtype, device=device)
        if b.kind == "adapter"
        else load(b.path, revision=b.revision, dtype=dtype, device=device)
    )
    metric = RefusalLogOdds(tracking.reference.tokens.ids)
    pairs = [PromptPair(prompt, prompt) for prompt in chosen[:n]]
    plan = PatchPlan("resid_pre", positions=tuple(positions), mode="denoising")

    def sweep(changed: PatchPlan) -> PatchResult:
        return patch_sweep(target, pairs, metric, changed, source_model=source, cache=cache)

    return MovedActivations(sweep(plan), sweep(replace(plan, random_seed=seed + 1)), len(chosen), len(harmful))
