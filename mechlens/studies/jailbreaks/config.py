"""`mechlens jailbreaks`."""

from dataclasses import dataclass
from typing import Literal

from mechlens.settings import Answering, Columns, NonNegativeInt, Nulls, PositiveInt, RefusingModel, RunChoice
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class JailbreakPlan(Nulls, Answering):
    """The choices of a study of jailbreaks."""

    restored: NonNegativeInt = 24
    """At most so many successful attacks of each family get the plain request's component put back."""


@dataclass(frozen=True, kw_only=True)
class Jailbreaks(JailbreakPlan, Columns, RefusingModel, RunChoice):
    """Do jailbreaks hide harmfulness from the model, or only suppress its refusal? Attacks paired with their goals.

    >>> ml.Jailbreaks(model="smollm2", sources="published", out="runs/jailbreaks").restored
    24
    """

    sources: str = "published"
    """published (files below --folder), or FILE.json, a list of objects, one for each file of attacks:
    [{"name": "mine", "data": "attacks.csv", "goal_column": "goal", "kind": "suffix", "label": "harmful"}]
    where each row of attacks.csv has an attack (column prompt) and the plain request behind it (column goal)."""
    folder: str | None = None
    """Folder that holds the files of the sources; None is where you are."""
    n: PositiveInt | None = None
    """At most so many attacks of each family, and prompts of each other set, drawn by seed."""
    harmful: str = "harmful"
    """Harmful prompts without an attack, for centroids and directions: a built-in set, a file or a hub data set."""
    harmless: str = "harmless"
    """Harmless prompts for the same."""
    extra_harmless: str | None = "benign"
    """Further harmless prompts for the same; None leaves them out."""
    categories: str | None = "harmful"
    """Harmful prompts with a category (such as CatQA), whose directions are compared; None leaves that out."""
    system: str | None = None
    """System prompt of every prompt; None leaves the template's own default."""
    punctuation: Literal["match", "keep", "strip"] = "keep"
    """match: remove final punctuation from the reference prompts where it differs between the classes; strip: always;
    keep: never."""


STUDY = of_folder(
    "jailbreaks",
    Jailbreaks,
    "mechlens jailbreaks --model smollm2-refuser --sources mine.json --n 32 --out runs/jailbreaks",
)
