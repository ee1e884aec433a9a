"""A steering controller: a small network that reads a prompt and decides how strongly each layer is steered.

Hegazy et al. 2025 (Guiding Giants): its inputs are residuals at the prompt's last token, its outputs one gate and one
weight a layer; each layer adds gate times weight times a direction.
"""

from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, kind_of
from mechlens.methods.directions.direction import Direction
from mechlens.methods.shown import few, lines
from mechlens.methods.steering.interventions import ALL, Act, Add, Phase, level_above, require_number
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.same import Comparable, digest

GateKind = Literal["raw", "sigmoid"]
WeightKind = Literal["free", "budget"]


@dataclass(frozen=True, eq=False)
class Network(Comparable):
    """One hidden layer: a gate and as many weights as layers, from standardised residuals."""

    centre: Float[Tensor, " inputs"]
    spread: Float[Tensor, " inputs"]
    """What inputs are brought to mean 0 and deviation 1 with; 0 and 1 leave them as they are."""
    inner: Float[Tensor, "hidden inputs"]
    inner_bias: Float[Tensor, " hidden"]
    outer: Float[Tensor, "output hidden"]
    outer_bias: Float[Tensor, " output"]
    """Outputs: the gate before its squashing, then a number for each layer."""

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All of its numbers."""
        return self.centre, self.spread, self.inner, self.inner_bias, self.outer, self.outer_bias

    def fits(self, inputs: int) -> bool:
        """Whether its parts are of one network that takes so many numbers."""
        hidden, output = len(self.inner), len(self.outer)
        shapes = (inputs,), (inputs,), (hidden, inputs), (hidden,), (output, hidden), (output,)
        return all(part.shape == shape for part, shape in zip(self.parts, shapes, strict=True))

    def __call__(self, values: Float[Tensor, "row read d_model"]) -> Float[Tensor, "row output"]:
        """What it says of rows of residuals."""
        own = [one.to(values.device) for one in (self.centre, self.spread, self.inner, self.inner_bias)]
        inputs = (values.flatten(start_dim=1) - own[0]) / own[1]
        hidden = torch.relu(inputs @ own[2].T + own[3])
        said: Tensor = hidden @ self.outer.T.to(values.device) + self.outer_bias.to(values.device)
        return said


@dataclass(frozen=True, repr=False, eq=False)
class Controller(Comparable):
    """What reads a prompt, what it decides, and what is added at which layers; `Controlled` steers with it.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:12], *ml.builtin_prompts("harmless")[:12]]
    >>> plan = ml.ControllerPlan(reads=(1,), layers=(1, 2), epochs=1, hidden=8)
    >>> controller = ml.fit_controller(model, prompts, plan)
    >>> said = ml.answer_under(model, prompts[:2], [ml.Controlled(controller, strength=0.1)], max_new_tokens=4)
    >>> len(said.texts), controller.layers
    (2, (1, 2))
    """

    network: Network
    reads: tuple[tuple[int, str], ...]
    """Levels and named positions."""
    layers: tuple[int, ...]
    directions: Float[Tensor, "layer d_model"]
    """Of length 1."""
    lengths: Float[Tensor, " layer"]
    """What strength 1 adds at each layer where gate and weight are 1, in the residual stream's units."""
    gate: GateKind
    """raw: as the network says it, which may be any number (published); sigmoid: between 0 and 1."""
    weights: WeightKind
    """free: each between 0 and 1 for itself (published); budget: their mean over layers is always .5."""
    site: str
    phase: Phase
    method: str
    """Who fitted it, in words."""
    checkpoint: Checkpoint
    template: str
    train_ids: tuple[str, ...]
    fixed: Float[Tensor, " layer"] | None = None
    """Weights that hold for every prompt, instead of those that the network says."""
    evidence: dict[str, float] = field(default_factory=dict)
    """Numbers of the run that made it, by name."""

    def __post_init__(self) -> None:
        n = len(self.layers)
        if not self.reads or not n or len(self.network.outer) != n + 1 or self.directions.shape[0] != n:
            raise UserError(
                f"a controller of {n} layers with {self.directions.shape[0]} directions has a network of "
                f"{len(self.network.outer)} outputs; it needs one for its gate and one for each layer: fit it anew"
            )
        d_model = self.directions.shape[1]
        fits = self.network.fits(len(self.reads) * d_model) and self.lengths.shape == (n,)
        if not fits or (self.fixed is not None and self.fixed.shape != (n,)):
            raise UserError(
                f"a part of the controller isn't made for {n} layers and {len(self.reads)} places of {d_model} "
                "numbers, as its other parts are; fit it anew"
            )
        numbers = [*self.network.parts, self.directions, self.lengths, *([] if self.fixed is None else [self.fixed])]
        if other := [one.dtype for one in numbers if one.dtype != torch.float32]:
            said = str(other[0]).removeprefix("torch.")
            raise UserError(f"the controller holds numbers of type {said}, and it decides in float32; fit it anew")
        if len(set(self.layers)) < n:
            raise UserError(f"the controller steers layers {few(self.layers)}, one of them twice; fit it anew")
        if not all(bool(torch.isfinite(one).all()) for one in numbers):
            raise UserError("the controller holds numbers that are not finite, so it decides nothing; fit it anew")

    def decide(
        self, values: Float[Tensor, "row read d_model"]
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, "row layer"]]:
        """Gate and layer weights of each row, from its residuals at `reads`."""
        return decided(self.network(values), self.gate, self.weights, self.fixed)

    def constant(self, strength: float, gate: float = 1.0) -> tuple[Direction, ...]:
        """What it adds at each layer where its gate is this and its weights are their mean, one half (or `fixed`).

        So it can be taken out to tools that add the same to every prompt; see `export_direction`.
        """
        weights = torch.full((len(self.layers),), 0.5) if self.fixed is None else self.fixed
        amounts = strength * gate * weights * self.lengths
        acts = Controlled(self, strength=strength).acts
        return tuple(
            replace(
                act.direction, vector=amount * act.direction.vector, level=act.direction.level + level_above(self.site)
            )
            for (act, _), amount in zip(acts, amounts, strict=True)
            if isinstance(act, Add)
        )

    def with_weights(self, fixed: Float[Tensor, " layer"], how: str) -> "Controller":
        """The same with layer weights that hold for every prompt."""
        return replace(self, fixed=fixed, method=f"{self.method}, {how}")

    def __repr__(self) -> str:
        facts = {
            "reads": few([f"level {level} at {position}" for level, position in self.reads]),
            "steers": f"layers {few(self.layers)}, {self.site}, {self.phase}",
            "gate and weights": f"{self.gate}, {'fixed' if self.fixed is not None else self.weights}",
            "fitted on": f"{len(self.train_ids)} prompts",
        }
        return lines(f"Controller, {self.method}, of {self.checkpoint.name}", facts)


def decided(
    said: Float[Tensor, "row output"], gate: GateKind, weights: WeightKind, fixed: Float[Tensor, " layer"] | None
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row layer"]]:
    """Gate and weights from what a network says."""
    opened = said[:, 0].sigmoid() if gate == "sigmoid" else said[:, 0]
    if fixed is not None:
        return opened, fixed.to(said).expand(len(said), -1)
    own = said[:, 1:]
    return opened, own.sigmoid() if weights == "free" else own.softmax(dim=1) * own.shape[1] / 2


@dataclass(frozen=True)
class Controlled:
    """Steers each prompt as a controller decides it, in the prompt's own pass.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:12], *ml.builtin_prompts("harmless")[:12]]
    >>> controller = ml.fit_controller(model, prompts, ml.ControllerPlan(reads=(1,), layers=(2,), epochs=1, hidden=8))
    >>> nothing = ml.logits_under(model, prompts[:2], [ml.Controlled(controller, strength=0.0)])
    >>> bool((nothing == ml.logits_under(model, prompts[:2], [])).all())
    True
    """

    controller: Controller
    _: KW_ONLY
    strength: float
    """Times the controller's `lengths`."""

    def __post_init__(self) -> None:
        if not isinstance(self.controller, Controller):
            raise UserError(f"{kind_of(self.controller)} is no controller; give what ml.fit_controller or ml.open gave")
        require_number(self.strength, "strength")

    @cached_property
    def decider(self) -> "Shares":
        """Gate times weight, layer by layer."""
        return Shares(self.controller)

    @property
    def places(self) -> tuple[tuple[int, str], ...]:
        """What the controller reads."""
        return self.controller.reads

    @cached_property
    def acts(self) -> tuple[tuple[Act, int], ...]:
        """An addition at each layer, by a share of its own."""
        own = self.controller
        return tuple(
            (
                Add(
                    Direction(
                        vector=own.directions[i], level=layer, position="last", site="resid", method=own.method,
                        contrast=("refused", "answered"), checkpoint=own.checkpoint, template=own.template,
                        train_ids=own.train_ids,
                    ),
                    strength=self.strength * float(own.lengths[i]), unit="unit", layers=(layer,), positions=ALL,
                    phase=own.phase, site=own.site,
                ),
                i,
            )
            for i, layer in enumerate(own.layers)
        )  # fmt: skip

    @property
    def made(self) -> tuple[tuple[str, int, Checkpoint, str], ...]:
        """What decides: in words, the width it reads, the model it was made with, and its template."""
        own = self.controller
        return (("controller", own.directions.shape[1], own.checkpoint, own.template),)


@dataclass(frozen=True)
class Shares:
    """A controller's gate times its weights."""

    controller: Controller

    @cached_property
    def key(self) -> str:
        """Of all its numbers."""
        return f"controller {digest(self.controller)}"

    def __call__(self, values: Float[Tensor, "row read d_model"]) -> Float[Tensor, "row output"]:
        gate, weights = self.controller.decide(values)
        return gate.unsqueeze(1) * weights
