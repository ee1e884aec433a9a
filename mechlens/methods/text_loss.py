"""Cross-entropy of plain text: whether a model still writes, whatever else has become of it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.models import forward
from mechlens.models.bridge import LanguageModel, loaded, n_layers, unembed
from mechlens.models.forward import Row


def text_loss(model: LanguageModel, texts: Sequence[str]) -> Float[Tensor, " text"]:
    """Mean of -log P(token | all before it) over each text's tokens but the first (nats, float64)."""
    tokenizer, level = loaded(model).tokenizer, n_layers(model)
    losses = []
    for text in texts:
        ids = list(tokenizer(text)["input_ids"])
        row = Row(tuple(ids), tuple(range(len(ids) - 1)))
        run = forward.fast_batch if forward.fits_fast_path(model) else None
        residual = run(model, [row], [level], None) if run else forward.plain_batch(model, [row], [level])
        told = unembed(model, residual[0, 0]).double().log_softmax(dim=-1)
        losses.append(-told.gather(1, torch.tensor(ids[1:])[:, None]).mean())
    return torch.stack(losses)
