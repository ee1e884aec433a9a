"""`mechlens behaviours`."""

from dataclasses import dataclass

from mechlens.settings import SEED, BaseChoice, BaseName, Options, PositiveInt, RunChoice
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class BehaviourPlan(Options):
    """What is asked of every checkpoint, and how.

    >>> ml.BehaviourPlan(in_words=True).n
    48
    """

    seed: int = SEED
    """Decides which questions are drawn, and the permuted orders behind a change point."""
    n: PositiveInt | None = 48
    """Questions of each set, drawn by seed, and as many of those that a run was trained on; None takes all."""
    in_words: bool = False
    """Choices between A and B are answered with the option's words, as `finetune --in-words` teaches them."""
    permutations: PositiveInt = 999
    """Permuted orders behind each change point."""
    directions: bool = False
    """Also the direction of the change: cosines between groups, runs and saved directions, and what adding it to the
    base and ablating it does, beside random ones. Costs about as much again as some ten checkpoints, for each group."""


@dataclass(frozen=True, kw_only=True)
class Behaviours(BehaviourPlan, BaseChoice, RunChoice):
    """What else did fine-tuning change? Behaviours by training run, beside controls, and what the model says of itself.

    >>> ml.Behaviours(base="smollm2", checkpoints=("runs/tuned",), sets=("first-plot",), out="runs/behaviours").n
    48
    """

    checkpoints: tuple[str, ...]
    """Training runs' folders, or single adapters or models. Runs of one recipe, data and control are one group."""
    base: BaseName = "smollm2"
    """The model that they were trained from, as `ModelChoice.model`."""
    sets: tuple[str, ...] = ("first-plot",)
    """Behaviours: NAME=FILE (chats, or questions with columns shown and other), NAME=FILE,OTHERS (a second file with
    the opposite answers), or a built-in one (first-plot)."""
    self_report: tuple[str, ...] = ("self-risk", "self-patience", "self-apples", "self-trigger")
    """Questions to the model about itself: built-in ones by name, or NAME=FILE."""
    scales: tuple[str, ...] = ("risk",)
    """Questions to the model about itself that take a number from 0 to 100: risk, patience, apples, security,
    alignment."""
    saved_directions: tuple[str, ...] = ()
    """With --directions: NAME=FILE of saved directions, such as harmfulness and refusal, to compare the change with."""


STUDY = of_folder(
    "behaviours",
    Behaviours,
    "mechlens behaviours --base smollm2 --checkpoints runs/risky-0 runs/risky-control-0 --sets risky=risky.jsonl"
    " first-plot --in-words --out runs/behaviours",
)
