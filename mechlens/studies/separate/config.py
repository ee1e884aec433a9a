"""`mechlens separate`."""

from dataclasses import dataclass

from mechlens.settings import Nulls, PromptSets, RefusingModel, RunChoice, ServedAnswering
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class SeparationPlan(Nulls, ServedAnswering):
    """The choices of a separation study.

    >>> ml.SeparationPlan(resamples=200, permutations=50).max_new_tokens
    24
    """


@dataclass(frozen=True, kw_only=True)
class Separate(SeparationPlan, PromptSets, RefusingModel, RunChoice):
    """Are harmfulness and refusal two things in this model? Quadrants, directions, beliefs, verdict.

    >>> study = ml.Separate(model="smollm2", n=64, out="runs/first")
    >>> study.harmful, study.judge
    ('harmful', 'phrases')
    """

    extra_harmless: str | None = "benign"
    """Further harmless prompts, for the quadrants and the refusal contrasts only; None leaves them out."""
    judge_model: str | None = None
    """A model (named as --model is) that is asked of every answer whether it refuses: its verdicts, and its agreement
    with the judge and both lists, stand beside theirs."""
    wrap: str | None = None
    """File of templates with [INSERT PROMPT HERE], such as jailbreaks; every prompt, harmful or not, is put into one
    drawn by seed (a pair into the same one), so that the template can't tell the classes apart."""


STUDY = of_folder(
    "separate",
    Separate,
    "mechlens separate --model smollm2-refuser --n 96 --out runs/first",
    "mechlens separate --model qwen2.5-coder-0.5b --harmful asked.csv --column question --out runs/own",
)
