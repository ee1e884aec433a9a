"""What is to be done for one pair: which run is edited, which one gives the values, and every edit."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.patching.metrics import Metric
from mechlens.methods.patching.plan import PatchPlan
from mechlens.models.engine.edits import Edit, Recording, value_at
from mechlens.models.engine.packed.packing import alike
from mechlens.prompts.batch import TokenBatch


@dataclass(frozen=True)
class PairTask:
    """One pair: the run that is edited, the one that values come from, and the places of each role in the two."""

    start: tuple[int, ...]
    source: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    read: int
    source_read: int

    @property
    def alike(self) -> int:
        """How many tokens the two runs begin with alike: up to there they have the same activations."""
        return alike(self.start, self.source)

    def changing(self, *, one_model: bool) -> list[bool]:
        """Of each place whether an edit there can change what is read: not after it, and not where both runs have the
        same by causality (the same tokens so far, in the same model)."""
        known = self.alike if one_model else 0
        return [to <= self.read and not to == come < known for to, come in self.places]

    def tokens(self, *, one_model: bool) -> int:
        """How many tokens the edits of one layer and head change."""
        changing = self.changing(one_model=one_model)
        return sum(self.read - to + 1 for (to, _), does in zip(self.places, changing, strict=True) if does)


def pair_task(both: Sequence[TokenBatch], i: int, plan: PatchPlan, positions: Sequence[str]) -> PairTask:
    """The task of one pair of the clean and the corrupt batch."""
    start, source = both[::-1] if plan.mode == "denoising" else both
    places = tuple((_index(start, name, i), _index(source, name, i)) for name in positions)
    if plan.site == "pattern":
        same_length = len(start.row(i)) == len(source.row(i))
        if not same_length or any(to != come for to, come in places):
            raise UserError(
                f"a row of 'pattern' has one number for each token, and the tokens of {start.prompts[i].id!r} and "
                f"{source.prompts[i].id!r} don't stand in the same places; choose pairs of one length"
            )
    reads = _index(start, plan.read, i), _index(source, plan.read, i)
    return PairTask(tuple(start.row(i)), tuple(source.row(i)), places, *reads)


def _index(batch: TokenBatch, name: str, i: int) -> int:
    return int(batch.at(name)[i]) - batch.offset(i)


def piece(plan: PatchPlan, metric: Metric, values: Tensor, start: Recording, source: Recording) -> dict[str, Tensor]:
    """What is kept of a pair: the metric at every site, and of the two runs."""
    clean = source.logits if plan.mode == "denoising" else start.logits
    ends = metric(torch.stack([start.logits, source.logits]), clean)
    return {"values": values, "start": ends[0].clone(), "source": ends[1].clone()}


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
