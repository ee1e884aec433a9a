"""TransformerLens' direct-path patching behind an interface of ours: ids in, labelled refusals out."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel, device_of, site_hook


@torch.inference_mode()
def paths_from_head(
    model: LanguageModel,
    ids: Sequence[int],
    source_ids: Sequence[int],
    sender: tuple[int, int],
    receiver: str,
    metric: Callable[[Float[Tensor, "1 seq vocab"]], Tensor],
) -> Float[Tensor, "layer head"]:
    """TransformerLens' direct-path patching on the run `ids`; rows up to the sender's layer are no measurements.

    UserError where TransformerLens can't take a head's input apart, with its reason.
    """
    try:
        from transformer_lens.patching import get_act_patch_direct_path
    except ImportError as error:
        raise UserError("path patching came with TransformerLens 4; this is an older one, so update it") from error
    tokens, source = (torch.tensor([list(run)], device=device_of(model)) for run in (ids, source_ids))
    layer, head = sender
    z = site_hook("z", layer)
    caches = [model.run_with_cache(run, names_filter=lambda name: name == z)[1] for run in (source, tokens)]
    try:
        found: Tensor = get_act_patch_direct_path(
            model, tokens, *caches, metric, layer, head, component=receiver, verbose=False
        )
    except RuntimeError as error:  # it has no fork of its attention's inputs to hook
        raise UserError(f"TransformerLens can't patch paths in this model: {error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    return found.cpu()
