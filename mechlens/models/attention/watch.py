"""Every layer's attention to one text: logits, pattern, values, what leaves the heads and the residual stream.

One pass of the plain model, through an attention of our own that transformers calls by name with each layer's queries
and keys (after rotary), scale, mask, soft cap and learned sinks. So it is the same whatever kernel the model was loaded
with. That this computes what the model computes is tried once for a model.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.masking_utils import eager_mask

from mechlens.errors import UserError
from mechlens.models.attention.changes import Change, Hidden, Pattern
from mechlens.models.attention.outputs import output_taps
from mechlens.models.bridge import LanguageModel, device_of, dtype_of, has_hooks, is_bridge, loaded, n_layers
from mechlens.models.engine.forward import Stop
from mechlens.models.engine.packed.packing import attending
from mechlens.models.engine.probes import UNTRIED, apart, is_misfit, spread_tokens, tolerance
from mechlens.models.engine.shared_rows import fault
from mechlens.models.engine.site_reader import tapped
from mechlens.models.native import native, native_blocks


@dataclass(frozen=True, repr=False)
class Attended:
    """One layer's attention to one text, in float32; under grouped-query attention a key head serves several heads."""

    layer: int
    logits: Pattern
    """Scaled, capped where the model caps them; minus infinity where a query can't see a key."""
    pattern: Pattern
    learned: Float[Tensor, "head query"]
    """Attention that no token gets, as it goes to a sink that is a parameter; 0 in a model without such."""
    values: Float[Tensor, "head key d_head"]
    mixed: Float[Tensor, "head query d_head"]
    """What the pattern makes of the values."""
    left: Float[Tensor, "head query d_head"]
    """What enters `W_O`: the same, after the gate where there is one."""

    @property
    def visible(self) -> Bool[Tensor, "query key"]:
        """Which keys every query can see."""
        return torch.isfinite(self.logits[0])


@torch.inference_mode()
def watch(
    model: LanguageModel,
    ids: Sequence[int],
    attention: Callable[[Attended], None] | None = None,
    residual: Callable[[int, Float[Tensor, "token d_model"]], Tensor | None] | None = None,
    change: Change | None = None,
) -> Float[Tensor, "token d_model"]:
    """Runs one text and shows each layer's attention, and each level's residual stream but the last, which it returns.

    What `residual` returns, if anything, takes the level's place. UserError for a model whose attention can't be read
    so, with the reason.
    """
    require_watchable(model)
    return _pass(model, ids, _Watch(attention, change), residual)


def _pass(
    model: LanguageModel,
    ids: Sequence[int],
    watching: "_Watch",
    residual: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Tensor:
    last: list[Tensor] = []

    def leave(block: nn.Module, args: object, output: Any) -> None:
        last.append((output if isinstance(output, Tensor) else output[0])[0].float())
        raise Stop

    tokens = torch.tensor([list(ids)], device=device_of(model))
    taps = _taps_there(model)
    with contextlib.ExitStack() as stack:
        hf_model = stack.enter_context(native(model))
        blocks = native_blocks(model)
        stack.enter_context(watching.attached(hf_model, blocks, taps))
        stack.enter_context(_levels(blocks, residual))
        stack.callback(blocks[-1].register_forward_hook(leave).remove)
        stack.enter_context(contextlib.suppress(Stop))
        hf_model(tokens, use_cache=False)
    return last[0]


@contextlib.contextmanager
def _levels(blocks: Sequence[nn.Module], residual: Callable[[int, Tensor], Tensor | None] | None) -> Iterator[None]:
    """Shows what enters every block, and puts what comes back in its place."""

    def entering(level: int, see: Callable[[int, Tensor], Tensor | None]) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            new = see(level, given[0].float())
            if new is None:
                return None
            new = new[None].to(given.dtype)
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

        return hook

    with contextlib.ExitStack() as stack:
        for level, block in enumerate(blocks if residual is not None else ()):
            assert residual is not None
            hook = entering(level, residual)
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@dataclass
class _Watch:
    """The attention that stands in for the model's own during one pass."""

    see: Callable[[Attended], None] | None
    change: Change | None = None
    scale: float = 1.0
    """What the heads' output is multiplied by: 1 but in a trial."""
    layers: dict[nn.Module, int] = field(default_factory=dict)
    """Of every module inside a block."""
    waiting: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    """What was seen of a layer whose `W_O` hasn't been reached."""
    done: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def attached(self, hf_model: nn.Module, blocks: Sequence[nn.Module], taps: dict[int, nn.Module]) -> Iterator[None]:
        """In every block of the plain model, for one pass; `taps` are the layers' output matrices."""
        self.layers = {part: layer for layer, block in enumerate(blocks) for part in block.modules()}
        seeing = {tap: self._leaving(layer) for layer, tap in taps.items()}
        with attending(hf_model, self, eager_mask), tapped(seeing):
            yield

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls in each layer; `how` has its scale, soft cap and learned sinks."""
        groups = query.shape[1] // key.shape[1]
        keys, values = (x[0].float().repeat_interleave(groups, dim=0) for x in (key, value))
        logits = _logits(query[0].float(), keys, attention_mask, how)
        if isinstance(self.change, Hidden):
            logits = self.change.over(logits)
        pattern, learned = _softmax(logits, how.get("s_aux"))
        layer = self.layers[module]
        if self.change is not None and not isinstance(self.change, Hidden):
            pattern = self.change(layer, pattern, torch.isfinite(logits[0]))
        mixed = pattern @ values
        if self.see is not None:
            self.waiting[layer] = (logits, pattern, learned, values, mixed)
        self.done.append(layer)
        return (self.scale * mixed).to(value.dtype).transpose(0, 1)[None].contiguous(), None

    def _leaving(self, layer: int) -> Callable[[Tensor], None]:
        def see(entering: Tensor) -> None:
            if self.see is not None and layer in self.waiting:
                logits, pattern, learned, values, mixed = self.waiting.pop(layer)
                left = entering[0].float().view(mixed.shape[1], mixed.shape[0], -1).transpose(0, 1)
                self.see(Attended(layer, logits, pattern, learned, values, mixed, left))

        return see


def _logits(query: Tensor, key: Tensor, mask: Tensor | None, how: dict[str, Any]) -> Tensor:
    scale, cap = how.get("scaling"), how.get("softcap")
    logits: Tensor = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    later = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).triu(1)
    if mask is not None:  # the smallest number of its type stands for minus infinity
        added = mask[0].float()
        later = added <= torch.finfo(mask.dtype).min / 2
        logits = logits + added.masked_fill(later, 0.0)
    return logits.masked_fill(later, -torch.inf)


def _softmax(logits: Pattern, learned: Tensor | None) -> tuple[Pattern, Float[Tensor, "head query"]]:
    """The pattern, and the share of a learned sink that stands beside the keys."""
    if learned is None:
        return logits.softmax(dim=-1), torch.zeros(logits.shape[:2], device=logits.device)
    beside = learned.float().view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    whole = torch.cat([logits, beside], dim=-1).softmax(dim=-1)
    return whole[..., :-1], whole[..., -1]


def attention_layers(model: LanguageModel) -> tuple[int, ...]:
    """Layers whose attention can be read: those of a hybrid model that have attention; UserError where none can."""
    require_watchable(model)
    return tuple(_taps_there(model))


def _taps_there(model: LanguageModel) -> dict[int, nn.Module]:
    """The output matrices of those layers that have attention; asked outside `native`."""
    found: dict[int, nn.Module] = {}
    for layer in range(n_layers(model)):
        if getattr(getattr(model.blocks[layer], "attn", None), "o", None) is not None:
            found |= output_taps(model, [layer])
    return found


def require_watchable(model: LanguageModel) -> None:
    """UserError where the attention of a model can't be read by `watch`, which is tried once on a few tokens."""
    name = loaded(model).checkpoint.name
    if not is_bridge(model):
        raise UserError(f"{name} has no Hugging Face model underneath, whose attention is read; load it with ml.load")
    if has_hooks(model):
        raise UserError("hooks are attached to the model, which the pass that reads attention goes past; remove them")
    reason = fault(model, "watching attention", lambda: _why_not(model))
    if reason:
        raise UserError(f"the attention of {name} can't be read: {reason}; choose another model")


@torch.inference_mode()
def _why_not(model: LanguageModel) -> str:
    ids = spread_tokens(model.original_model, [1, 2, 3, 4, 3, 2, 1, 7, 5, 9, 6, 8] * 2)
    seen: list[Attended] = []
    watching = _Watch(seen.append)
    try:
        if not _taps_there(model):
            return "no block of it has attention that ends in a matrix of its own"
        found = _pass(model, ids, watching)
        if not seen or sorted(watching.done) != sorted(one.layer for one in seen):
            return "it isn't computed where transformers lets it be named"
        right = _plain_residual(model, ids)
        twice: list[Attended] = []
        _pass(model, ids, _Watch(twice.append, scale=2.0))
    except UNTRIED as error:
        if not is_misfit(error):
            raise
        return f"a pass through a named attention fails in it ({type(error).__name__})"
    if apart(found, right) > tolerance(dtype_of(model)):
        return "it isn't a softmax of its queries and keys with the mask, cap and sinks that it names"
    # A gate takes its share whatever the heads found; a norm before W_O would not.
    if apart(twice[0].left, 2 * seen[0].left) > tolerance(dtype_of(model)):
        return "what its heads find is normed before it reaches their output matrix, so no head has a part of its own"
    return ""


def _plain_residual(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    """What the last block puts out with the model's own attention."""
    last: list[Tensor] = []

    def leave(block: nn.Module, args: object, output: Any) -> None:
        last.append((output if isinstance(output, Tensor) else output[0])[0].float())

    with native(model) as hf_model:
        handle = native_blocks(model)[-1].register_forward_hook(leave)
        try:
            hf_model(torch.tensor([list(ids)], device=device_of(model)), use_cache=False)
        finally:
            handle.remove()
    return last[0]
