"""What differs between the versions of transformers that we support, and mends bridged attention under the newer ones.

transformers 5.24 calls the keys and values handed to a model `cache`, where it was `past_key_values` before.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

NEW, OLD = "cache", "past_key_values"


def with_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """Arguments of a Hugging Face forward pass that reads `cache` and writes the new tokens into it."""
    name = NEW if NEW in _parameters(type(module).forward) else OLD
    return {name: cache, "use_cache": True}


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def cache_by_old_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook for modules that know the old name only, as TransformerLens 4.3's attention does."""
    if NEW not in kwargs:
        return None
    return args, {OLD if name == NEW else name: value for name, value in kwargs.items()}


def in_type_of(attention: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook for rotated queries and keys: Hugging Face rotates in float32 and rounds back."""

    def rounded(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(next(p.dtype for p in attention.parameters() if p.is_floating_point()))

    return rounded


def mend_attention(model: Any) -> None:
    """Lets bridged attention find the cached keys and values, and keeps it to the type of the weights."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    for module in model.modules():
        # One that hands its arguments on to Hugging Face's attention needs Hugging Face's name for them.
        if isinstance(module, AttentionBridge) and type(module).forward is not AttentionBridge.forward:
            module.register_forward_pre_hook(cache_by_old_name, with_kwargs=True)
            for point in (getattr(module, name, None) for name in ("hook_rot_q", "hook_rot_k")):
                if point is not None:
                    point.register_forward_hook(in_type_of(module))
