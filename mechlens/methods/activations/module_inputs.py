"""What the model's own matrices are given at the last token of every prompt."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechlens.methods.progress import progress_bar
from mechlens.models.bridge import LanguageModel, device_of
from mechlens.models.native import native
from mechlens.prompts.batch import TokenBatch


@torch.no_grad()
def module_inputs(
    model: LanguageModel, batch: TokenBatch, modules: Sequence[str]
) -> dict[str, Float[Tensor, "prompt input"]]:
    """The inputs of linear layers of the plain Hugging Face model, by their names; one prompt at a time, unpadded.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize(["Say hello.", "How do I bake a cake?"], ml.template_of(model))
    >>> found = ml.module_inputs(model, batch, ["model.layers.1.self_attn.o_proj"])
    >>> found["model.layers.1.self_attn.o_proj"].shape[0]
    2
    """
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    with native(model) as hf_model:
        hooks = []
        try:
            for name in modules:

                def keep(_: nn.Module, given: tuple[Tensor, ...], own: list[Tensor] = found[name]) -> None:
                    own.append(given[0][0, -1].float().cpu())

                hooks.append(hf_model.get_submodule(name).register_forward_pre_hook(keep))
            for row in progress_bar(range(len(batch.prompts)), title="inputs", unit="prompt"):
                hf_model(torch.tensor([batch.row(row)], device=device_of(model)), logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: torch.stack(own) for name, own in found.items()}
