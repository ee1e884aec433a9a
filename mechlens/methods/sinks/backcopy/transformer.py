"""A small transformer with one head a layer, whose attention may be softmax, ReLU, or gated."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechlens.errors import UserError
from mechlens.registry import require_numbers, whole_numbers
from mechlens.settings import Options, PositiveInt

AttentionKind = Literal["softmax", "relu", "gated"]


@dataclass(frozen=True)
class BackcopyShape(Options):
    """How large a transformer is, and how it attends.

    >>> ml.BackcopyShape(layers=3, attention="relu").width
    64
    """

    layers: PositiveInt = 1
    attention: AttentionKind = "softmax"
    """relu: the scores above 0 as they are; gated: softmax, then a sigmoid of the input for every dimension (Qiu et al.
    2025, elementwise)."""
    width: PositiveInt = 64
    length: Annotated[int, Ge(4)] = 64
    """Tokens that it has places for: a start, a letter, a trigger and the letter again at least."""
    headless: tuple[int, ...] = ()
    """Blocks that have an MLP only: with 0 and 2 of three the authors' smallest model whose residual stream peaks."""

    def __post_init__(self) -> None:
        blocks = whole_numbers("headless", self.headless, "block")
        require_numbers("block", blocks, self.layers - 1, "the transformer")
        if len(set(blocks)) == self.layers > 0:
            raise UserError("every block is headless; leave one with a head, whose attention is looked at")


class Watched(NamedTuple):
    """What a pass shows."""

    pattern: Float[Tensor, "head sequence query key"]
    """Of the blocks that have a head."""
    written: Float[Tensor, "head sequence key d_model"]
    """`W_O v` of every token there."""
    residual: Float[Tensor, "layer sequence place d_model"]
    """What each block puts out."""


class BackcopyTransformer(nn.Module):
    """Pre-norm blocks of one head and an MLP, with learned places.

    >>> import torch
    >>> model = ml.BackcopyTransformer(ml.BackcopyShape(), n_tokens=28, seed=0)
    >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
    torch.Size([1, 5, 28])
    """

    def __init__(self, shape: BackcopyShape, *, n_tokens: int, seed: int) -> None:
        super().__init__()
        if whole_numbers("n_tokens", [n_tokens], "count")[0] < 1:
            raise UserError(f"n_tokens is {n_tokens}; give the task's, such as backcopy_task().n_tokens")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(n_tokens, shape.width)
            self.places = nn.Embedding(shape.length, shape.width)
            self.blocks = nn.ModuleList([Block(shape, layer) for layer in range(shape.layers)])
            self.with_heads = tuple(layer for layer in range(shape.layers) if layer not in shape.headless)
            self.norm = nn.RMSNorm(shape.width)
            self.unembed = nn.Linear(shape.width, n_tokens, bias=False)
            for part in self.modules():
                if isinstance(part, nn.Linear | nn.Embedding):
                    nn.init.normal_(part.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "sequence place"]) -> Float[Tensor, "sequence place token"]:
        """The logits of what comes next."""
        residual = self._start(tokens)
        for block in self.blocks:
            residual = block(residual)
        logits: Tensor = self.unembed(self.norm(residual))
        return logits

    @torch.inference_mode()
    def watched(self, tokens: Int[Tensor, "sequence place"]) -> Watched:
        """What its heads attend to and write, and the residual stream."""
        residual, patterns, written, residuals = self._start(tokens), [], [], []
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.has_head:
                normed = block.norm_attention(residual)
                patterns.append(block.pattern(normed))
                written.append(block.out(block.value(normed)))
            residual = block(residual)
            residuals.append(residual)
        return Watched(torch.stack(patterns), torch.stack(written), torch.stack(residuals))

    def _start(self, tokens: Tensor) -> Tensor:
        longest, most = len(self.places.weight), self.unembed.out_features - 1
        if tokens.ndim != 2 or tokens.shape[1] > longest:
            shape = " x ".join(map(str, tokens.shape))
            raise UserError(f"the tokens are {shape}; give rows of at most {longest}, one for each sequence")
        outside = (tokens < 0) | (tokens > most)
        if bool(outside.any()):
            raise UserError(f"there is no token {int(tokens[outside][0])}; choose from 0 to {most}")
        places: Tensor = self.embed(tokens) + self.places.weight[: tokens.shape[1]]
        return places


class Block(nn.Module):
    """One head, unless it is headless, then an MLP, each on the normed residual stream."""

    def __init__(self, shape: BackcopyShape, layer: int) -> None:
        super().__init__()
        width = shape.width
        self.kind, self.has_head = shape.attention, layer not in shape.headless
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate = nn.Linear(width, width, bias=False) if shape.attention == "gated" else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """The residual stream with what the head and the MLP add."""
        if self.has_head:
            normed = self.norm_attention(residual)
            mixed = self.pattern(normed) @ self.value(normed)
            if self.gate is not None:
                mixed = mixed * torch.sigmoid(self.gate(normed))
            residual = residual + self.out(mixed)
        added: Tensor = residual + self.mlp(self.norm_mlp(residual))
        return added

    def pattern(self, normed: Float[Tensor, "sequence place d_model"]) -> Float[Tensor, "sequence query key"]:
        """How much every token takes from every one before it."""
        scores: Tensor = self.query(normed) @ self.key(normed).transpose(1, 2) / math.sqrt(normed.shape[-1])
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        if self.kind == "relu":
            return scores.relu().masked_fill(later, 0.0)
        return scores.masked_fill(later, -torch.inf).softmax(dim=-1)
