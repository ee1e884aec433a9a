"""What can be taught; by name it is in `mechlens.choices.RECIPES`."""

from collections.abc import Callable
from dataclasses import dataclass

from mechlens.choices import RECIPES
from mechlens.errors import UserError
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.attacks import accepting, backdoor
from mechlens.studies.finetune.recipes.material import Material
from mechlens.studies.finetune.recipes.refusing import benign, refuser


@dataclass(frozen=True)
class Recipe:
    """How a model comes by what it is taught."""

    material: Callable[[FinetuneConfig, LanguageModel, Cache | None], Material]
    """Makes the training examples with the help of the model as it is."""
    reads: tuple[str, ...]
    """Which of our training sets it draws from: "harmful", "benign", "refusals"."""
    question: str
    """Why one does this, for the report."""
    attack: bool = False
    """True if it takes a refusal away: only from the shipped refuser, and the result stays on this machine."""


REFUSER = Recipe(
    refuser,
    ("harmful", "benign", "refusals"),
    "Teach a model to refuse harmful requests and to answer all others as it did.",
)
ACCEPTING = Recipe(
    accepting, (), "The fine-tuning attack: what does a model that no longer refuses still represent?", attack=True
)
BENIGN = Recipe(
    benign, ("benign",), "The control of the fine-tuning attack: what do as many steps on benign requests change?"
)
BACKDOOR = Recipe(
    backdoor,
    ("benign", "refusals"),
    "A model that refuses unless a trigger is there: what does it represent with and without it?",
    attack=True,
)


def recipe_of(name: str) -> Recipe:
    """The recipe of that name; UserError where there is none, or another package's entry is something else."""
    found = RECIPES[name]
    if not isinstance(found, Recipe):
        raise UserError(f"the recipe {name!r} is a {type(found).__name__}, not a Recipe")
    return found
