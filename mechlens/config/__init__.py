"""What can be set, apart from what does the work: no torch here, so that `--help` is instant."""

from typing import Any

from mechlens.config.direction import FindDirection
from mechlens.config.finetune import Finetune, FinetuneConfig, settled
from mechlens.config.patch import Patch
from mechlens.config.positions import Positions
from mechlens.config.runs import ListRuns, Rerun, Runs, ShowRun
from mechlens.config.separate import Separate
from mechlens.config.shared_settings import ModelChoice, Sampling, WandbSettings

RECORDED: dict[str, Any] = {
    "separate": Separate,
    "direction": FindDirection,
    "patch": Patch,
    "finetune": Finetune,
}
"""The verbs that write a run folder, in the order of `--help`; each is done by the module of its name in `verbs`."""

__all__ = [
    "RECORDED",
    "FindDirection",
    "Finetune",
    "FinetuneConfig",
    "ListRuns",
    "ModelChoice",
    "Patch",
    "Positions",
    "Rerun",
    "Runs",
    "Sampling",
    "Separate",
    "ShowRun",
    "WandbSettings",
    "settled",
]
