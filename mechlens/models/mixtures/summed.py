"""Checkpoints of one base added up: what each changed, times a weight, in the one model in which they take turns."""

from collections.abc import Mapping

from torch import Tensor

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import CheckpointSwapper


def put_mixture(swapper: CheckpointSwapper, weights: Mapping[Member, float]) -> LanguageModel:
    """The base plus weight times what each checkpoint changed (task arithmetic; Ilharco et al. 2023).

    Of LoRA and rsLoRA adapters it's what peft's `add_weighted_adapter(..., combination_type="cat")` gives; DoRA
    adapters and whole models are added by the differences that they make. One of weight 1 is that checkpoint itself.
    The next `put` ends it.

    >>> series = ml.checkpoint_series("smollm2", ["runs/tuned"])
    >>> with ml.checkpoint_swapper("smollm2") as one:
    ...     model = ml.put_mixture(one, {series.members[1]: 0.5})
    ...     name = model.mechlens.checkpoint.name
    >>> name
    '0.5 checkpoint-10'
    """
    if not weights:
        raise UserError("no checkpoint is to be mixed; give at least one, with its weight")
    total: dict[str, Tensor] = {}
    for member, weight in weights.items():
        for name, change in swapper.added(member).items():
            total[name] = total[name] + weight * change if name in total else weight * change
    return swapper.put_sum(total, " + ".join(f"{weight:g} {member.name}" for member, weight in weights.items()))
