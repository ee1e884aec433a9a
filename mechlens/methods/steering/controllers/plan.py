"""How a steering controller is fitted."""

from dataclasses import dataclass

from mechlens.settings import NonNegativeFloat, Options, PositiveInt


@dataclass(frozen=True, kw_only=True)
class ControllerPlan(Options):
    """The choices of a controller's fit.

    >>> ml.ControllerPlan(reads=(4, 8), layers=(12, 16)).epochs
    4
    """

    reads: tuple[int, ...] = ()
    """Levels that are read at the prompt's last token; none: three in the lowest third of the model (as published: all
    of its last third)."""
    layers: tuple[int, ...] = ()
    """Layers that are steered; none: all from the last level that is read on (as published: all)."""
    published: bool = False
    """As Hegazy et al. 2025 (version 3) fit and use it: only the gate is taught, the direction goes from tokens of
    accepting phrases to those of refusals, and answer tokens alone are steered."""
    hidden: PositiveInt = 64
    """Width of the hidden layer."""
    epochs: PositiveInt = 4
    """Passes over the training prompts."""
    batch_size: PositiveInt = 8
    """Prompts in one step."""
    learning_rate: NonNegativeFloat = 1e-3
    """Of AdamW."""
    trained_strength: NonNegativeFloat = 0.1
    """Share of the residual norm that a layer adds while the weights are taught, where gate and weight are 1."""
    seed: int = 0
    """Decides the first weights and the order of the prompts."""


PUBLISHED = ControllerPlan(published=True, hidden=1024, batch_size=4, learning_rate=5e-5)
"""As Hegazy et al. 2025 have it."""
