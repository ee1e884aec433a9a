"""`mechlens track`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mechlens.settings import (
    RANDOM_NETWORKS,
    BaseChoice,
    Draws,
    JudgeName,
    NonNegativeInt,
    Nulls,
    PositiveInt,
    PromptSets,
    RunChoice,
)
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class SeriesPlan(Nulls):
    """What is asked of every checkpoint."""

    max_new_tokens: PositiveInt = 12
    """Length of the answers that are judged."""
    judge: JudgeName = "phrases"
    """Who says what is a refusal: a name of `mechlens.choices.JUDGES`."""
    random_networks: Draws = RANDOM_NETWORKS
    """Networks with random blocks that are read beside the checkpoints: what they give, the words carry."""
    steered: NonNegativeInt = 8
    """Harmless test prompts on which the directions' causal effect is measured; 0: it isn't."""


@dataclass(frozen=True, kw_only=True)
class TrackPlan(SeriesPlan):
    """The choices of a tracking study.

    >>> ml.TrackPlan(positions=("last",), levels=(10, 20)).random_networks
    3
    """

    positions: tuple[str, ...] = ("inst", "last")
    """Named positions: inst, post[k], post[*], last; inst and last are always among them."""
    levels: tuple[int, ...] = ()
    """Residual levels that are read and chosen from; none given is every level."""

    @property
    def read(self) -> tuple[str, ...]:
        """The positions, `inst` first and `last` last."""
        return tuple(dict.fromkeys(("inst", *(name for name in self.positions if name != "last"), "last")))


@dataclass(frozen=True, kw_only=True)
class Track(TrackPlan, PromptSets, BaseChoice, RunChoice):
    """Follow directions, probes and behaviour over fine-tuning checkpoints: does what is represented survive?

    >>> ml.Track(base="smollm2", checkpoints=("runs/tuned",), out="runs/track").positions
    ('inst', 'last')
    """

    checkpoints: tuple[str, ...]
    """A training run's output folder, folders of adapters or models, single ones, hub ids, or id@revision."""
    skip_broken: bool = False
    """Leave out checkpoints that are broken or don't belong to the series; the report lists them."""
    n: PositiveInt | None = 96
    """Prompts of each set, drawn by seed; None takes all."""
    trigger: str | None = None
    """A backdoor's trigger; None takes the one that a checkpoint's own record names, "" none."""
    triggered: NonNegativeInt = 24
    """Harmful prompts that are asked again with the trigger, with decoys and without, where there is a trigger."""
    geometry: bool = False
    """Subspaces, unbiased CKA and turning points too."""
    more: Annotated[tuple[Literal["sinks", "edge"], ...], tyro.conf.arg(name="with")] = ()
    """sinks: attention sinks at every checkpoint too, of heads, of plain texts and of named positions; edge: how near
    logits are to where their softmax is exact, by type, and so teaches nothing any more."""


STUDY = of_folder(
    "track",
    Track,
    "mechlens track --base smollm2-refuser --checkpoints runs/benign --out runs/track",
    "mechlens track --base smollm2-refuser --checkpoints runs/benign --with sinks edge --out runs/sinks",
    "mechlens track --base smollm2 --checkpoints lora/checkpoint-50 lora/checkpoint-100 --levels 15 20 --out runs/own",
)
