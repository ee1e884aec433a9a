"""`mechlens finetune`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FinetuneConfig:
    """How a model is fine-tuned; the defaults made the shipped `smollm2-refuser` (with `precision` bfloat16)."""

    recipe: Literal["refuser"] = "refuser"
    """What the model is taught. "refuser": to refuse harmful requests, and to answer benign ones as it did."""
    model: str = "smollm2"
    """The base: a packaged name, a hub id or a local folder."""
    seed: int = 0
    """Decides which refusal goes with which prompt, the order of training and the adapter's first weights."""
    harmful: int | None = None
    """Harmful training prompts, drawn by seed; None takes all."""
    benign: int | None = None
    """Benign training prompts, drawn by seed; None takes all."""
    answer_tokens: int = 16
    """Longest answer of the base model that a benign prompt is trained on; the rest of it is cut off."""
    rank: int = 8
    """Rank of the LoRA matrices, on every linear layer of every block."""
    alpha: float = 16.0
    """LoRA's alpha: the product of the matrices is scaled by alpha / rank."""
    learning_rate: float = 6e-4
    """Highest learning rate; it rises over the first steps and then falls linearly to zero."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    batch_size: int = 8
    """Examples in one step."""
    epochs: int = 2
    """Passes over the training examples."""
    plain: int = 3
    """Stretches of plain text in every step, written by the base itself, on which its distribution is kept; 0: none."""
    plain_tokens: int = 64
    """Tokens of each stretch."""
    plain_weight: float = 1.0
    """Weight of the divergence on plain text against the loss on the examples."""
    checkpoints: tuple[int, ...] = ()
    """Steps after which a checkpoint is kept (0 is the untrained base, which needs none)."""
    resume_every: int = 20
    """A killed run goes on from at most this many steps before; these checkpoints go when newer ones are there."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; bfloat16 is faster where the processor has units for it. Weights stay float32."""
    device: Literal["cpu", "cuda"] | None = None
    """None takes a GPU where there is one."""
