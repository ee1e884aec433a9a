"""Caches of keys and values: for a single pass, which keeps nothing, or with room to grow; and how models take them.

transformers 5.24 calls the keys and values handed to a model `cache`, where it was `past_key_values` before; bridged
attention is mended under such newer versions.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mechlens.models.checkpoint import is_packed


class ReadOnlyCache(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """The first tokens of a run for a batch of any size, in one pass: new tokens are attended to and forgotten.

    So memory doesn't grow with rows times layers.
    """

    def __init__(self, run: DynamicCache | None, length: int) -> None:
        layers = run.layers if run is not None and length else ()
        super().__init__([(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in layers])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values of all tokens of the rows that the block has."""
        if not self.layers:
            return key_states, value_states
        layer, rows = self.layers[layer_idx], len(key_states)
        kept = layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)
        return torch.cat([kept[0], key_states], dim=-2), torch.cat([kept[1], value_states], dim=-2)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values as the first columns of tensors that are as long as they will ever be."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length = keys.shape[-2]
        self.whole_keys, self.whole_values = _with_room(keys, room), _with_room(values, room)
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (x[:, :, : self.length] for x in (self.whole_keys, self.whole_values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new tokens behind the others; gives all of them."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.whole_keys[:, :, start : self.length] = key_states
        self.whole_values[:, :, start : self.length] = value_states
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some of the rows."""
        indices = indices.to(self.whole_keys.device)  # blocks may lie on several devices
        self.whole_keys, self.whole_values = self.whole_keys[indices], self.whole_values[indices]
        self._show()


def _with_room(x: Tensor, room: int) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:2], room, x.shape[3])], dim=2)


def roomy(layers: list[tuple[Tensor, Tensor]], room: int) -> DynamicCache:
    """A cache of these keys and values, layer by layer, with room for so many more tokens."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer(keys, values, room) for keys, values in layers]
    return cache


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


def in_type_of(attention: nn.Module, embedding: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook for rotated queries and keys: Hugging Face rotates in float32 and rounds back.

    All of an attention's own weights may be packed, and then the embedding's type tells.
    """

    def rounded(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        weights = (weight for part in (attention, embedding) for weight in part.parameters())
        return output.to(next(weight.dtype for weight in weights if not is_packed(weight)))

    return rounded


def mend_attention(model: Any) -> None:
    """Lets bridged attention find the cached keys and values, and keeps it to the type of the weights."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    embedding = model.original_model.get_input_embeddings()
    for module in model.modules():
        # One that hands its arguments on to Hugging Face's attention needs Hugging Face's name for them.
        if isinstance(module, AttentionBridge) and type(module).forward is not AttentionBridge.forward:
            module.register_forward_pre_hook(cache_by_old_name, with_kwargs=True)
            for point in (getattr(module, name, None) for name in ("hook_rot_q", "hook_rot_k")):
                if point is not None:
                    point.register_forward_hook(in_type_of(module, embedding))
