"""`mechlens sinks`."""

from dataclasses import dataclass

from mechlens.settings import (
    PERMUTATIONS,
    RESAMPLES,
    SEED,
    Answering,
    Draws,
    ModelChoice,
    Options,
    PositiveInt,
    PromptSets,
    RunChoice,
)
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class SinkPlan(Answering, Options):
    """How sinks are looked for.

    >>> ml.SinkPlan(domains=("prose", "code")).heads
    4
    """

    domains: tuple[str, ...] = ("prose", "code", "chat")
    """Kinds of text that are set against each other: prose and code (built in), chat (built-in requests in the model's
    chat template), or files of texts."""
    texts: PositiveInt = 16
    """Texts of each kind; of a file so many are drawn by seed, all where it has fewer."""
    tokens: PositiveInt = 128
    """What a text has beyond these is cut off."""
    heads: PositiveInt = 4
    """Heads that differ most between two kinds, each switched off and put on the sink; as many with the most sink mass
    are switched off together."""
    random_heads: PositiveInt = 8
    """Other heads, drawn by seed, to each of which the same is done."""
    random_sets: PositiveInt = 3
    """Draws of as many other heads, and of as many other dimensions, beside those that are switched off together."""
    shuffles: Draws = PERMUTATIONS
    """Times that the kinds are dealt out anew."""
    seed: int = SEED
    """Decides the sample, every resample and every null."""
    resamples: Draws = RESAMPLES
    """Bootstrap resamples of texts and prompt families behind every interval."""


@dataclass(frozen=True, kw_only=True)
class FindSinks(SinkPlan, PromptSets, ModelChoice, RunChoice):
    """Which tokens are attention sinks, do heads sleep on one kind of text, and does refusal pass through sinks?

    >>> ml.FindSinks(model="smollm2", out="runs/sinks").domains
    ('prose', 'code', 'chat')
    """

    n: PositiveInt | None = 48
    """Prompts of each set, drawn by seed, that are answered; None takes all. With --template none requests have no
    named positions, and none are asked."""


STUDY = of_folder(
    "sinks",
    FindSinks,
    "mechlens sinks --model smollm2-refuser --out runs/sinks",
    "mechlens sinks --model gemma3-270m --template none --domains prose code --out runs/base-model",
)
