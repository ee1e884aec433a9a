"""Interventions as values: add a direction, remove it, set it, or replace a residual; where, when and how strongly."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, quoted
from mechlens.methods.activations.activations import Activations, stored_name
from mechlens.methods.directions.direction import Direction, require_is_direction
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine.intervene.gates import Decider
from mechlens.models.sites import CHANGEABLE, require_site

Phase = Literal["prompt", "generation", "both"]
Unit = Literal["raw", "unit", "share"]
Everything = Literal["all"]
ALL: Everything = "all"
"""Every layer, or every token."""
EVERYWHERE = ("resid_pre", "attn_out", "mlp_out")
"""The residual stream and all that is added to it: with all layers and positions, what Arditi et al. (2024) ablate."""


@dataclass(frozen=True)
class ResidualNorms:
    """Median length of the residual stream over training prompts: what strengths in shares are shares of."""

    medians: Float[Tensor, "level position"] = field(repr=False)
    pooled: Float[Tensor, " level"] = field(repr=False)
    """Over all positions that were collected, the first token left out: for interventions on every token."""
    levels: tuple[int, ...]
    positions: tuple[str, ...]
    ids: tuple[str, ...] = field(repr=False)
    checkpoint: Checkpoint
    template: str
    last: str = ""
    """Name under which the last token of the prompt is stored."""

    def at(self, level: int, position: str) -> float:
        """The median norm at one level and one named position; pooled over positions for any other tokens."""
        if level not in self.levels:
            raise UserError(f"the residual norm of level {level} isn't known, only of levels {list(self.levels)}")
        row, name = self.levels.index(level), stored_name(position, self.last, self.positions)
        known = name in self.positions
        return float(self.medians[row, self.positions.index(name)] if known else self.pooled[row])


def residual_norms(acts: Activations) -> ResidualNorms:
    """Median norms at every level and position of activations, which should be those of training prompts.

    The first token of a prompt is left out: models park norms there that are tens of times larger.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> push = ml.Add(
    ...     direction, strength=0.5, unit="share", layers=(2,), positions="all", phase="both",
    ...     norms=ml.residual_norms(acts),
    ... )
    >>> len(ml.answer_under(model, prompts[:2], [push], max_new_tokens=4).texts)
    2
    """
    kept = [i for i, name in enumerate(acts.positions) if name != "token[0]"]
    if not kept or not acts.ids:
        raise UserError("there is no activation beside the first token's; collect at inst, last or post[*]")
    acts.require_vectors()
    norms = torch.empty(acts.values.shape[:3], dtype=torch.float64)
    for row, column, values in acts.cells():
        norms[:, row, column] = values.double().norm(dim=-1)
    norms = norms[:, :, kept]
    return ResidualNorms(
        medians=norms.quantile(0.5, dim=0).float(),
        pooled=norms.transpose(0, 1).flatten(start_dim=1).quantile(0.5, dim=1).float(),
        levels=acts.levels,
        positions=tuple(acts.positions[i] for i in kept),
        ids=acts.ids,
        checkpoint=acts.checkpoint,
        template=acts.template,
        last=acts.last,
    )


@dataclass(frozen=True)
class Add:
    """Adds strength times a direction to the residual stream, at some layers and tokens.

    Layers are counted in blocks from 0, and the input of block l is level l: a direction of level l belongs at
    `layers=(direction.level,)`, unless `site` is another. That of the last level belongs at the last layer with
    `site="resid_post"`. By default every token is changed, those of the prompt and those of the answer; for named
    positions choose `phase="prompt"`.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> push = ml.Add(direction, strength=1.0, unit="raw", layers=(2,), positions="all", phase="both")
    >>> nothing = ml.Add(direction, strength=0.0, unit="raw", layers=(2,), positions="all", phase="both")
    >>> plain = ml.answer(model, prompts[:2], max_new_tokens=4).texts
    >>> tuple(ml.answer_under(model, prompts[:2], [nothing], max_new_tokens=4).texts) == plain
    True
    """

    direction: Direction
    _: KW_ONLY
    strength: float
    unit: Unit
    """What strength 1 is. "raw": the vector as it is, the whole difference between the classes' means; "unit": the
    vector with length 1; "share": with the median length of the residual stream there. The direction carries that of
    its own level and position, as a file of it does; for others give `norms`."""
    layers: tuple[int, ...] | Everything
    positions: tuple[str, ...] | Everything = ALL
    """Names such as inst, last, post[*], instruction[*], token[3], token[5:20] (cut at the prompt's end), or all."""
    phase: Phase = "both"
    """Which tokens are changed: "prompt": those of the prompt; "generation": those of the answer; "both"."""
    site: str = "resid_pre"
    """resid_pre (the level of the layer's number), attn_out, mlp_out, or resid_post (the level above it)."""
    norms: ResidualNorms | None = None
    answer_tokens: int | None = None
    """Of the answer, only the first so many tokens; None is all. Zhao et al. (2025) change the prompt alone, the prompt
    and the first k tokens, or everything: phase "prompt", "both" with k, or "both"."""

    def __post_init__(self) -> None:
        _check(self.layers, self.positions, self.phase, (self.site,))
        _check_answer(self.phase, self.answer_tokens)
        _check_strength(self.direction, self.strength, self.unit)
        _check_share(self)


@dataclass(frozen=True)
class Ablate:
    """Removes the component along a direction; by default everywhere, as Arditi et al. (2024) do.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> gone = ml.Ablate(direction, layers="all", positions="all", phase="both", sites=ml.EVERYWHERE)
    >>> said = ml.answer_under(model, prompts[:2], [gone], max_new_tokens=4)
    >>> len(said.texts)
    2
    """

    direction: Direction
    _: KW_ONLY
    layers: tuple[int, ...] | Everything = ALL
    positions: tuple[str, ...] | Everything = ALL
    phase: Phase = "both"
    """As in `Add`."""
    sites: tuple[str, ...] = EVERYWHERE
    """Some of resid_pre, attn_out, mlp_out, resid_post; EVERYWHERE is the first three."""
    answer_tokens: int | None = None
    """As in `Add`."""

    def __post_init__(self) -> None:
        _check(self.layers, self.positions, self.phase, self.sites)
        _check_answer(self.phase, self.answer_tokens)
        _check_strength(self.direction, 0.0, "raw")


@dataclass(frozen=True)
class ReplaceComponent:
    """Sets the component along a direction: directional patching. `unit` counts as in `Add`.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> held = ml.ReplaceComponent(direction, value=0.0, unit="unit", layers=(2,), positions=("last",), phase="prompt")
    >>> ml.logits_under(model, prompts[:2], [held]).shape[0]
    2
    """

    direction: Direction
    _: KW_ONLY
    value: float
    unit: Unit
    layers: tuple[int, ...] | Everything
    positions: tuple[str, ...] | Everything
    phase: Phase
    site: str = "resid_pre"
    norms: ResidualNorms | None = None
    answer_tokens: int | None = None
    """As in `Add`."""

    def __post_init__(self) -> None:
        _check(self.layers, self.positions, self.phase, (self.site,))
        _check_answer(self.phase, self.answer_tokens)
        _check_strength(self.direction, self.value, self.unit)
        _check_share(self)


@dataclass(frozen=True)
class Replace:
    """Puts given vectors, such as another prompt's, at named positions of the prompt; see `replacement`.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> other = ml.replacement(acts, prompts[0].id, layers=[1], positions=["last"])
    >>> said = ml.answer_under(model, prompts[20:22], [other], max_new_tokens=4)
    >>> len(said.texts)
    2
    """

    values: Float[Tensor, "layer position d_model"] = field(repr=False)
    _: KW_ONLY
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    """Names of one token each."""
    checkpoint: Checkpoint
    template: str
    site: str = "resid_pre"
    phase: ClassVar[Phase] = "prompt"

    def __post_init__(self) -> None:
        _check(self.layers, self.positions, self.phase, (self.site,))
        if self.values.shape[:2] != (len(self.layers), len(self.positions)):
            raise UserError(
                f"there are values for {tuple(self.values.shape[:2])} layers and positions, and "
                f"{(len(self.layers), len(self.positions))} are named; give one vector each"
            )
        if not bool(torch.isfinite(self.values).all()):
            raise UserError("the values to put are not finite; collect them in bfloat16 or float32")


Act = Add | Ablate | Replace | ReplaceComponent


@runtime_checkable
class Gated(Protocol):
    """What happens by a share that is decided from what a prompt's own pass shows of it: `When`, or a controller."""

    @property
    def decider(self) -> Decider:
        """Gives the shares from the residuals at `places`."""
        ...

    @property
    def places(self) -> tuple[tuple[int, str], ...]:
        """Levels and named positions of one token each."""
        ...

    @property
    def acts(self) -> tuple[tuple[Act, int], ...]:
        """What happens, each with the number of its share."""
        ...

    @property
    def made(self) -> Iterable[tuple[str, int, Checkpoint, str]]:
        """What decides: in words, the width it reads, the model it was made with, and its template."""
        ...


Intervention = Act | Gated


def replacement(acts: Activations, prompt: str, *, layers: Sequence[int], positions: Sequence[str]) -> Replace:
    """The residuals of one collected prompt, by id, to be put into other runs at the same layers and positions.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> other = ml.replacement(acts, prompts[0].id, layers=[1], positions=["last"])
    >>> said = ml.answer_under(model, prompts[20:22], [other], max_new_tokens=4)
    >>> len(said.texts)
    2
    """
    if prompt not in acts.ids:
        raise UserError(f"prompt {prompt!r} was not collected; choose one of the {len(acts.ids)} that were")
    row = acts.ids.index(prompt)
    values = [torch.stack([acts.at(layer, name)[row] for name in positions]) for layer in layers]
    return Replace(
        torch.stack(values), layers=tuple(layers), positions=tuple(positions),
        checkpoint=acts.checkpoint, template=acts.template,
    )  # fmt: skip


def _check(
    layers: tuple[int, ...] | Everything, positions: tuple[str, ...] | Everything, phase: Phase, sites: tuple[str, ...]
) -> None:
    if isinstance(layers, int):
        raise UserError(f"layers is {layers}; give a tuple, such as layers=({layers},), or 'all'")
    if isinstance(positions, str) and positions != ALL:
        raise UserError(f"positions is {positions!r}; give a tuple, such as positions=({positions!r},), or 'all'")
    if not layers or not positions or not sites:
        raise UserError("an intervention needs at least one layer, one position and one site; name them, or 'all'")
    if phase not in ("prompt", "generation", "both"):
        raise UserError(f"there is no phase {phase!r}; choose prompt, generation or both")
    for site in sites:
        require_site(site, CHANGEABLE)
    if phase != "prompt" and positions != ALL:
        raise UserError(
            f"the positions {', '.join(positions)} lie in the prompt, and the phase is {phase!r}; choose "
            "phase='prompt', or positions='all'"
        )


def _check_answer(phase: Phase, answer_tokens: int | None) -> None:
    if answer_tokens is None:
        return
    if answer_tokens < 1:
        raise UserError(f"answer_tokens is {answer_tokens}; give at least 1, or choose phase='prompt'")
    if phase == "prompt":
        raise UserError(f"answer_tokens={answer_tokens} with phase='prompt' changes no answer; choose phase='both'")


def require_number(given: object, what: str) -> None:
    """UserError for what is no number."""
    if isinstance(given, bool) or not isinstance(given, Real) or math.isnan(given):
        raise UserError(f"the {what} is {quoted(given)}; give a number, such as 0.5")


def _check_strength(direction: Direction, strength: float, unit: Unit) -> None:
    require_is_direction(direction)
    if unit not in ("raw", "unit", "share"):
        raise UserError(f"there is no unit {unit!r} of strength; choose raw, unit or share")
    if not math.isfinite(strength):
        raise UserError(f"the strength is {strength}; give a finite number")
    if not math.isfinite(direction.norm) or direction.norm == 0:
        raise UserError(f"the direction has length {direction.norm}, so it points nowhere; make it from other prompts")


def _check_share(one: Add | ReplaceComponent) -> None:
    """UserError where it is a share of a length that nobody gave."""
    if one.unit != "share" or one.norms is not None:
        return
    needs = "a strength in shares of the residual norm needs norms=residual_norms(training activations)"
    if one.direction.residual_norm is None:
        raise UserError(f"{needs}: the direction doesn't carry any")
    levels = ALL if one.layers == ALL else tuple(layer + level_above(one.site) for layer in one.layers)
    if levels != (one.direction.level,):
        raise UserError(f"{needs}: the direction carries that of level {one.direction.level} only")


def level_above(site: str) -> int:
    """How many levels above a block's number the level lies that the site changes: a block's output is the next."""
    return int(site == "resid_post")
