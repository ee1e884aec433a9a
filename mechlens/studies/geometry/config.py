"""`mechlens geometry`."""

from dataclasses import dataclass, replace
from typing import Literal

from mechlens.errors import UserError
from mechlens.settings import (
    SEED,
    Answering,
    BaseChoice,
    Draws,
    ModelChoice,
    NonNegativeInt,
    Options,
    PositiveInt,
    PromptSets,
    RefusingModel,
    RunChoice,
)
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class GeometryPlan(Answering, Options):
    """What is measured of representations.

    >>> ml.GeometryPlan(positions=("last",), levels=(10, 20)).read
    ('inst', 'last')
    """

    positions: tuple[str, ...] = ("inst", "last")
    """Named positions: inst, post[k], post[*], last; inst and last are always among them."""
    levels: tuple[int, ...] = ()
    """Levels (blocks, at another site than resid) that are read and chosen from; none given is every one."""
    site: Literal["resid", "attn_out", "mlp_out"] = "resid"
    """Where vectors are read: the residual stream, or what attention or MLPs add to it."""
    dimensions: PositiveInt = 8
    """Of what is read without the concept's direction; this decides the verdict."""
    ranks: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16)
    """Dimensions for which AUROC stands beside random subspaces, in the first model."""
    random_subspaces: Draws = 20
    """Random subspaces of each number of dimensions."""
    ablated: NonNegativeInt = 0
    """Prompts of each class on which the first model is run without each subspace of these ranks, beside as many
    random ones; 0 is none. Twelve take a small model some ten minutes of one core."""
    shuffles: Draws = 19
    """Times that labels or prompts are dealt out anew behind every null."""
    matched: PositiveInt = 3
    """Layers, evenly apart, whose neurons and heads are matched with those of the first model."""
    edited: PositiveInt = 24
    """Matrices that the last checkpoint changed most, whose leading components are looked at."""
    seed: int = SEED
    """Decides the sample, the folds and every null."""

    @property
    def read(self) -> tuple[str, ...]:
        """The positions, `inst` first and `last` last."""
        return tuple(dict.fromkeys(("inst", *(name for name in self.positions if name != "last"), "last")))


@dataclass(frozen=True, kw_only=True)
class MeasureGeometry(GeometryPlan, PromptSets, RefusingModel, RunChoice):
    """Is harmfulness one direction or a subspace, and do checkpoints or another model hold it in the same way?

    >>> ml.MeasureGeometry(model="smollm2", other="smollm2-refuser", out="runs/shape").dimensions
    8
    """

    checkpoints: tuple[str, ...] = ()
    """Checkpoints of the model that are compared with it: a training run's output folder, adapters, models, hub ids."""
    other: str | None = None
    """Another model that is compared with it, as `ModelChoice.model`; loaded as the first is."""
    n: PositiveInt | None = 96
    """Prompts of each set, drawn by seed; None takes all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoints and (self.other or self.adapter):
            given = "other" if self.other else "adapter"
            raise UserError(f"checkpoints are compared with their base, and {given} was given beside them; give one")
        if self.ablated and self.site != "resid":
            raise UserError(f"subspaces are taken out of the residual stream, and site is {self.site}; give resid")

    @property
    def as_base(self) -> BaseChoice:
        """The model as the base of its checkpoints."""
        return BaseChoice(
            base=self.model, revision=self.revision, dtype=self.dtype, device=self.device, device_map=self.device_map,
            template=self.template, today=self.today, template_arg=self.template_arg,
        )  # fmt: skip

    @property
    def models(self) -> tuple[ModelChoice, ...]:
        """The model and, where there is one, the other."""
        own = ModelChoice(
            model=self.model, adapter=self.adapter, revision=self.revision, dtype=self.dtype, device=self.device,
            device_map=self.device_map, template=self.template, today=self.today, template_arg=self.template_arg,
        )  # fmt: skip
        other = () if self.other is None else (replace(own, model=self.other, adapter=None, revision=None),)
        return (own, *other)


STUDY = of_folder(
    "geometry",
    MeasureGeometry,
    "mechlens geometry --model smollm2-refuser --out runs/geometry",
    "mechlens geometry --model smollm2-refuser --ablated 12 --random-subspaces 5 --out runs/geometry-ablated",
    "mechlens geometry --model smollm2-refuser --checkpoints runs/benign --out runs/geometry-over-training",
    "mechlens geometry --model smollm2 --other smollm2-refuser --out runs/geometry-of-two",
)
