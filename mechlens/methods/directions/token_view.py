"""Reading a direction token by token: how far each token of a prompt and its answer points along it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.directions.direction import Direction, project, require_is_direction
from mechlens.models.bridge import LanguageModel, checkpoint_now, embedding_rows, loaded, unembed
from mechlens.models.checkpoints.difference import require_same_weights
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.prompts.batch import require_rows_for, token_text


@dataclass(frozen=True)
class TokenProjections:
    """Tokens of one text with the projection of each on a unit direction (residual-stream units)."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    level: int


def project_tokens(model: LanguageModel, direction: Direction, ids: Sequence[int]) -> TokenProjections:
    """Projection of every token on the direction, at the level where the direction was found.

    Raises UserError where the direction comes from other weights, and for ids without a row in the embedding.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> ids = ml.tokenize(prompts[:1], ml.template_of(model)).row(0)
    >>> found = ml.project_tokens(model, direction, ids)
    >>> len(found.tokens) == len(found.values) == len(ids)
    True
    """
    require_is_direction(direction)
    tokenizer = loaded(model).tokenizer
    require_rows_for(ids, "the text", embedding_rows(model), tokenizer)
    require_same_model(model, direction)
    row = Row(tuple(ids), tuple(range(len(ids))))
    if forward.fits_fast_path(model):
        values = forward.fast_batch(model, [row], [direction.level], None)
    else:
        values = forward.reference_batch(model, [row], [direction.level])
    return TokenProjections(
        tokens=tuple(token_text(tokenizer, token) for token in ids),
        values=tuple(project(values[0, 0], direction).tolist()),
        level=direction.level,
    )


def require_same_model(model: LanguageModel, direction: Direction) -> None:
    """UserError unless the direction was found in these weights and this weight regime."""
    require_same_weights("direction", direction.checkpoint, checkpoint_now(model), "make it anew in this model")


@dataclass(frozen=True, repr=False)
class LensTokens:
    """The tokens that a direction, read as a residual, makes most and least likely, with their logits."""

    top: tuple[tuple[str, float], ...]
    bottom: tuple[tuple[str, float], ...]

    def __repr__(self) -> str:
        sides = {"most likely": self.top, "least likely": self.bottom}
        shown = [
            f"{side}: " + ", ".join(f"{text!r} {logit:.2f}" for text, logit in tokens) for side, tokens in sides.items()
        ]
        return f"LensTokens({'; '.join(shown)})"


def logit_lens(model: LanguageModel, direction: Direction, k: int) -> LensTokens:
    """The direction through the final norm and the unembedding (nostalgebraist 2020): its k extreme tokens.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> lens = ml.logit_lens(model, direction, k=5)
    >>> len(lens.top), len(lens.top[0])  # each a token with its logit
    (5, 2)
    """
    logits = _lens_logits(model, direction)
    tokenizer = loaded(model).tokenizer

    def named(indices: Tensor) -> tuple[tuple[str, float], ...]:
        return tuple((token_text(tokenizer, i), float(logits[i])) for i in indices.tolist())

    order = torch.argsort(logits)
    return LensTokens(top=named(order[-k:].flip(0)), bottom=named(order[:k]))


def _lens_logits(model: LanguageModel, direction: Direction) -> Float[Tensor, " vocab"]:
    return unembed(model, direction.vector.unsqueeze(0))[0]
