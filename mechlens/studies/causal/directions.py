"""The two directions of the causal battery, where they come from, and what is done with them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import Direction, mean_difference
from mechlens.methods.directions.nulls import shuffled_like
from mechlens.methods.steering.interventions import ALL, EVERYWHERE, Ablate, Add, ResidualNorms
from mechlens.studies.shared.contrasts import MIN_IN_A_CLASS
from mechlens.studies.shared.quadrants import JudgedAnswers

HARMFUL, HARMLESS = "harmful", "harmless"
HARMFULNESS, REFUSAL = "harmfulness", "refusal"
NAMES = (HARMFULNESS, REFUSAL)

Operation = Literal["add", "subtract", "ablate"]
OPERATIONS: tuple[Operation, ...] = ("add", "subtract", "ablate")
STEERED: tuple[Operation, ...] = ("add", "subtract")
"""Those of the four cells."""


class Cell(NamedTuple):
    """What is done to prompts of which class."""

    operation: Operation
    label: str


PUSHES = (Cell("add", HARMLESS), Cell("subtract", HARMFUL))
"""Prompts are moved towards the other class: what a direction's name promises is seen here."""
CELLS = (*PUSHES, Cell("add", HARMFUL), Cell("subtract", HARMLESS))
"""In the last two a direction that is named after something else can turn replies round unseen."""
PUSH: dict[str, Operation] = {cell.label: cell.operation for cell in PUSHES}


@dataclass(frozen=True)
class ContrastSource:
    """Training activations under one contrast's labels: one direction at every level, and its shuffled controls."""

    name: str
    acts: Activations
    """At every level and position that was collected."""
    contrast: tuple[str, str]
    position: str

    def direction(self, level: int) -> Direction:
        """The mean difference of the training prompts at one level."""
        return mean_difference(self.acts, *self.contrast, level, self.position)

    def shuffled(self, level: int, n: int, seed: int) -> tuple[Direction, ...]:
        """Mean differences of shuffled labels, of their own lengths."""
        return shuffled_like(self.acts, *self.contrast, level, self.position, n, seed)


def sources(judged: JudgedAnswers, acts: Activations, train: Sequence[int]) -> dict[str, ContrastSource]:
    """Harmfulness at `inst` and refusal at `last` (Zhao et al. 2025, section 3.4), from training prompts.

    One that has too few training prompts in a class is left out: it can't be measured on this model.
    """
    kept = acts.select(train)
    verdicts = judged.verdicts[judged.judge]
    refusal = replace(kept, labels=tuple(verdicts[i] for i in train))
    candidates = (
        ContrastSource(HARMFULNESS, kept, (HARMFUL, HARMLESS), "inst"),
        ContrastSource(REFUSAL, refusal, ("refused", "accepted"), "last"),
    )
    return {
        source.name: source
        for source in candidates
        if min(source.acts.labels.count(label) for label in source.contrast) >= MIN_IN_A_CLASS
    }


def class_counts(judged: JudgedAnswers, train: Sequence[int]) -> dict[str, tuple[int, int]]:
    """How many training prompts stand on the two sides of each direction."""
    labels = [judged.prompts[i].label for i in train]
    verdicts = [judged.verdicts[judged.judge][i] for i in train]
    return {
        HARMFULNESS: (labels.count(HARMFUL), labels.count(HARMLESS)),
        REFUSAL: (verdicts.count("refused"), verdicts.count("accepted")),
    }


@dataclass(frozen=True)
class Setting:
    """Where and how strongly a direction is used."""

    layer: int
    """The direction of this level is used; what is added is added at the input of this block."""
    strength: float
    """Share of the median residual norm there."""

    def times(self, factor: float) -> "Setting":
        """The same place with another strength."""
        return Setting(self.layer, self.strength * factor)


def intervene(direction: Direction, operation: Operation, setting: Setting, norms: ResidualNorms) -> Add | Ablate:
    """The operation on every token of the prompt; ablation is everywhere and in the answer too, as published.

    Adding only while the prompt is read is Zhao et al. 2025, ablating at every site Arditi et al. 2024.
    """
    if operation == "ablate":
        return Ablate(direction, layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)
    strength = setting.strength if operation == "add" else -setting.strength
    return Add(
        direction, strength=strength, unit="share", layers=(setting.layer,), positions=ALL, phase="prompt", norms=norms
    )


def published(direction: Direction, layer: int, coefficient: float) -> Add:
    """The raw direction times a coefficient at every token of the prompt, as Zhao et al. 2025 add it (Fig. 4)."""
    return Add(direction, strength=coefficient, unit="raw", layers=(layer,), positions=ALL, phase="prompt")


def pushes(direction: Direction, setting: Setting, norms: ResidualNorms, labels: Sequence[str]) -> list[Add | Ablate]:
    """For each prompt the operation that moves it towards the other class."""
    made = {label: intervene(direction, operation, setting, norms) for label, operation in PUSH.items()}
    return [made[label] for label in labels]
