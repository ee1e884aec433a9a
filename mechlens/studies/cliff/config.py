"""`mechlens cliff`."""

from dataclasses import dataclass

from mechlens.settings import JudgeName, ModelChoice, RunChoice, Sampling
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The traces, which `--help` shows before the model."""

    traces: str
    """A file of reasoning traces: a prompt, the columns thinking and answer, and label, which is harmful or harmless;
    family, where there is one, keeps prompts together."""
    judge: JudgeName = "phrases"
    """Who says what is a refusal: a name of `mechlens.choices.JUDGES`."""


@dataclass(frozen=True, kw_only=True)
class CliffPlan(Sampling):
    """How a cliff is looked for.

    >>> ml.CliffPlan(heads=()).random_directions
    20
    """

    heads: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Shares of all heads that are switched off: those that lower the score most, as many that raise it, and as many
    at random. Empty: heads aren't looked at."""


@dataclass(frozen=True, kw_only=True)
class FindCliff(CliffPlan, ModelChoice, Traced, RunChoice):
    """Does refusal fall between a reasoning model's thought and its answer, and which heads make it fall?

    >>> ml.FindCliff(traces="traces.jsonl", model="smollm2", out="runs/cliff").heads
    (0.01, 0.03, 0.1)
    """


STUDY = of_folder("cliff", FindCliff, "mechlens cliff --traces traces.jsonl --out runs/cliff")
