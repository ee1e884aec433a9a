"""Merging a PEFT adapter of any kind that can be merged into the weights of a plain Hugging Face model.

peft makes the adapted model and merges it. What peft leaves to its caller is done here: matrices that two modules
share get their own copies where the adapter changes one of them, each layer is merged in float32, and the merged
model must give the adapted model's logits.
"""

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mechlens import hub
from mechlens.errors import UserError
from mechlens.files import nearest_folder, require_regular, user_path
from mechlens.models.checkpoint import is_fingerprint_of
from mechlens.models.checkpoints.adapter_record import read_record, require_whole
from mechlens.models.checkpoints.folders import CONFIG, adapters_inside, other_format
from mechlens.models.checkpoints.lora import WEIGHTS, keeps_the_base
from mechlens.models.device_map import require_in_memory
from mechlens.models.offline import at_home
from mechlens.models.packaged import ADAPTERS
from mechlens.models.precision import round_weights
from mechlens.registry import nearest

TOLERANCE, IN_HALF = 1e-3, 0.1
"""Differences of logits, or of what a layer gives in 16 bits, in units of the largest, that rounding can make."""

FEW = 8
"""Tokens on which single layers are compared."""


def merge_adapter(hf_model: Any, adapter: str, dtype: str | None = None) -> Any:
    """The model with a PEFT adapter (folder or hub id) merged into its weights, in `dtype` or the type they have.

    Every layer is computed in float32 and rounded once, before the next one is. UserError for an adapter that was made
    for another base, that peft can't merge, or whose merged model answers otherwise than the adapted one.
    """
    folder = user_path(adapter)
    require_in_memory(hf_model, "no adapter can be merged into it")
    _require_base(folder, adapter, hf_model)
    name, own = str(hf_model.config.name_or_path), hf_model.dtype
    wanted = getattr(torch, dtype) if dtype else own
    # In half precision a whole model's logits may be all rounding, and single layers are compared.
    whole = own == wanted == torch.float32
    adapted = _adapted(hf_model, str(folder) if folder.exists() else adapter, adapter, name)
    tokens = _probe(hf_model, adapted.active_peft_config)
    try:
        before, calls = (_logits(adapted, tokens), {}) if whole else (None, _calls(adapted, tokens))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says that layers are merged already, and that ends came apart
            _untie(adapted)
            apart = _merge_layers(adapted, own, wanted, calls)
            merged = adapted.merge_and_unload()
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(
            f"the adapter {adapter!r} ({_kind(adapted)}) can't be merged into {name!r}: {first_line(error)}"
        ) from error
    ends = (merged.get_input_embeddings(), merged.get_output_embeddings())
    if len({id(getattr(end, "weight", None)) for end in ends}) > 1:
        merged.config.tie_word_embeddings = False
    if wanted != own:
        round_weights(merged, wanted)
    if before is not None:
        apart = _apart(before, _logits(merged, tokens))
    if not apart <= (TOLERANCE if own == torch.float32 else IN_HALF):
        raise UserError(
            f"the adapter {adapter!r} ({_kind(adapted)}) gives other logits once it is merged (by {apart:.2g} of the "
            "largest), so peft can't merge it as it is; merge it yourself and give the merged model"
        )
    return merged


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # what it is about comes behind
        lines[0] = f"{lines[0]} {lines[1]}"
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def is_path(name: str) -> bool:
    """True for what can only be a local path, because no hub id looks like it."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def require_adapter(adapter: str) -> None:
    """UserError, before any weights are read, where a folder holds no adapter that can be merged."""
    folder = user_path(adapter)
    if not (folder / CONFIG).exists() and (folder.exists() or is_path(adapter)):
        inside = ", ".join(repr(str(path)) for path in adapters_inside(folder))
        raise UserError(f"there is no adapter in {adapter!r}; give {inside or f'the folder that holds {CONFIG}'}")
    if folder.is_dir() and not list(folder.glob("*.safetensors")) and (found := other_format(folder)):
        raise UserError(f"the adapter {adapter!r} can't be loaded: {found}")
    for path in folder.glob("adapter_*"):
        require_regular(path)
    if not folder.exists():
        _require_on_hub(adapter)


def _require_on_hub(adapter: str) -> None:
    from huggingface_hub import hf_hub_download

    try:
        with hub.asked():
            hf_hub_download(adapter, CONFIG)
    except (OSError, ValueError) as error:  # the client's own errors are among these
        why = hub.why_not() or first_line(error)
        near = nearest(adapter, list(ADAPTERS))
        named = f" ({near}, which goes to --model as it is)" if near else ""
        here = nearest_folder(adapter)
        raise UserError(
            f"the adapter {adapter!r} is neither a local folder{f' ({here})' if here else ''} nor to be had from the "
            f"hub{named}: {why}"
        ) from error


def _require_base(folder: Path, adapter: str, hf_model: Any) -> None:
    require_adapter(adapter)
    base = _recorded_base(folder)
    if base is not None and not is_fingerprint_of(base, hf_model.state_dict()):
        raise UserError(
            f"the adapter {adapter!r} was trained on another base (fingerprint {base[:12]}); "
            "load the model that its mechlens.json names"
        )


def _recorded_base(folder: Path) -> str | None:
    """Fingerprint of the base that mechlens trained an adapter on; None for an adapter from elsewhere."""
    try:
        record = read_record(folder)
    except UserError as error:
        raise UserError(f"the record names no base_fingerprint that can be trusted: {error}") from error
    if record is None:
        return None
    require_whole(folder, record, WEIGHTS)
    return record.base_fingerprint


def _adapted(hf_model: Any, source: str, adapter: str, name: str) -> Any:
    """peft's model; UserError where the adapter can't be read, is of a kind without weights, or has no place."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    config = None
    try:
        with at_home(source):
            config = PeftConfig.from_pretrained(source)
        if config.is_prompt_learning or config.peft_type.value == "ADAPTION_PROMPT":
            raise UserError(
                f"the adapter {adapter!r} is of type {config.peft_type.value}, which adds prompts of its own and leaves"
                " the weights as they are, so it can't be merged; give an adapter of the model's weights, such as LoRA"
            )
        with torch.random.fork_rng():
            torch.manual_seed(0)  # some (PiSSA with `niter`) draw while they load, and must come out the same again
            with at_home(source), warnings.catch_warnings():
                # peft's own reading of an attribute that transformers has renamed
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                adapted = PeftModel.from_pretrained(hf_model, source).eval()
                saved = set(load_peft_weights(source, device="cpu"))
        used = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except UserError:
        raise
    except (
        OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, AssertionError, SafetensorError
    ) as error:  # fmt: skip
        raise UserError(
            f"the adapter {adapter!r} doesn't fit the model {name!r}: {first_line(error)}{_needs(config)}"
        ) from error
    # peft only warns, and would leave out what has no place; embeddings may be saved whole beside an adapter.
    odd = (used - saved) | (saved - used - set(adapted.state_dict()))
    if odd:
        raise UserError(
            f"the adapter {adapter!r} doesn't fit the model {name!r}: {len(odd)} of its weights and the "
            f"model's have no counterpart, such as {min(odd)}"
        )
    return adapted


def _needs(config: Any) -> str:
    """What to do about an adapter that peft has to change the base for, and can't."""
    start = getattr(config, "init_lora_weights", None)
    if keeps_the_base({"init_lora_weights": start}):
        return ""
    return (
        f" (with init_lora_weights={start!r} the base's own weights are changed as well, from what the adapter doesn't "
        "hold; save it with path_initial_model_for_weight_conversion, or give the merged model)"
    )


def _kind(adapted: Any) -> str:
    return str(adapted.active_peft_config.peft_type.value)


def _probe(hf_model: Any, config: Any) -> Tensor:
    """A few tokens, among them those that the adapter has trained."""
    chosen = getattr(config, "trainable_token_indices", None) or []
    trained = sorted({i for part in (chosen.values() if isinstance(chosen, dict) else [chosen]) for i in part})
    weight = hf_model.get_input_embeddings().weight
    return torch.tensor([[*range(1, 17), *trained[:48]]], device=weight.device).remainder(len(weight))


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float().cpu()


def _untie(adapted: Any) -> None:
    """Gives each layer that the adapter changes weights of its own (tied ends, replicated blocks)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    changed = {id(layer.get_base_layer()) for layer in adapted.modules() if isinstance(layer, BaseTunerLayer)}
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in adapted.modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders[id(parameter)].append((module, name))
    for sharing in holders.values():
        apart = [(module, name) for module, name in sharing if id(module) in changed]
        for module, name in apart[len(apart) == len(sharing) :]:
            own = nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False)
            setattr(module, name, own)


@torch.inference_mode()
def _calls(adapted: Any, tokens: Tensor) -> dict[nn.Module, tuple[Any, Any, Any]]:
    """What each adapted layer was given and gave in one pass over some of the tokens."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[nn.Module, tuple[Any, Any, Any]] = {}
    layers = [layer for layer in adapted.modules() if isinstance(layer, BaseTunerLayer)]
    handles = [
        layer.register_forward_hook(lambda part, args, kwargs, out: found.update({part: (args, kwargs, out)}),
                                    with_kwargs=True)
        for layer in layers
    ]  # fmt: skip
    try:
        adapted(input_ids=tokens[:, -FEW:], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _merge_layers(
    adapted: Any, own: torch.dtype, wanted: torch.dtype, calls: dict[nn.Module, tuple[Any, Any, Any]]
) -> float:
    """Each layer in float32, and what was in the model's own type in the one that is wanted before the next layer.

    How far the merged layers, before they are rounded, are from what the adapted ones gave.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuners = defaultdict(list)
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            tuners[layer.get_base_layer()].append(layer)
    # Room for every result first: what is only used meanwhile would leave holes between them.
    rooms = {base: _room(base, own, wanted) for base in tuners}
    worst = 0.0
    for base, layers in tuners.items():
        for parameter in base.parameters(recurse=False):
            half = parameter.dtype in (torch.float16, torch.bfloat16)
            # A copy, as nothing that is written to a matrix in its file is let go while the file is open.
            parameter.data = parameter.data.to(torch.float32 if half else parameter.dtype, copy=True)
        for layer in layers:
            layer.merge()
        if layers[0] in calls:  # the outermost, where several change one module
            args, kwargs, right = tree_map_only(Tensor, _wide, calls.pop(layers[0]))
            worst = max(worst, _apart(right, layers[0](*args, **kwargs)))
        for name, result in rooms.pop(base).items():
            parameter = getattr(base, name)
            parameter.data = result.copy_(parameter.data)
    return worst


def _room(base: nn.Module, own: torch.dtype, wanted: torch.dtype) -> dict[str, Tensor]:
    """Where a module's merged parameters go: in their place, if they are in half precision and stay what they are."""
    kept = own == wanted != torch.float32
    return {
        name: parameter.data if kept else torch.empty_like(parameter, dtype=_wanted(parameter, own, wanted))
        for name, parameter in base.named_parameters(recurse=False)
    }


def _wanted(data: Tensor, own: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """What was in the model's own type comes into the one that is wanted; anything else stays what it is."""
    return wanted if data.dtype == own else data.dtype


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _apart(right: Tensor, found: Tensor) -> float:
    """Largest difference in units of the largest number; 0 where those aren't finite, which is for others to say."""
    if not bool(torch.isfinite(right).all()):
        return 0.0
    return float((found - right).abs().max() / right.abs().max().clamp(min=1e-6))
