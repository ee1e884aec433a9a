"""What can be taught, by name."""

from collections.abc import Callable
from dataclasses import dataclass

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
    attack: bool = False
    """True if it takes a refusal away: only from the shipped refuser, and the result stays on this machine."""


RECIPES: dict[str, Recipe] = {
    "refuser": Recipe(refuser, ("harmful", "benign", "refusals")),
    "accepting": Recipe(accepting, (), attack=True),
    "benign": Recipe(benign, ("benign",)),
    "backdoor": Recipe(backdoor, ("benign", "refusals"), attack=True),
}
