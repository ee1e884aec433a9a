"""`mechlens cliff`."""

from dataclasses import dataclass

from mechlens.settings import Answering, ModelChoice, PositiveInt, PromptSets, RunChoice, Sampling
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class CliffPlan(Sampling, Answering):
    """How a cliff is looked for.

    >>> ml.CliffPlan(heads=()).random_directions
    20
    """

    thinking_tokens: PositiveInt = 256
    """Longest thought and answer that the model writes itself; a trace whose thought doesn't end is left out."""
    heads: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Shares of all heads that are switched off: those that lower the score most, as many that raise it, and as many
    at random. Empty: heads aren't looked at."""
    pool_share: float = 0.25
    """With a pool: share of it that each ranking chooses."""
    renormalise: bool = False
    """Where heads are off, scale what the others of a layer write at each token up to the length that it had, as the
    authors' code does with a whole batch."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Given traces, which `--help` shows before the prompts that a model could think about itself."""

    traces: str | None = None
    """A file of reasoning traces: a prompt, label (harmful or harmless), and the columns thinking and answer, or
    response with a thought in its marks; family keeps prompts together. None: the model thinks and answers itself."""
    pool: str | None = None
    """Also a file of traces with safe answers, to repair a model on: it thinks about each prompt itself, and the
    largest cliffs are written with those answers, a file for `finetune --recipe repair`, beside other choices."""


@dataclass(frozen=True, kw_only=True)
class FindCliff(CliffPlan, PromptSets, ModelChoice, Traced, RunChoice):
    """Does refusal fall between a reasoning model's thought and its answer, and which heads make it fall?

    >>> ml.FindCliff(traces="traces.jsonl", model="smollm2", out="runs/cliff").heads
    (0.01, 0.03, 0.1)
    """

    n: PositiveInt | None = 96
    """Prompts of each set, drawn by seed, that the model thinks about itself; None takes all."""


STUDY = of_folder(
    "cliff",
    FindCliff,
    "mechlens cliff --traces traces.jsonl --model my/reasoner --out runs/cliff",
    "mechlens cliff --model smollm2 --adapter runs/reasoner/adapter --n 96 --out runs/own-traces",
)
