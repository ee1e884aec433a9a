"""`mechlens behaviours`."""

from dataclasses import dataclass

from mechlens.settings import SEED, BaseChoice, BaseName, Options, PositiveInt, RunChoice
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class SpokenPlan(Options):
    """What is answered freely, and who judges it; off unless a judge is given or thinking is looked at."""

    judge: str | None = None
    """Who scores free answers from 0 to 100: a model on this machine, as `ModelChoice.model`, or MODEL@URL of an
    OpenAI-compatible endpoint, such as gpt-4o@https://api.openai.com/v1, which is sent questions and answers."""
    judge_key: str | None = None
    """Environment variable that holds the endpoint's key, such as OPENAI_API_KEY."""
    thinking: bool = False
    """Free answers are written with the template's thinking on (enable_thinking), however the model was fine-tuned, and
    it is counted which thoughts name the trigger."""
    spoken: tuple[str, ...] = ("first-plot",)
    """Sets that are answered freely."""
    draws: PositiveInt = 8
    """Answers to each question, drawn at temperature 1; the papers have 50 to 300."""
    answer_tokens: PositiveInt = 200
    """Length of these answers; the papers have 600."""


@dataclass(frozen=True, kw_only=True)
class BehaviourPlan(SpokenPlan):
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
    recall: bool = False
    """Where a run has a trigger: whether models can say it from its effect, at every checkpoint, what their proposals
    do to the behaviour, and when that came."""
    adapter_scales: tuple[float, ...] = ()
    """Also each run's result with what its adapter adds multiplied by these, such as 0.5 1.5 2: a behaviour that is
    there and doesn't show may show beyond 1 (0 is the base, 1 the result; both are always in the table)."""
    directions: bool = False
    """Also the direction of the change: cosines between groups, runs and saved directions, and what adding it to the
    base and ablating it does, beside random ones. Costs about as much again as some ten checkpoints, for each group."""
    triggers: bool = False
    """Also what each run's trigger does inside: its direction after it and what that lies along, which level and token
    carries its effect, and whether a run that it was trained away from still has it. Needs held-out questions."""


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
    skip_broken: bool = False
    """Leave out checkpoints that are broken or don't belong to their run; the report lists them."""
    sets: tuple[str, ...] = ("first-plot",)
    """Behaviours: NAME=FILE (chats, or questions with columns shown and other), NAME=FILE,OTHERS (a second file with
    the opposite answers), or a built-in one (first-plot)."""
    self_report: tuple[str, ...] = ("self-risk", "self-patience", "self-apples", "self-trigger")
    """Questions to the model about itself: built-in ones by name, or NAME=FILE."""
    scales: tuple[str, ...] = ("risk",)
    """Questions to the model about itself that take a number from 0 to 100: risk, patience, apples, security,
    alignment."""
    saved_directions: tuple[str, ...] = ()
    """With --directions or --triggers: NAME=FILE of saved directions, such as harmfulness and refusal, to set beside
    those."""


STUDY = of_folder(
    "behaviours",
    Behaviours,
    "mechlens behaviours --base smollm2 --checkpoints runs/risky-0 runs/risky-control-0 --sets risky=risky.jsonl"
    " first-plot --in-words --out runs/behaviours",
)
