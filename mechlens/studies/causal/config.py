"""`mechlens causal`."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Le

from mechlens.settings import (
    MAX_DRAWS,
    RANDOM_DIRECTIONS,
    Answering,
    Draws,
    PromptSets,
    RefusingModel,
    RunChoice,
    Sampling,
)
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class CausalPlan(Sampling, Answering):
    """The choices of a causal battery.

    >>> ml.CausalPlan(layers=(1, 2), n_test=16).strengths
    (0.25, 0.5, 1.0)
    """

    layers: tuple[int, ...] = ()
    """Layers where a direction may be put; none given is every third, and then the neighbours of the best."""
    full: bool = False
    """Every layer at the middle strength instead, about three times the work there."""
    grid: Literal["coarse", "all"] = "coarse"
    """coarse: layer and strength are chosen from coarse to fine; all: every layer that can be chosen is tried at every
    strength."""
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Strengths to choose from, as shares of the median residual norm; layers are compared at the middle one."""
    calibrate_kl: float | None = None
    """In place of strengths: at each layer that at which adding the direction has a KL of so many nats from the
    unsteered answers to harmless prompts (95th percentile over tokens), so that all is compared at equal damage."""
    coefficient: float = 1.0
    """What the raw directions are multiplied by in the figure of refusals over all layers; 1 as published."""
    every_position: bool = False
    """Directions from every position of the template too, each at the chosen layer and strength, in a table."""
    n_train: Annotated[int, Ge(10), Le(MAX_DRAWS)] = 64
    """Training prompts of each class, of which the directions are made."""
    n_validation: Annotated[int, Ge(4), Le(MAX_DRAWS)] = 8
    """Prompts of each class on which layer and strength are chosen."""
    n_test: Annotated[int, Ge(10), Le(MAX_DRAWS)] = 32
    """Prompts of each class on which the chosen layer and strength are reported."""
    n_null: Draws = 6
    """Test prompts of each class on which null directions are tried; what so few add to their spread is taken off."""
    shuffled_directions: Draws = RANDOM_DIRECTIONS
    """Null directions from shuffled labels behind what each direction is claimed to change."""


@dataclass(frozen=True, kw_only=True)
class Causal(CausalPlan, PromptSets, RefusingModel, RunChoice):
    """Does the harmfulness direction change the model's belief, and the refusal direction only whether it refuses?

    >>> study = ml.Causal(model="smollm2", out="runs/causal", n_test=16)
    >>> study.n_train, study.strengths
    (64, (0.25, 0.5, 1.0))
    """


ANSWERING, COLLECTING, UNSTEERED, BY_LAYER = "answering", "collecting", "unsteered replies", "refusal by layer"
CALIBRATING = "calibrating"
PASSES = 8
"""That a calibration takes, about."""
REPLIES, CHOOSING, HELD_OUT, IN_WORDS = "replies by layer", "choosing", "test prompts", "in words"
REPLY_TOKENS = 8
"""Of a reply to a question: enough for the word, or for the phrase of a refusal."""


class Grid(NamedTuple):
    """Layers where a direction may be put."""

    tried: int
    """To choose from, at first."""
    all: int
    """In the figure of refusals."""


def costs(plan: CausalPlan, grid: Grid, request: float, question: float, *, believes: bool) -> dict[str, float]:
    """What each phase costs, about, in tokens through all blocks, for requests and questions of so many tokens.

    Of what is done to a prompt half its depth is counted: settings are half way up on average, and below it all run as
    one. Two directions, each added and subtracted; two questions a request, put in two scopes.
    """
    validation, test, few = 2 * plan.n_validation, 2 * plan.n_test, 2 * plan.n_null
    asked = 2 * question / 2 if believes else 0.0
    read = request / 2 + 2 * asked
    nulls = plan.random_directions * read + plan.shuffled_directions * (asked or request / 2)
    strengths = len(plan.strengths) if plan.calibrate_kl is None else 1
    chosen = 2 * (grid.all * strengths if plan.grid == "all" else grid.tried + 2 + strengths)
    calibrated = 0 if plan.calibrate_kl is None else 2 * grid.tried * PASSES * plan.n_validation
    everyone = 2 * plan.n_train + validation + test
    found = {
        ANSWERING: everyone * (request + plan.max_new_tokens),
        COLLECTING: everyone * request,
        UNSTEERED: 2 * test * (2 * question + REPLY_TOKENS),
        BY_LAYER: 2 * grid.all * plan.n_test * request / 2,
        CALIBRATING: calibrated * (request + plan.max_new_tokens),
        REPLIES: 4 * grid.tried * validation * asked,
        CHOOSING: chosen * validation * (request / 2 + asked) / 2,
        HELD_OUT: 2 * (5 * test * read + few * nulls),
        IN_WORDS: 2 * test * (3 * (request + plan.max_new_tokens) + 2 * (asked + 2 * REPLY_TOKENS * believes))
        + 2 * 7 * 12 * (request + plan.max_new_tokens),  # losses, with the logits of every token
    }
    return {name: cost for name, cost in found.items() if cost}


STUDY = of_folder(
    "causal",
    Causal,
    "mechlens causal --model smollm2-refuser --out runs/causal",
    "mechlens causal --model smollm2-refuser --layers 12 15 18 --n-test 16 --out runs/quick",
    "mechlens causal --model smollm2-refuser --calibrate-kl 1 --out runs/equal-damage",
)
