"""Settings that many studies share, each with its default: what is run, on what, and how much chance is sampled.

Nothing here imports torch, so that `--help` is instant.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from annotated_types import Ge, Gt, Le, Lt

from mechlens.choices import JUDGES, METHODS, MODELS, choice, hints_of, require_named
from mechlens.errors import UserError, kind_of, quoted
from mechlens.registry import nearest, unknown_name

MAX_DRAWS = 100_000
"""Resamples, permutations or random directions behind one number."""
FRACTIONS = (0.5, 0.2, 0.3)
"""Shares of the prompt families for training, validation and test."""
POSITIONS = ("inst", "post[*]")
"""Where a concept is looked for."""
SEED = 0
RESAMPLES = 1000
PERMUTATIONS = 200
RANDOM_DIRECTIONS = 20
RANDOM_NETWORKS = 3
ANSWER_TOKENS = 24
LEAST_AGREEMENT = 0.9
STEERED_TOKENS = 64
"""Length of answers that are looked at side by side."""
SOURCE = "A hub id, local folder, GGUF file or packaged name."
ModelName = Annotated[str, choice(MODELS, SOURCE, or_else="|ID|PATH")]
BaseName = Annotated[
    str, choice(MODELS, f"The model that the checkpoints were trained from. {SOURCE}", or_else="|ID|PATH")
]
JudgeName = Annotated[
    str, JUDGES, choice(JUDGES, "Who says whether an answer is a refusal; both published lists stand beside it.")
]
MethodName = Annotated[
    str,
    METHODS,
    choice(METHODS, "How the direction is found; all but the mean difference get at most 50 label permutations."),
]
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
Draws = Annotated[int, Ge(1), Le(MAX_DRAWS)]
"""How much chance is sampled: an interval or a null of nothing says nothing."""
RunFolder = Annotated[Path | str, tyro.conf.arg(metavar="PATH")]
TemplateArguments = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")]
"""Of the chat template, in the order given; a value is JSON where it parses as such, else text."""


class _ByName(type):
    """Makes a configuration of options by name: one that isn't known, lacks or can't be is one sentence."""

    def __call__(cls, *values: Any, **given: Any) -> Any:
        options, needed = [one.name for one in fields(cls) if one.init], needed_by(cls)  # type: ignore[arg-type]
        if len(values) > len(cls.__match_args__):  # type: ignore[attr-defined]
            raise UserError(f"{cls.__name__} takes its options by name, such as {such(cls)}")
        placed = dict(zip(cls.__match_args__, values, strict=False))  # type: ignore[attr-defined]
        if wrong := next((name for name in given if name not in options), None):
            near = nearest(wrong, options)
            more = f" ({near})" if near else ""
            raise UserError(f"{cls.__name__} has no option {wrong!r}{more}; it has {', '.join(options)}")
        if lacks := [name for name in needed if name not in {**placed, **given}]:
            raise UserError(f"{cls.__name__} needs {' and '.join(lacks)}; give them by name, such as {such(cls)}")
        hints = _hints(cls)
        first, rest = (
            {name: _as_meant(name, one, hints.get(name)) for name, one in part.items()} for part in (placed, given)
        )
        made = super().__call__(*first.values(), **rest)
        require_ranges(made)
        require_named(made)
        return made


def needed_by(config: Any) -> list[str]:
    """Options of a configuration that have no default."""
    return [one.name for one in fields(config) if one.init and MISSING is one.default is one.default_factory]


def such(config: Any) -> str:
    """How a configuration is written in Python, in short: Track(out=..., checkpoints=...)."""
    return f"{config.__name__}({', '.join(f'{name}=...' for name in needed_by(config))})"


class Options(metaclass=_ByName):
    """What every configuration and plan inherits, so that a slip of the hand is said where it is written.

    >>> try:
    ...     ml.Separate(out="runs/first", jugde="zhao")
    ... except ml.UserError as error:
    ...     print(str(error).partition(";")[0])
    Separate has no option 'jugde' (did you mean 'judge'?)
    """


@cache
def _hints(cls: type) -> Mapping[str, Any]:
    try:
        return get_type_hints(cls)
    except Exception:  # of another package, whatever its annotations come to
        return {}


SOURCES = ("positive", "negative", "harmful", "harmless", "extra_harmless", "categories", "pairs", "data")
"""Options that say where prompts come from."""
IN_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}
"""Types of options; what is of another kind is checked when the study is run."""


def _as_meant(name: str, value: Any, hint: Any) -> Any:
    """The value as its option has it: one item where several are taken is a tuple of it; UserError for another type."""
    among = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [one for one in among if one != NoneType]
    if any(get_origin(kind) is tuple for kind in kinds):
        if isinstance(value, str | os.PathLike | int | float):
            return (value,)
        return tuple(value) if isinstance(value, Iterable) and not isinstance(value, Mapping) else value
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words and len(kinds) == 1 and value not in words and not (value is None and NoneType in among):
        raise unknown_name(name, value, words)
    if isinstance(value, Real) and hasattr(value, "item"):
        value = value.item()  # a number of numpy's, which has no place in a record
    if (value is None and NoneType in among) or not set(kinds) <= set(IN_WORDS) or any(_is(value, k) for k in kinds):
        return value
    needed = " or ".join(dict.fromkeys(IN_WORDS[kind] for kind in kinds))
    if name in SOURCES and isinstance(value, Iterable):
        raise UserError(
            f"{name} is {kind_of(value)}, and a study takes a file, a hub data set or a built-in set by its name; "
            "find_concept takes lists"
        )
    if not isinstance(value, str | Real | list | tuple | dict | None):
        raise UserError(f"{name} is {kind_of(value)}; it must be {needed}")
    raise UserError(f"{name} is {quoted(value)} ({kind_of(value)}); it must be {needed}")


def _is(value: object, kind: type) -> bool:
    """Whether it can stand for a value of that type, such as numpy's numbers for Python's and a path for text."""
    if isinstance(value, bool):
        return kind is bool
    wider: dict[type, Any] = {int: Integral, float: Real, str: str | os.PathLike, Path: str | os.PathLike}
    return isinstance(value, wider.get(kind, kind))


@dataclass(frozen=True)
class WandbSettings(Options):
    """Where a run is mirrored in Weights & Biases; the folder on disk is complete without it.

    >>> ml.Separate(out="runs/first", wandb=ml.WandbSettings(mode="offline", tags=("pilot",))).wandb.tags
    ('pilot',)
    """

    project: str = "mechlens"
    """W&B project; WANDB_PROJECT counts where this is left alone."""
    entity: str | None = None
    """W&B user or team; None is your own default."""
    group: str | None = None
    """W&B group; None is WANDB_RUN_GROUP, else the name of the folder that the run folder lies in."""
    tags: tuple[str, ...] = ()
    """Tags of the W&B run."""
    name: str | None = None
    """Name of the W&B run; None is the command and the name of the output folder."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """None follows WANDB_MODE, then your W&B login; with neither it is offline."""
    upload_text: Annotated[bool, tyro.conf.arg(name="wandb-text", prefix_name=False)] = False
    """Upload the text of prompts and answers as well; otherwise only ids and numbers leave the machine."""


@dataclass(frozen=True, kw_only=True)
class RunChoice(Options):
    """Where a run is recorded."""

    out: RunFolder
    """Run folder; a run killed in it goes on when the same command is given again."""
    keep_cache: bool = False
    """Keep `cache/` after success: with it the same command is done at once, and it may be many times the rest."""
    wandb: WandbSettings = field(default_factory=WandbSettings)
    """Where it is mirrored in Weights & Biases."""


@dataclass(frozen=True, kw_only=True)
class Columns(Options):
    """Where prompts stand in files, and how one file holds both classes."""

    column: str | None = None
    """Column of the prompts in files and data sets; None finds instruction, prompt, question, text, messages, ..."""
    data: str | None = None
    """One file or data set that holds both classes; the classes are then given as values of its --label-column."""
    label_column: str | None = None
    """Column of --data that says of which class a row is."""
    family_column: str | None = None
    """Column, in every file, of what belongs together, such as the number of a pair or a topic: prompts of one value
    stay in one part of every split, and are drawn together where chance is sampled. None: each is on its own."""

    def __post_init__(self) -> None:
        require_both(self.data, self.label_column)


@dataclass(frozen=True, kw_only=True)
class PromptSets(Columns):
    """The harmful and the harmless prompts of a study."""

    harmful: str = "harmful"
    """Harmful prompts: a built-in set (harmful, looks-harmless, all-harmful), a file (JSON, JSONL, CSV, parquet, txt)
    or a hub data set; a plus joins sources."""
    harmless: str = "harmless"
    """Harmless prompts: a built-in set (harmless, benign, looks-harmful, all-harmless), a file or a hub data set."""
    n: PositiveInt | None = None
    """Prompts of each source, drawn by seed; None takes all."""
    system: str | None = None
    """System prompt of every prompt; None leaves the template's own default."""
    punctuation: Literal["match", "keep", "strip"] = "match"
    """match: remove final punctuation from all prompts where it differs between the classes; strip: always;
    keep: never."""


@dataclass(frozen=True, kw_only=True)
class Answering(Options):
    """How the model's own answers are written and judged."""

    max_new_tokens: PositiveInt = ANSWER_TOKENS
    """Length of the answers that are judged."""
    judge: JudgeName = "phrases"
    """Who says what is a refusal: a name of `mechlens.choices.JUDGES`."""


@dataclass(frozen=True, kw_only=True)
class ServedAnswering(Answering):
    """The same, where a server may write the answers."""

    answers_from: str | None = None
    """Server that writes the answers in place of the loaded model, which must be the same: http://localhost:8000/v1 of
    vLLM, SGLang or llama.cpp (OpenAI's completions). It is sent token ids, as they were rendered here."""
    served_model: str | None = None
    """What the server calls the model."""
    served_key: str | None = None
    """Environment variable that holds the server's key; None sends none."""
    least_agreement: PositiveShare = LEAST_AGREEMENT
    """Share of the server's first 32 answers that must be the loaded model's own, token for token."""


@dataclass(frozen=True, kw_only=True)
class Loading(Options):
    """How a model is loaded, and what is written around the prompts."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4", "fp8"] = "auto"
    """Type of the weights; auto is the checkpoint's own, and the last three quantise them (extra [quantise]). Adapters
    are added in float32 before."""
    device: str | None = "auto"
    """Such as cpu, cuda, cuda:1 or mps; auto is CUDA, then MPS, then the CPU."""
    device_map: str | None = None
    """Spreads the model over devices: auto, or a JSON file of module names and devices (0, cuda:1, cpu, disk)."""
    template: str = "tokenizer"
    """Chat template: tokenizer (its own), paper (the published strings), paper:FAMILY, or none: raw text."""
    today: str | None = None
    """Day, such as 2024-07-26, that a chat template which prints the date prints; None is this day."""
    template_arg: TemplateArguments = ()
    """Argument of the chat template, such as enable_thinking=false; may be given more than once."""


@dataclass(frozen=True, kw_only=True)
class NamedModel(Options):
    """The model's name, which `--help` shows before how it is loaded: the last base's options come first."""

    model: ModelName = "smollm2"
    """A hub id, local folder, GGUF file or a name of `mechlens.choices.MODELS`."""
    adapter: str | None = None
    """PEFT adapter, a folder or hub id, merged into the model."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice(Loading, NamedModel):
    """Which model."""


@dataclass(frozen=True, kw_only=True)
class RefusingModel(ModelChoice):
    """Which model, of a study that needs refusals."""

    model: ModelName = "smollm2-refuser"
    """A hub id, local folder, GGUF file or a name of `mechlens.choices.MODELS`; one that refuses something."""


@dataclass(frozen=True, kw_only=True)
class NamedBase(Options):
    """The base's name, which `--help` shows before how it is loaded."""

    base: BaseName = "smollm2-refuser"
    """The model that the checkpoints were trained from, as `ModelChoice.model`."""


@dataclass(frozen=True, kw_only=True)
class BaseChoice(Loading, NamedBase):
    """Which base."""


@dataclass(frozen=True, kw_only=True)
class Sampling(Options):
    """How much chance is sampled, and from which seed."""

    seed: int = SEED
    """Decides the sample, the split, every resample and every null."""
    resamples: Draws = RESAMPLES
    """Bootstrap resamples of prompt families behind every interval."""
    random_directions: Draws = RANDOM_DIRECTIONS
    """Random directions of the same norm behind every null."""


@dataclass(frozen=True, kw_only=True)
class Nulls(Sampling):
    """How much chance is sampled where a concept is read off, and from which seed."""

    permutations: Draws = PERMUTATIONS
    """Label permutations behind every null."""

    def key(self) -> dict[str, int]:
        """What decides the numbers, under the names of the first version, so that kept pieces are found again."""
        return {
            "seed": self.seed, "n_resamples": self.resamples, "n_permutations": self.permutations,
            "n_random": self.random_directions,
        }  # fmt: skip

    @property
    def detection(self) -> "DetectionPlan":
        """How a concept's mean difference is found and tested."""
        return DetectionPlan(
            seed=self.seed, resamples=self.resamples, random_directions=self.random_directions,
            permutations=self.permutations,
        )  # fmt: skip


def require_both(data: str | None, label_column: str | None) -> None:
    """UserError where one file of both classes is named without its column, or the column without the file."""
    if (data is None) != (label_column is None):
        lacks, has = ("--data", "--label-column") if data is None else ("--label-column", "--data")
        raise UserError(
            f"{has} was given without {lacks}; one file with both classes needs both, such as --data FILE "
            "--label-column tone, and the values of that column as the names of the classes"
        )


def require_ranges(settings: object) -> None:
    """UserError for the first number of a dataclass that is outside of what its field's type says, such as `Draws`."""
    kind: Any = type(settings)
    for name, hint in hints_of(kind).items():
        value = getattr(settings, name)
        if not isinstance(value, int | float):
            continue
        for bound in (bound for part in (hint, *get_args(hint)) for bound in getattr(part, "__metadata__", ())):
            if isinstance(bound, Ge) and not value >= bound.ge:  # type: ignore[operator]
                raise UserError(f"--{name.replace('_', '-')} must be at least {bound.ge}, and is {value}")
            if isinstance(bound, Gt) and not value > bound.gt:  # type: ignore[operator]
                raise UserError(f"--{name.replace('_', '-')} must be above {bound.gt}, and is {value}")
            if isinstance(bound, Lt) and not value < bound.lt:  # type: ignore[operator]
                raise UserError(f"--{name.replace('_', '-')} is a share below {bound.lt}, and was given as {value:g}")
            if isinstance(bound, Le) and not value <= bound.le:  # type: ignore[operator]
                raise UserError(f"--{name.replace('_', '-')} must be at most {bound.le}, and is {value}")


@dataclass(frozen=True, kw_only=True)
class DetectionPlan(Nulls):
    """How a concept's direction is found and tested.

    >>> ml.DetectionPlan(method="logistic", seed=1).permutations
    200
    """

    method: MethodName = "mean-difference"
    """How the direction is found: a name of `mechlens.choices.METHODS`."""

    @property
    def detection(self) -> "DetectionPlan":
        return self
