"""The one file that knows TransformerLens' names.

mechlens asks for the interface that `TransformerBridge` (TransformerLens 3.9 and 4) and the older
`HookedTransformer` (up to 3.9) share. On a bridge it also runs the Hugging Face modules underneath, which are
faster and need no hook points; `native` puts them back for the length of a `with` block.
"""

import contextlib
import copy
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechlens.errors import UserError
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine.head import Form, head_logits, watched_pass
from mechlens.models.engine.probes import UNTRIED, apart, decode_gap, is_misfit, probe_logits, probe_tokens, tolerance
from mechlens.models.fingerprint import (
    config_fingerprint,
    sampled_fingerprint,
    settings_stamp,
    stamp,
    weight_fingerprint,
)
from mechlens.models.offline import sealed
from mechlens.models.soundness import overflow_advice, require_finite_logits, require_finite_weights, require_present
from mechlens.models.transformers_versions import cache_by_old_name, in_type_of

LanguageModel = Any
"""A TransformerBridge or a HookedTransformer; neither library types its members well enough to say more."""


@dataclass(frozen=True)
class Loaded:
    """What mechlens remembers about a model, kept on the model as `model.mechlens`."""

    checkpoint: Checkpoint
    tokenizer: Any
    """The tokenizer as it was loaded; TransformerLens reloads its own copy with other BOS settings."""
    attention: str
    """Attention implementation before bridging; TransformerLens switches to "eager"."""
    parity_gap: float
    """Largest |logit difference| to plain Hugging Face on one prompt; NaN if it wasn't measured."""
    weights: str
    """Stamp of the bridged weights at load, which tells whether they were edited since."""
    own_hooks: int = 0
    """Hooks that TransformerLens itself attached; any beyond these are the user's."""
    decode_gap: float = float("nan")
    """How far decoding with a cache on the bridged modules is from whole passes, as a share of the largest logit;
    NaN if it wasn't measured. What decodes takes another way where it is large (see `plain_engine`)."""
    head_gap: float = float("nan")
    """The same of `unembed` and the model's own logits."""
    settings: str = ""
    """Stamp of the modules' plain attributes at load, such as the epsilons of norms."""


def bridge(hf_model: nn.Module, tokenizer: Any, checkpoint: Checkpoint) -> LanguageModel:
    """A TransformerBridge on raw weights around a Hugging Face model, which it rewrites in place."""
    from transformer_lens.model_bridge import TransformerBridge

    config: Any = hf_model.config
    attention = config._attn_implementation
    ours = copy.deepcopy(tokenizer)
    if tokenizer is not None and "name_or_path" not in tokenizer.init_kwargs:
        # TransformerLens would reload it from this path; a tokenizer made in memory has none.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.init_kwargs |= {"name_or_path": checkpoint.path, "add_bos_token": True}
    hf_model.eval()
    require_known(config, checkpoint.name)
    require_present(hf_model, checkpoint.name)
    require_finite_weights(hf_model, checkpoint.name)
    checkpoint = replace(checkpoint, config=config_fingerprint(config))
    before = probe_logits(hf_model)
    try:
        # The name is only a label here, but TransformerLens takes a bare one for an alias of some hub model.
        label = checkpoint.path if "/" in checkpoint.path else f"local/{checkpoint.path}"
        with sealed():
            model = TransformerBridge.boot_transformers(label, hf_model=hf_model, tokenizer=tokenizer)
        model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
        _mend_attention(model)
        model.requires_grad_(False)
        after = probe_logits(model.original_model)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        reason = str(error).split(". ")[0]  # what follows may be a list of every architecture it knows
        raise _unwrappable(type(hf_model).__name__, checkpoint.name, reason) from error
    _warn_of(checkpoint.name, before, after, dtype_of(model))
    gap = float((after - before).abs().max())
    model.mechlens = Loaded(checkpoint, ours, attention, gap, weights_now(model), _count_hooks(model))
    gaps = {"decode_gap": decode_gap(model.original_model), "head_gap": _head(model).gap}
    model.mechlens = replace(model.mechlens, **gaps, settings=_settings_now(model))
    return model


def require_known(config: Any, name: str) -> None:
    """UserError where TransformerLens names no such architecture; a configuration is all that it takes.

    A name that it writes in other capitals (Phimoe, PhiMoE) is written as it does.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    named = list(config.architectures or [])
    if not named:  # told by the model's class once it is there
        return
    spelled = {known.lower(): known for known in SUPPORTED_ARCHITECTURES}
    config.architectures = [one if one in SUPPORTED_ARCHITECTURES else spelled.get(one.lower(), one) for one in named]
    try:
        determine_architecture_from_hf_config(config)
    except ValueError as error:
        raise _unwrappable(named[0], name, "it doesn't know this architecture") from error


def _unwrappable(architecture: str, name: str, reason: str) -> UserError:
    return UserError(
        f"TransformerLens can't wrap {architecture} ({name}): {reason} (version {version('transformer-lens')}); "
        "choose a model that it supports, or install another version"
    )


def _mend_attention(model: LanguageModel) -> None:
    """Lets bridged attention find the cached keys and values, and keeps it to the type of the weights."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    for module in model.modules():
        # One that hands its arguments on to Hugging Face's attention needs Hugging Face's name for them.
        if isinstance(module, AttentionBridge) and type(module).forward is not AttentionBridge.forward:
            module.register_forward_pre_hook(cache_by_old_name, with_kwargs=True)
            for point in (getattr(module, name, None) for name in ("hook_rot_q", "hook_rot_k")):
                if point is not None:
                    point.register_forward_hook(in_type_of(module))


def _warn_of(name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    """One warning for logits that mean nothing, or that TransformerLens' modules compute otherwise."""
    gap = apart(after, before)
    if not bool(torch.isfinite(before).all()):
        warnings.warn(f"the logits of {name} are not finite on a short prompt; {overflow_advice(dtype)}", stacklevel=3)
    elif dtype == torch.float32 and gap > tolerance(dtype):  # in half precision two attention kernels may differ so
        warnings.warn(
            f"{name} computes other logits inside TransformerLens than in plain Hugging Face (apart by {gap:.2g} of "
            "the largest), so what its hook points show is another model's",
            stacklevel=3,
        )


def loaded(model: LanguageModel) -> Loaded:
    """What is known about a model; for one that mechlens didn't load, it is worked out once and kept."""
    known = getattr(model, "mechlens", None)
    if isinstance(known, Loaded):
        return known
    name = str(getattr(model.cfg, "model_name", None) or "unnamed")
    checkpoint = _named_as_it_is(Checkpoint(name.split("/")[-1], name), model)
    if is_bridge(model):
        _mend_attention(model)
    found = Loaded(
        checkpoint, model.tokenizer, "eager", float("nan"), weights_now(model), settings=_settings_now(model)
    )
    model.mechlens = found
    return found


_EDITED: "weakref.WeakKeyDictionary[Any, tuple[str, Checkpoint]]" = weakref.WeakKeyDictionary()


def checkpoint_now(model: LanguageModel) -> Checkpoint:
    """The checkpoint as it is now: weights edited or folded since loading have another fingerprint and regime, and
    edited attributes of modules another configuration."""
    known = loaded(model)
    now, settings = weights_now(model), _settings_now(model)
    config = known.checkpoint.config if settings == known.settings else f"{known.checkpoint.config} with {settings}"
    if now == known.weights:
        return replace(known.checkpoint, regime=regime(model), config=config)
    if _EDITED.get(model, ("", None))[0] != now:
        _EDITED[model] = now, _named_as_it_is(known.checkpoint, model)
    edited = _EDITED[model][1]
    return replace(
        known.checkpoint, regime=regime(model), config=config, fingerprint=edited.fingerprint, sampled=edited.sampled
    )


def _named_as_it_is(checkpoint: Checkpoint, model: LanguageModel) -> Checkpoint:
    """The checkpoint with the fingerprint and regime of a model that may have been edited."""
    parameters = dict((model.original_model if is_bridge(model) else model).named_parameters())
    return replace(
        checkpoint,
        regime=regime(model),
        fingerprint=weight_fingerprint(_weights(model)),
        sampled=sampled_fingerprint(parameters),
    )


def weights_now(model: LanguageModel) -> str:
    """Stamp of the bridged weights as they are now: equal to an earlier one only if nothing was edited between."""
    return stamp(_weights(model))


def _settings_now(model: LanguageModel) -> str:
    return settings_stamp(model.original_model if is_bridge(model) else model)


def _is_fixed_table(module: nn.Module, name: str) -> bool:
    """A rotary table that no pass changes; LongRoPE's and dynamic NTK's change with the number of tokens."""
    return name.endswith("inv_freq") and getattr(module, "rope_type", "") in ("default", "linear", "llama3", "yarn")


def _weights(model: LanguageModel) -> dict[str, Tensor]:
    """Every parameter, every buffer that a checkpoint would hold, such as packed integers, and rotary tables."""
    whole = model.original_model if is_bridge(model) else model
    buffers = {
        f"{place}.{name}": buffer
        for place, module in whole.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and (name not in module._non_persistent_buffers_set or _is_fixed_table(module, name))
    }
    return {**dict(whole.named_parameters()), **buffers}


def regime(model: LanguageModel) -> str:
    """ "processed" where TransformerLens has folded or centred the weights, else "raw".

    A HookedTransformer tells only of folded LayerNorms; centring alone leaves no trace.
    """
    if is_bridge(model):
        return "processed" if model._weights_processed else "raw"
    return "processed" if str(model.cfg.normalization_type).endswith("Pre") else "raw"


def is_bridge(model: LanguageModel) -> bool:
    """True for a TransformerBridge, which has a Hugging Face model underneath."""
    return hasattr(model, "original_model")


def whole(model: LanguageModel) -> dict[str, bool]:
    """Argument of a bridge's pass for one that is never continued: some models' own cache can't even be begun."""
    return {"use_cache": False} if is_bridge(model) else {}


def n_layers(model: LanguageModel) -> int:
    """Number of blocks L; residual levels run from 0 to L."""
    return int(model.cfg.n_layers)


def d_model(model: LanguageModel) -> int:
    """Width of the residual stream."""
    return int(model.cfg.d_model)


def context_length(model: LanguageModel) -> int:
    """Most tokens the model takes; very large where the config doesn't say."""
    return int(getattr(model.cfg, "n_ctx", None) or 1 << 30)


def embedding_rows(model: LanguageModel) -> int:
    """Token ids that the model knows: 0 to one below this."""
    weight = model.original_model.get_input_embeddings().weight if is_bridge(model) else model.W_E
    return int(weight.shape[0])


def device_of(model: LanguageModel) -> torch.device:
    """Where token ids go: the device of the embedding."""
    first = model.original_model.get_input_embeddings() if is_bridge(model) else model
    device: torch.device = next(iter(first.parameters())).device
    return device


def dtype_of(model: LanguageModel) -> torch.dtype:
    """Floating-point type of the weights."""
    dtype: torch.dtype = next(iter(model.parameters())).dtype
    return dtype


def level_hook(model: LanguageModel, level: int) -> str:
    """Hook name of a residual level: `resid_pre` of block `level`, or the last block's `resid_post`."""
    last = n_layers(model) - 1
    return f"blocks.{level}.hook_resid_pre" if level <= last else f"blocks.{last}.hook_resid_post"


SITES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
}
"""Sites that can be edited, with TransformerLens' names for them inside a block."""


def site_hook(site: str, layer: int) -> str:
    """Hook name of an editable site."""
    return f"blocks.{layer}.{SITES[site]}"


def n_heads(model: LanguageModel, site: str) -> int:
    """Heads at a site: key and value heads are fewer under grouped-query attention; 0 where there are none."""
    if site in ("k", "v"):
        return int(getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads)
    return int(model.cfg.n_heads) if site in ("q", "z", "pattern") else 0


def has_hooks(model: LanguageModel) -> bool:
    """True if the user has attached hooks, which only the bridged modules fire."""
    return _count_hooks(model) != loaded(model).own_hooks


def _count_hooks(model: LanguageModel) -> int:
    """Forward hooks on any module, TransformerLens' or PyTorch's, apart from what the libraries wire up themselves."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    wiring = ("transformer_lens.model_bridge", "transformers.", cache_by_old_name.__module__)
    return sum(not str(getattr(hook, "__module__", "")).startswith(wiring) for hook in hooks)


@contextlib.contextmanager
def native(model: LanguageModel) -> Iterator[nn.Module]:
    """The plain Hugging Face model under a bridge, with its own attention kernel; the bridge returns on exit."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    swaps: list[tuple[nn.Module, str, nn.Module]] = []

    def visit(module: nn.Module) -> None:
        for name, child in list(module._modules.items()):
            original = child
            while isinstance(original, GeneralizedComponent) and original.original_component is not None:
                original = original.original_component
            if original is None:
                continue
            if original is not child and child is not None:
                swaps.append((module, name, child))
                module._modules[name] = original
            visit(original)

    hf_model = model.original_model
    bridged_attention = hf_model.config._attn_implementation
    try:
        visit(hf_model)
        hf_model.config._attn_implementation = loaded(model).attention
        yield hf_model
    finally:
        hf_model.config._attn_implementation = bridged_attention
        for module, name, child in swaps:
            module._modules[name] = child


def native_blocks(model: LanguageModel) -> list[nn.Module]:
    """The Hugging Face decoder layers, for hooks inside a `native` block."""
    # `model.blocks` is Hugging Face's own list, so `native` has put the plain layers back into it.
    return list(model.blocks)


def native_tap(model: LanguageModel, site: str, layer: int) -> nn.Module | None:
    """The plain Hugging Face module whose input is the site's value: the block, or for `z` the output projection.

    None where no module takes it as it is. A guess that has to be checked on the model; ask outside `native`.
    """
    found = model.blocks[layer] if site == "resid_pre" else None
    if site == "z":
        found = getattr(getattr(model.blocks[layer], "attn", None), "o", None)
    plain: nn.Module | None = _plain(found)
    return plain


@dataclass(frozen=True)
class _Head:
    """What is needed to run a bridge's own head alone, and how far that is `apart` from its logits."""

    forms: list[Form]
    gap: float


_HEADS: "weakref.WeakKeyDictionary[nn.Module, _Head]" = weakref.WeakKeyDictionary()


@torch.inference_mode()
def _head(model: LanguageModel) -> _Head:
    if model not in _HEADS:
        # On the plain modules, where no hook of the user's is called for a prompt that nobody asked for.
        with native(model) as hf_model:
            _HEADS[model] = _tried_head(hf_model, model.blocks)
    return _HEADS[model]


def _tried_head(hf_model: nn.Module, blocks: nn.ModuleList) -> _Head:
    try:
        forms, residual, logits = watched_pass(hf_model, blocks, probe_tokens(hf_model, 7))
        return _Head(forms, apart(head_logits(hf_model, blocks, forms, residual), logits))
    except UNTRIED as error:
        if not is_misfit(error):
            raise
        return _Head([], float("inf"))


def _own_logits(model: LanguageModel, residual: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    head = _head(model)
    logits = head_logits(model.original_model, model.blocks, head.forms, residual) if head.forms else None
    if logits is not None:
        require_finite_logits(logits)
    if logits is None or head.gap > tolerance(dtype_of(model)):
        raise UserError(
            f"the logits of {type(model.original_model).__name__} can't be worked out from its last residual "
            f"(apart from its own by {head.gap:.2g} of the largest), so neither can losses or log-odds"
        )
    return logits


@torch.inference_mode()
def unembed(model: LanguageModel, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """Logits of level-L residuals: final norm, unembedding and whatever scales or caps them (float32, on the CPU).

    UserError where they are not the model's own logits, or not finite.
    """
    x = residual.to(device_of(model), dtype_of(model)).reshape(-1, residual.shape[-1])
    if is_bridge(model):
        logits = _own_logits(model, x).float()
    else:
        norm = getattr(model, "ln_final", None)  # a HookedTransformer may have none
        logits = model.unembed(x[None] if norm is None else norm(x[None])).float()
        cap = getattr(model.cfg, "output_logits_soft_cap", -1.0) or -1.0
        logits = cap * torch.tanh(logits / cap) if cap > 0 else logits
        require_finite_logits(logits)
    out: Tensor = logits.reshape(*residual.shape[:-1], -1).cpu()
    return out


@torch.inference_mode()
def token_embeddings(model: LanguageModel, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    """Rows of the embedding matrix, without positions or scaling (float32, on the CPU)."""
    weight = model.original_model.get_input_embeddings().weight if is_bridge(model) else model.W_E
    rows: Tensor = weight[ids.to(weight.device)]
    return rows.float().cpu()


@torch.no_grad()
def refresh_splits(model: LanguageModel) -> None:
    """Takes TransformerLens' copies of joint matrices (query-key-value, gate-up) again, after these were changed."""
    splits = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}
    joint = [(part, name) for part in model.modules() for name in splits if callable(getattr(part, name, None))]
    with native(model):
        for part, name in joint:
            fresh = getattr(part, name)(part.original_component)
            for own, linear in zip(splits[name], fresh, strict=True):
                _overwrite(getattr(part, own).original_component, linear)


def _overwrite(old: nn.Module, new: nn.Module) -> None:
    for name, value in new.named_parameters():
        old.get_parameter(name).copy_(value)


def writing_modules(model: LanguageModel) -> list[nn.Module]:
    """The plain modules whose output is added to the residual stream: of each block the attention's and the MLP's."""
    parts = [getattr(getattr(block, part, None), out, None) for block in model.blocks for part, out in _OUTPUTS]
    return [_plain(part) for part in parts if part is not None]


_OUTPUTS = (("attn", "o"), ("mlp", "out"))


def _plain(component: Any) -> Any:
    while getattr(component, "original_component", None) is not None:
        component = component.original_component
    return component
