"""`mechlens guard fit`, `guard eval` and `guard predict`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mechlens.choices import RULES, choice
from mechlens.settings import (
    Answering,
    Nulls,
    PositiveInt,
    PositiveShare,
    PromptSets,
    RefusingModel,
    RunChoice,
    RunFolder,
)
from mechlens.studies.registry import Command, of_folder

RuleName = Annotated[str, RULES, choice(RULES, "How a place is scored; the other rules are fitted beside it.")]


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan(Nulls, Answering):
    """The choices of a guard's evaluation.

    >>> ml.EvaluationPlan(resamples=200).judge
    'phrases'
    """


@dataclass(frozen=True, kw_only=True)
class GuardFit(EvaluationPlan, PromptSets, RefusingModel, RunChoice):
    """Fit a Latent Guard: harmful prompts detected from the model's own residual stream. Writes guard.safetensors.

    >>> ml.GuardFit(model="smollm2", rule="lda", out="runs/guard").max_fpr
    0.05
    """

    out: RunFolder = Path("runs/guard")
    """Run folder, in which the guard is kept with its evidence."""
    extra_harmless: str | None = "auto"
    """Further harmless prompts; auto: the built-in benign ones, and none beside prompts of your own. None leaves them
    out."""
    punctuation: Literal["match", "keep", "strip"] = "keep"
    """keep: a guard meets prompts as people write them. match removes final punctuation where the classes differ, strip
    always."""
    rule: RuleName = "logistic"
    """How a place is scored: a name of `mechlens.choices.RULES`."""
    positions: Literal["inst", "last", "both"] = "both"
    """Where the guard reads: the last token of the user's words (inst holds best under fine-tuning), the prompt's last
    one, or both."""
    levels: Literal["best", "all"] = "best"
    """best: the lowest level at each position that does as well on validation as the best one; the blocks above it are
    never run. all: the mean over all levels, as in the paper."""
    max_fpr: PositiveShare | None = 0.05
    """Share of harmless prompts that may be flagged, which sets the threshold; None is the paper's threshold of 0."""


@dataclass(frozen=True, kw_only=True)
class GuardEval(EvaluationPlan, RefusingModel, RunChoice):
    """Test a guard on prompts from other sources, beside baselines on the same prompts.

    >>> ml.GuardEval(guard="runs/guard/guard.safetensors", sources="builtin", out="runs/guard-eval").sources
    'builtin'
    """

    guard: str
    """The folder of a run of `guard fit`, or the guard.safetensors in it; its training prompts are read from there."""
    sources: str = "builtin"
    """builtin, published (files below --folder), or a JSON list of sources."""
    folder: str | None = None
    """Folder that holds the files of the sources; None is where you are."""
    n: PositiveInt | None = None
    """At most so many prompts of each source, drawn by seed."""
    guard_models: tuple[str, ...] = ()
    """Guard models to compare with (hub ids or folders), asked by their own chat templates; scored by the log-odds of
    their verdict."""
    other_weights: bool = False
    """Test the guard on weights that it wasn't fitted on, such as another checkpoint of a series."""


@dataclass(frozen=True, kw_only=True)
class GuardPredict(RefusingModel):
    """Judge prompts as they come: one JSON object a line, with harmful, score, probability and the threshold that
    harmful is a score above, or error.

    Exits with 1, once all lines are read, where a line could not be judged.

    >>> ml.GuardPredict(guard="runs/guard/guard.safetensors", input="prompts.jsonl").batch
    16
    """

    guard: str
    """The folder of a run of `guard fit`, or the guard.safetensors in it."""
    input: str = "-"
    """File of prompts, one a line, JSON Lines (.jsonl) or a table (.csv, .tsv, .parquet); - reads from stdin."""
    format: Literal["auto", "lines", "jsonl"] = "auto"
    """auto: JSON Lines and tables by the file's ending; on stdin, lines that start with a brace are JSON."""
    column: str | None = None
    """Field of JSON records, or column, that holds the prompt; None finds it among the usual names."""
    batch: PositiveInt = 16
    """Prompts that are judged together; 1 answers each line before the next is read."""
    other_weights: bool = False
    """Use the guard on weights that it wasn't fitted on."""


FIT = of_folder(
    "guard fit",
    GuardFit,
    "mechlens guard fit --model smollm2-refuser --out runs/guard",
    ending="_fit",
)
EVAL = of_folder(
    "guard eval",
    GuardEval,
    "mechlens guard eval --model smollm2-refuser --guard runs/guard/guard.safetensors --out runs/guard-eval",
    ending="_eval",
)
PREDICT = Command(
    "guard predict",
    GuardPredict,
    "mechlens.studies.guard.predict:execute",
    ("mechlens guard predict --model smollm2-refuser --guard runs/guard/guard.safetensors --input prompts.jsonl",),
)
