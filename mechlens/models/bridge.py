"""A model as mechlens asks for it: what `TransformerBridge` (TransformerLens 3.9 and 4) and the older
`HookedTransformer` (up to 3.9) share. On a bridge the Hugging Face modules underneath are run too (see `native`).
"""

import copy
import html
import os
import weakref
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechlens.errors import UserError, warn
from mechlens.models.checkpoint import (
    Checkpoint,
    config_fingerprint,
    is_packed,
    sampled_fingerprint,
    settings_stamp,
    stamp,
    weight_fingerprint,
    weights_of,
)
from mechlens.models.device_map import as_they_lie, fetch_by_block, require_fetched, weight_of, where_run
from mechlens.models.engine.caches import cache_by_old_name, mend_attention
from mechlens.models.engine.head import head_gap, own_logits
from mechlens.models.engine.probes import (
    apart,
    decode_gap,
    overflow_advice,
    parity,
    probe,
    require_finite_logits,
    require_finite_weights,
    require_present,
    tolerance,
)
from mechlens.models.native import native, plain_module
from mechlens.models.offline import sealed
from mechlens.models.precision import Parity
from mechlens.models.quantise import quantisation

LanguageModel = Any
"""A TransformerBridge or a HookedTransformer; neither library types its members well enough to say more."""


@dataclass(frozen=True, repr=False)
class Loaded:
    """What mechlens remembers about a model, kept on the model as `model.mechlens`."""

    checkpoint: Checkpoint
    tokenizer: Any
    """The tokenizer as it was loaded; TransformerLens reloads its own copy with other BOS settings."""
    attention: str
    """Attention implementation before bridging; TransformerLens switches to "eager"."""
    parity: Parity | None
    """How far it is from plain Hugging Face in the same type; None if that wasn't measured."""
    weights: str
    """Stamp of the bridged weights at load, which tells whether they were edited since."""
    own_hooks: int = 0
    """Hooks that TransformerLens itself attached; any beyond these are the user's."""
    decode_gap: float = float("nan")
    """How far decoding with a cache on the bridged modules is from whole passes, as a share of the largest logit;
    NaN if it wasn't measured. What decodes takes another way where it is large (see `reference_engine`)."""
    head_gap: float = float("nan")
    """The same of `unembed` and the model's own logits."""
    settings: str = ""
    """Stamp of the modules' plain attributes at load, such as the epsilons of norms."""

    def __repr__(self) -> str:
        gap = "not compared with" if self.parity is None else f"logits within {self.parity_gap:.1g} of"
        return (
            f"Loaded({self.checkpoint.name}, {self.checkpoint.regime} weights; {type(self.tokenizer).__name__}; "
            f"{self.attention} attention; {gap} plain Hugging Face)"
        )

    @property
    def parity_gap(self) -> float:
        """Largest |logit difference| to plain Hugging Face on one prompt; NaN if it wasn't measured."""
        return self.parity.logits if self.parity else float("nan")


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
    checkpoint = replace(
        checkpoint, config=config_fingerprint(config), regime=quantisation(config) or "raw", dtype=_type_name(hf_model)
    )
    fetch_by_block(hf_model)
    require_fetched(hf_model, lambda: probe(hf_model))
    before = probe(hf_model)
    try:
        # The name is only a label here, but TransformerLens takes a bare one for an alias of some hub model.
        label = checkpoint.path if "/" in checkpoint.path else f"local/{checkpoint.path}"
        with sealed():
            model = TransformerBridge.boot_transformers(label, hf_model=hf_model, tokenizer=tokenizer)
        model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
        if not hasattr(model, "blocks"):
            raise ValueError("its blocks are no single list")
        if any(residual.ndim > 3 for residual in before.residuals):  # several streams in a block's output (Gemma 3n)
            raise ValueError("its blocks have no single residual stream")
        if "blocks.0.hook_resid_pre" not in model.hook_dict:
            raise ValueError("its blocks have no single residual stream")
        mend_attention(model)
        fetch_by_block(hf_model)
        model.requires_grad_(False)
        require_fetched(hf_model, lambda: probe(hf_model))
        with native(model):
            require_fetched(hf_model, lambda: probe(hf_model))
        after = probe(model.original_model)
    except (torch.OutOfMemoryError, UserError):
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        if checkpoint.regime != "raw":
            raise UserError(
                f"TransformerLens takes matrices of {type(hf_model).__name__} ({checkpoint.name}) apart, and "
                f"{checkpoint.regime} ones can't be; give --dtype bfloat16 and a model that isn't quantised"
            ) from error
        reason = str(error).split(". ")[0]  # what follows may be a list of every architecture it knows
        raise _unwrappable(type(hf_model).__name__, checkpoint.name, reason) from error
    _warn_of(checkpoint.name, before.logits, after.logits, dtype_of(model))
    gap = parity(before, after, dtype_of(model))
    model.mechlens = Loaded(checkpoint, ours, attention, gap, weights_now(model), _count_hooks(model))
    gaps = {"decode_gap": decode_gap(model.original_model), "head_gap": head_gap(model)}
    model.mechlens = replace(model.mechlens, **gaps, settings=_settings_now(model))
    # On the instance, as TransformerLens looks into its own class; words only, as a reference to the model would be a
    # circle, in which a large model outlives its last name.
    model._repr_mimebundle_ = partial(_shown, _described(model))
    return model


def _described(model: LanguageModel) -> str:
    """Which model this is as it was loaded, and how to go on."""
    parameters = sum(weight.numel() for weight in _whole(model).parameters())
    return "\n  ".join([
        f"{type(model).__name__} of {type(_whole(model)).__name__}: {n_layers(model)} blocks, residual stream "
        f"{d_model(model)} wide, {parameters:,} parameters, loaded in {_type_name(model)}",
        repr(loaded(model)),
        "print(model) names its components, model.hook_dict its hooks",
    ])  # fmt: skip


def _shown(told: str, *_: Any, **__: Any) -> dict[str, str]:
    """What a notebook shows of a model, in place of every module by name."""
    return {"text/plain": told, "text/html": f"<pre style='white-space: pre-wrap'>{html.escape(told)}</pre>"}


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


def _warn_of(name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    """One warning for logits that mean nothing, or that TransformerLens' modules compute otherwise."""
    gap = apart(after, before)
    if not bool(torch.isfinite(before).all()):
        warn(f"the logits of {name} are not finite on a short prompt; {overflow_advice(dtype)}")
    elif dtype == torch.float32 and gap > tolerance(dtype):  # in half precision two attention kernels may differ so
        warn(
            f"{name} computes other logits inside TransformerLens than in plain Hugging Face (apart by {gap:.2g} of "
            "the largest), so what its hook points show is another model's",
        )


def loaded(model: LanguageModel) -> Loaded:
    """What is known about a model; for one that mechlens didn't load, it is worked out once and kept."""
    known = getattr(model, "mechlens", None)
    if isinstance(known, Loaded):
        return known
    name = str(getattr(_cfg(model), "model_name", None) or "unnamed")
    checkpoint = _named_as_it_is(Checkpoint(name.split("/")[-1], name), model)
    if is_bridge(model):
        mend_attention(model)
    found = Loaded(checkpoint, model.tokenizer, "eager", None, weights_now(model), settings=_settings_now(model))
    model.mechlens = found
    return found


def _cfg(model: LanguageModel) -> Any:
    """TransformerLens' configuration of a model; UserError where something else was given, such as a model's name."""
    if isinstance(model, str | os.PathLike):
        raise UserError(f"the model was given by name; load it first: model = ml.load({os.fspath(model)!r})")
    if not hasattr(model, "cfg"):
        raise UserError(f"what was given as the model is of type {type(model).__name__}; give what ml.load returns")
    return model.cfg


_EDITED: "weakref.WeakKeyDictionary[Any, tuple[str, Checkpoint]]" = weakref.WeakKeyDictionary()


def checkpoint_now(model: LanguageModel) -> Checkpoint:
    """The checkpoint as it is now: weights edited or folded since loading have another fingerprint and regime, and
    edited attributes of modules another configuration. UserError in training mode, where dropout is random."""
    if is_bridge(model) and model.original_model.training:
        raise UserError("the model is in training mode, where dropout makes its numbers random; call model.eval()")
    known = loaded(model)
    now, settings = weights_now(model), _settings_now(model)
    config = known.checkpoint.config if settings == known.settings else f"{known.checkpoint.config} with {settings}"
    if now == known.weights:
        return replace(known.checkpoint, regime=regime(model), config=config, dtype=_type_name(model))
    if _EDITED.get(model, ("", None))[0] != now:
        _EDITED[model] = now, _named_as_it_is(known.checkpoint, model)
    edited = _EDITED[model][1]
    return replace(
        known.checkpoint, regime=regime(model), config=config, fingerprint=edited.fingerprint, sampled=edited.sampled,
        dtype=_type_name(model),
    )  # fmt: skip


def _named_as_it_is(checkpoint: Checkpoint, model: LanguageModel) -> Checkpoint:
    """The checkpoint with the fingerprint and regime of a model that may have been edited."""
    parameters = dict(_whole(model).named_parameters())
    return replace(
        checkpoint,
        regime=regime(model),
        fingerprint=weight_fingerprint(_weights(model)),
        sampled=sampled_fingerprint(as_they_lie(parameters, _whole(model))),
        dtype=_type_name(model),
    )


def weights_now(model: LanguageModel) -> str:
    """Stamp of the bridged weights as they are now: equal to an earlier one only if nothing was edited between."""
    return stamp(_weights(model))


def _weights(model: LanguageModel) -> dict[str, Any]:
    return as_they_lie(weights_of(_whole(model)), _whole(model))


def _whole(model: LanguageModel) -> Any:
    return model.original_model if is_bridge(model) else model


def _settings_now(model: LanguageModel) -> str:
    return settings_stamp(_whole(model))


def regime(model: LanguageModel) -> str:
    """ "processed" where TransformerLens has folded or centred the weights, else how they are quantised, or "raw".

    A HookedTransformer tells only of folded LayerNorms; centring alone leaves no trace.
    """
    if is_bridge(model):
        return "processed" if model._weights_processed else quantisation(model.original_model.config) or "raw"
    return "processed" if str(model.cfg.normalization_type).endswith("Pre") else "raw"


def is_bridge(model: LanguageModel) -> bool:
    """True for a TransformerBridge, which has a Hugging Face model underneath."""
    return hasattr(model, "original_model")


def whole(model: LanguageModel) -> dict[str, bool]:
    """Argument of a bridge's pass for one that is never continued: some models' own cache can't even be begun."""
    return {"use_cache": False} if is_bridge(model) else {}


def n_layers(model: LanguageModel) -> int:
    """Number of blocks L; residual levels run from 0 to L."""
    return int(_cfg(model).n_layers)


def d_model(model: LanguageModel) -> int:
    """Width of the residual stream."""
    return int(_cfg(model).d_model)


def context_length(model: LanguageModel) -> int:
    """Most tokens the model takes; very large where the config doesn't say."""
    return int(getattr(_cfg(model), "n_ctx", None) or 1 << 30)


def embedding_rows(model: LanguageModel) -> int:
    """Token ids that the model knows: 0 to one below this."""
    weight = model.original_model.get_input_embeddings().weight if is_bridge(model) else model.W_E
    return int(weight.shape[0])


def device_of(model: LanguageModel) -> torch.device:
    """Where token ids go: the device of the embedding."""
    return where_run(model.original_model.get_input_embeddings() if is_bridge(model) else model)


def dtype_of(model: LanguageModel) -> torch.dtype:
    """Floating-point type of the residual stream: that of the embedding, else of the first weight that isn't packed."""
    return _first_type(model.original_model.get_input_embeddings() if is_bridge(model) else model, model)


def _first_type(*parts: nn.Module) -> torch.dtype:
    weights = (weight for part in parts for weight in part.parameters())
    dtype: torch.dtype = next(weight.dtype for weight in weights if not is_packed(weight))
    return dtype


def _type_name(model: Any) -> str:
    """Of a bridged model or a plain one."""
    dtype = dtype_of(model) if is_bridge(model) else _first_type(model)
    return str(dtype).removeprefix("torch.")


def has_hooks(model: LanguageModel) -> bool:
    """True if the user has attached hooks, which only the bridged modules fire."""
    return _count_hooks(model) != loaded(model).own_hooks


def _count_hooks(model: LanguageModel) -> int:
    """Forward hooks on any module, TransformerLens' or PyTorch's, apart from what the libraries wire up themselves."""
    tables = [table for m in model.modules() for table in (m._forward_hooks, m._forward_pre_hooks) if table]
    hooks = [hook for table in tables for hook in table.values()]
    wiring = ("transformer_lens.model_bridge", "transformers.", cache_by_old_name.__module__)
    return sum(not str(getattr(hook, "__module__", "")).startswith(wiring) for hook in hooks)


@torch.inference_mode()
def unembed(model: LanguageModel, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """Logits of level-L residuals: final norm, unembedding and whatever scales or caps them (float32, on the CPU).

    UserError where they are not the model's own logits, or not finite.
    """
    x = residual.to(device_of(model), dtype_of(model)).reshape(-1, residual.shape[-1])
    if is_bridge(model):
        logits = own_logits(model, x).float()
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
    embedding = plain_module(model.original_model.get_input_embeddings()) if is_bridge(model) else None
    weight = model.W_E if embedding is None else weight_of(embedding)
    rows: Tensor = weight[ids.to(weight.device)]
    return rows.float().cpu()
