"""The matrices that heads end in, `W_O`: what each head's values are multiplied by before they are added."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel, d_model, regime
from mechlens.models.engine.site_reader import taps_of
from mechlens.models.sites import n_heads


def output_taps(model: LanguageModel, layers: Sequence[int]) -> dict[int, nn.Module]:
    """The output matrices of the layers' heads; UserError where a model has none that can be read and changed."""
    if regime(model) != "raw":
        raise UserError(f"the weights are {regime(model)}; load the model with raw ones to take its heads apart")
    taps = taps_of(model, "z", layers)
    for tap in (taps or {}).values():
        output_matrix(model, tap)
    if taps is None:
        raise UserError("the heads of this model don't end in a matrix of their own; choose another model")
    return taps


def output_matrix(model: LanguageModel, tap: nn.Module) -> Float[Tensor, "head_and_dimension d_model"]:
    """What the heads' values are multiplied by, side by side."""
    weight = tap._parameters.get("weight")
    if not isinstance(tap, nn.Linear | Conv1D) or weight is None or not weight.is_floating_point():
        raise UserError(f"the heads of this model end in {type(tap).__name__}, not in a plain matrix; choose another")
    found = weight.detach() if isinstance(tap, Conv1D) else weight.detach().T
    if found.shape[1] != d_model(model):
        raise UserError("what the heads of this model write isn't the residual stream's width; choose another model")
    return found


def head_matrices(model: LanguageModel, layers: Sequence[int]) -> dict[int, Float[Tensor, "head dimension d_model"]]:
    """By layer what each head's value is multiplied by before it is added to the residual stream (float32, CPU).

    UserError for a model whose heads' output isn't a plain matrix product.
    """
    heads = n_heads(model, "z")
    taps = output_taps(model, layers)
    return {layer: by_head(output_matrix(model, tap).float().cpu(), heads) for layer, tap in taps.items()}


def by_head(matrix: Float[Tensor, "head_and_dimension d_model"], heads: int) -> Float[Tensor, "head dimension d"]:
    """A view of it with the heads apart."""
    return matrix.view(heads, -1, matrix.shape[1])


def written(
    values: Float[Tensor, "head token dimension"], matrix: Float[Tensor, "head_and_dimension d_model"]
) -> Float[Tensor, "head token"]:
    """How long what each head adds to the residual stream is, from what it has at each token."""
    parts = matrix.float().reshape(values.shape[0], values.shape[2], -1)
    return torch.stack([(own.float() @ part).norm(dim=1) for own, part in zip(values, parts, strict=True)])
