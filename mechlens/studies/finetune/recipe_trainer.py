"""Hugging Face's Trainer with the response loss: imported when training begins, since that is slow and talks."""

from typing import Any

from torch import Tensor
from transformers import Trainer

from mechlens.studies.finetune.response_loss import response_loss


class RecipeTrainer(Trainer):  # type: ignore[misc]
    """Trains a PEFT model on batches by kind; see `response_loss.collate_by_kind`."""

    plain_weight: float = 0.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Tensor:
        """Loss of one step; there are no outputs to return."""
        return response_loss(model, inputs, self.plain_weight)
