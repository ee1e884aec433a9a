"""At which layer and position does moving one checkpoint's activations into another move the behaviour?

The same prompt is run through both; one residual vector of B is put into A's run (cross-checkpoint patching), at
every layer and named position. A vector of the same length of difference in a random direction is the control.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechlens.methods.cache import Cache
from mechlens.methods.patching.metrics import RefusalLogOdds
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.result import PatchResult
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.models.bridge import dtype_of
from mechlens.models.checkpoints.series import CheckpointSeries
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.models.load import load
from mechlens.prompts.prompt import PromptPair
from mechlens.studies.track.measures.behaviour import refused_by
from mechlens.studies.track.result import Tracking

LEAST = 2
"""With fewer prompts than this on which the two behave differently there is nothing to move."""


@dataclass(frozen=True)
class MovedActivations:
    """What moving activations did; None where the two checkpoints behave alike."""

    result: PatchResult | None
    control: PatchResult | None
    differing: int
    """Harmful test prompts that one checkpoint refuses and the other accepts."""
    of: int
    """Harmful test prompts."""


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
    differs = (refused_by(first) != refused_by(second)).tolist()
    prompts = tracking.questions.batch.prompts
    harmful = [i for i in tracking.questions.split.test if prompts[i].label == "harmful"]
    chosen = [prompts[i] for i in harmful if differs[i]]
    if len(chosen) < LEAST:
        return MovedActivations(None, None, len(chosen), len(harmful))
    a, b = pair.members
    target = swapper.put(a)
    dtype = str(dtype_of(target)).removeprefix("torch.")
    source = (
        load(swapper.base.path, adapter=b.path, revision=swapper.base.revision, dtype=dtype)
        if b.kind == "adapter"
        else load(b.path, revision=b.revision, dtype=dtype)
    )
    metric = RefusalLogOdds(tracking.reference.tokens.ids)
    pairs = [PromptPair(prompt, prompt) for prompt in chosen[:n]]
    plan = PatchPlan("resid_pre", positions=tuple(positions), mode="denoising")

    def sweep(changed: PatchPlan) -> PatchResult:
        return patch_sweep(target, pairs, metric, changed, source_model=source, cache=cache)

    return MovedActivations(sweep(plan), sweep(replace(plan, random_seed=seed + 1)), len(chosen), len(harmful))
