"""What can be set, apart from what does the work: no torch here, so that `--help` is instant."""

from typing import Any

from mechlens.config.causal import Causal
from mechlens.config.checkpoints import Checkpoints
from mechlens.config.compare import Compare
from mechlens.config.direction import FindDirection
from mechlens.config.finetune import Finetune, FinetuneConfig, settled
from mechlens.config.guard import Guard, GuardEval, GuardFit, GuardPredict
from mechlens.config.jailbreaks import Jailbreaks
from mechlens.config.patch import Patch
from mechlens.config.positions import Positions
from mechlens.config.runs import ListRuns, Rerun, Runs, ShowRun
from mechlens.config.select import Select
from mechlens.config.separate import Separate
from mechlens.config.shared_settings import ModelChoice, Sampling, WandbSettings
from mechlens.config.steer import Steer
from mechlens.config.track import Track

RECORDED: dict[str, Any] = {
    "separate": Separate,
    "direction": FindDirection,
    "patch": Patch,
    "select": Select,
    "causal": Causal,
    "guard_fit": GuardFit,
    "guard_eval": GuardEval,
    "jailbreaks": Jailbreaks,
    "finetune": Finetune,
    "track": Track,
    "compare": Compare,
}
"""The verbs that write a run folder, in the order of `--help`; each is done by the module of its name in `verbs`."""

GROUPS: dict[str, Any] = {"guard": Guard}
"""Verbs that hold others: `guard fit` is the recorded verb guard_fit."""

__all__ = [
    "GROUPS",
    "RECORDED",
    "Causal",
    "Checkpoints",
    "Compare",
    "FindDirection",
    "Finetune",
    "FinetuneConfig",
    "Guard",
    "GuardEval",
    "GuardFit",
    "GuardPredict",
    "Jailbreaks",
    "ListRuns",
    "ModelChoice",
    "Patch",
    "Positions",
    "Rerun",
    "Runs",
    "Sampling",
    "Select",
    "Separate",
    "ShowRun",
    "Steer",
    "Track",
    "WandbSettings",
    "settled",
]
