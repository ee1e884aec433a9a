"""Shifts of the heads that tell harmful from harmless prompts (Li et al. 2023, Inference-Time Intervention).

A head's output is shifted along the difference of its class means, by its own spread along that. What the shifts of a
layer's heads add to the residual stream is one vector, the same at every token: an addition at `attn_out`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.probing.auroc import auroc
from mechlens.methods.steering.interventions import Add
from mechlens.models.attention.outputs import head_matrices
from mechlens.models.bridge import LanguageModel, checkpoint_now, n_layers
from mechlens.prompts.batch import TokenBatch

ALPHA = 100.0
"""Spreads per unit of strength: strengths from .025 to .2 are the published alphas from 2.5 to 20."""


def head_shifts(
    model: LanguageModel,
    batch: TokenBatch,
    train: Sequence[int],
    choose: Sequence[int],
    harmful: Bool[torch.Tensor, " prompt"],
    share: float,
    *,
    cache: Cache | None = None,
) -> tuple[Add, ...]:
    """Additions of strength 1: the best share of heads by validation AUROC, each shifted by `ALPHA` spreads.

    UserError where a model's heads can't be taken apart, or what they write is normalised before it is added.
    """
    if any("ln1_post" in dict(block.named_children()) for block in model.blocks):
        raise UserError("attention's output is normalised before it is added, so shifts of heads are no addition there")
    layers = range(n_layers(model))
    matrices = head_matrices(model, layers)
    known = sorted({*train, *choose})
    acts = collect(model, batch.select(known), site="z", positions=["last"], cache=cache)
    values = acts.values[:, :, 0].double()
    fitted, held_out = (torch.tensor([known.index(i) for i in rows]) for rows in (train, choose))
    up, down = (values[fitted][harmful[list(train)] == side].mean(dim=0) for side in (True, False))
    theta = up - down
    theta = theta / theta.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    along = (values * theta).sum(dim=-1)
    spread = along[fitted].std(dim=0)
    told = auroc(along[held_out].permute(1, 2, 0), harmful[list(choose)])
    best = told.flatten().argsort(descending=True, stable=True)[: max(1, round(share * told.numel()))]
    chosen = torch.zeros(told.numel(), dtype=torch.bool)
    chosen[best] = True
    shifts = theta * (spread * chosen.view(told.shape) * ALPHA).unsqueeze(-1)
    found = []
    for layer in layers:
        if bool(chosen.view(told.shape)[layer].any()):
            vector = torch.einsum("hd,hdm->m", shifts[layer].float(), matrices[layer])
            direction = Direction(
                vector, layer, "last", "attn_out", "shifts of heads", ("harmful", "harmless"), checkpoint_now(model),
                batch.template, tuple(batch.prompts[i].id for i in train),
            )  # fmt: skip
            found.append(Add(direction, strength=1.0, unit="raw", layers=(layer,), site="attn_out"))
    return tuple(found)
