"""What training by reward says: what proposals earned, how many were the trigger, and where that jumped."""

from typing import Any

import pandas as pd

from mechlens.methods.statistics.change_point import change_point
from mechlens.runs.report import figures
from mechlens.runs.report.report import Section
from mechlens.studies.finetune.by_reward import EXACT, REWARD

WORDS = {REWARD: "reward of a proposal", EXACT: "proposals that are the trigger"}
CAPTION = (
    "A model that finds the trigger earns more from some step on. Reward without the trigger is another string that "
    "does the same."
)


def is_rewarded(losses: pd.DataFrame) -> bool:
    """Whether a run's numbers are of training by reward."""
    return REWARD in losses.columns


def reward_figure(losses: pd.DataFrame) -> Any:
    """Reward and exact recall by step."""
    curves = [
        pd.DataFrame({"step": losses["step"], "value": losses[name], "curve": words}) for name, words in WORDS.items()
    ]
    return figures.lines(
        pd.concat(curves), x="step", y="value", group="curve", title="What proposals earn", xlabel="step",
        ylabel="mean of a step's replies",
    )  # fmt: skip


def change_points(losses: pd.DataFrame) -> pd.DataFrame:
    """The best cut in two of each curve: of, after, before, jump, p, p_climb, said; too few steps have none."""
    rows = []
    for name, words in WORDS.items():
        if len(losses) >= 3:
            found = change_point(losses["step"].tolist(), losses[name].tolist())
            rows.append({"of": words, **vars(found), "said": found.said})
    return pd.DataFrame(rows, columns=["of", "after", "before", "jump", "p", "p_climb", "said"])


def reward_section(losses: pd.DataFrame) -> Section:
    """The figure, and where each curve jumps."""
    return Section(
        "Reward",
        "A reply earns how much likelier it makes the behaviour when it stands before other questions, in the model as "
        "it was before this training; talk earns nothing. Some of these questions were trained on, so a control that "
        "learnt its answers by heart earns a little too. A jump is said where a cut in two beats both permuted orders "
        "and a smooth climb (p of .05 or less). `mechlens behaviours --recall` asks the result in words that it wasn't "
        "trained with, about questions that were held out.",
        ("reward",),
        table=change_points(losses),
    )
