"""The edits of one pair: the source's value at every site of a plan, or the control, a random vector as long."""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from mechlens.methods.patch_plan import PatchPlan
from mechlens.models.edit import Edit, Recording, value_at


def pair_edits(
    plan: PatchPlan,
    layers: Sequence[int],
    heads: Sequence[int],
    start: Recording,
    source: Recording,
    places: Sequence[tuple[int, int]],
) -> list[Edit]:
    """Every site with the value that is put there, in the grid's order: layer, position, head.

    `start` is the run that is edited, `source` the one that values come from, `places` one role's index in each.
    """
    values = source.values
    if plan.random_seed is not None:
        # Every pair draws its own vectors: one vector for all would have an effect of its own, the same in each.
        drawn = hashlib.sha256(json.dumps([plan.random_seed, start.ids, source.ids]).encode()).hexdigest()
        generator = torch.Generator().manual_seed(int(drawn[:15], 16))
        values = _as_far_at_random(start.values, values, plan.site, layers, heads, places, generator)
        places = [(place, place) for place, _ in places]
    return [
        Edit(layer, to, value_at(values[layer], plan.site, come, head), head)
        for layer in layers
        for to, come in places
        for head in (heads or (None,))
    ]


def _as_far_at_random(
    own: dict[int, Tensor],
    source: dict[int, Tensor],
    site: str,
    layers: Sequence[int],
    heads: Sequence[int],
    places: Sequence[tuple[int, int]],
    generator: torch.Generator,
) -> dict[int, Tensor]:
    """The run's own values plus, at each place, a random vector of the norm of the difference to the source."""
    changed = {layer: value.clone() for layer, value in own.items()}
    for layer in layers:
        for to, come in places:
            for head in heads or (None,):
                mine = value_at(own[layer], site, to, head)
                gap = (value_at(source[layer], site, come, head) - mine).float().norm()
                noise = torch.randn(mine.shape, generator=generator).to(mine.device)
                if site == "pattern":
                    noise[mine == 0] = 0  # tokens that can't be attended to stay so
                length = noise.norm().clamp(min=torch.finfo(noise.dtype).tiny)  # a pattern may attend to nothing
                value_at(changed[layer], site, to, head).copy_(mine + (noise * gap / length).to(mine.dtype))
    return changed
