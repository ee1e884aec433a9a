"""Loading: any causal language model by hub id, folder, GGUF file or packaged name, with an adapter if asked."""

import json
import struct
from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel, bridge
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.registry import ADAPTERS, PACKAGED, adapter_folder, fetch
from mechlens.models.soundness import require_present

DTYPES = ("float32", "bfloat16", "float16")


def load(
    model: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    device_map: str | None = None,
) -> LanguageModel:
    """A TransformerBridge on raw weights, with HookedTransformer's hook names.

    `model` is a packaged name ("smollm2", "smollm2-refuser"), a hub id, a local folder or a GGUF file; `adapter`
    a PEFT adapter for it, which is merged in. Logits on one prompt are compared with plain Hugging Face and the gap
    is kept in `model.mechlens.parity_gap`. `device_map` is handed to transformers; it is untested here (no machine with
    several devices). No code from the hub is run. Raises UserError, in one sentence, for whatever can't be loaded.
    """
    if dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    first = "float32" if adapter is not None else dtype
    hf_model, tokenizer = load_hf(model, revision=revision, dtype=first, device_map=device_map)
    base = ADAPTERS[model].base if _is_adapter(model) else None
    if adapter is not None:
        base = short_name(model)
        hf_model = _round(merge_adapter(hf_model, adapter), dtype)
    if device is not None:
        hf_model = _moved(hf_model, device)
    checkpoint = Checkpoint(
        name=short_name(adapter) if adapter else short_name(model),
        path=model,
        revision=revision,
        adapter=adapter,
        base=base,
        fingerprint=weight_fingerprint(hf_model.state_dict()),
    )
    return bridge(hf_model, tokenizer, checkpoint)


def short_name(path: str) -> str:
    """The last part of a path or hub id, for tables and figures."""
    return path.rstrip("/").split("/")[-1]


def load_hf(
    model: str, *, revision: str | None = None, dtype: str = "float32", device_map: str | None = None
) -> tuple[Any, Any]:
    """The plain Hugging Face model and its tokenizer."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if _is_adapter(model):
        hf_model, tokenizer = load_hf(ADAPTERS[model].base, revision=revision, device_map=device_map)
        return _round(merge_adapter(hf_model, str(adapter_folder(model))), dtype), tokenizer
    source, gguf = _locate(model)
    where = {"gguf_file": gguf} if gguf else {}
    _check_causal(source, model, revision, gguf)
    try:
        hf_model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=getattr(torch, dtype),
            device_map=device_map,
            trust_remote_code=False,
            **where,
        )
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        RuntimeError,
        ImportError,
        SafetensorError,
        struct.error,
    ) as error:
        raise UserError(f"the model {model!r} can't be loaded: {_first_line(error)}") from error
    if gguf and hasattr(hf_model.config, "quantization_config"):
        del hf_model.config.quantization_config
    require_present(hf_model, model)
    return hf_model.eval(), load_tokenizer(model, revision=revision)


def load_config(model: str, *, revision: str | None = None) -> Any:
    """The configuration of a model, without its weights (of a GGUF file too); UserError where there is none."""
    from transformers import AutoConfig

    source, gguf = _locate(ADAPTERS[model].base if _is_adapter(model) else model)
    where = {"gguf_file": gguf} if gguf else {}
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no model configuration can be read from {model!r}: {_first_line(error)}") from error


def load_tokenizer(model: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a model, or of a folder that holds nothing else."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source, gguf = _locate(ADAPTERS[model].base if _is_adapter(model) else model)
    where = {"gguf_file": gguf} if gguf else {}
    try:
        if not gguf and Path(source).is_dir() and not (Path(source) / "config.json").exists():
            return PreTrainedTokenizerFast.from_pretrained(source)
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no tokenizer can be loaded from {model!r}: {_first_line(error)}") from error


def _is_adapter(model: str) -> bool:
    """True for the name of a packaged adapter, unless a folder of that name stands here."""
    return model in ADAPTERS and not Path(model).exists()


def _locate(model: str) -> tuple[str, str | None]:
    """Where transformers finds a model: (folder or hub id, name of a GGUF file in it)."""
    if model in PACKAGED and not Path(model).exists():
        return str(fetch(model)), None
    path = Path(model).expanduser()
    if path.is_symlink() and not path.exists():
        raise UserError(f"{model!r} is a link to {path.readlink()}, which doesn't exist; mend the link")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"there is no GGUF file {model!r}; check the path")
        return str(path.parent), path.name
    if path.is_file():
        raise UserError(f"{model!r} is a file; give the model's folder, a GGUF file or a hub id")
    if path.is_dir():
        return str(path), None
    if _is_path(model):
        raise UserError(f"there is no folder {model!r}; check the path")
    return model, None


def _is_path(name: str) -> bool:
    """True for what can only be a local path, because no hub id looks like it."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _check_causal(source: str, model: str, revision: str | None, gguf: str | None) -> None:
    """Refuse what isn't a decoder language model before its weights are read."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if gguf:
        return
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(
            f"the folder {model!r} has no config.json, so it holds no model; give the folder that "
            "save_pretrained wrote (an adapter goes to --adapter)"
        )
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the model {model!r} is neither a local folder nor to be had from the hub: {_first_line(error)}"
        ) from error
    named = set(config.architectures or [])
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if named and not named & causal:
        raise UserError(
            f"{model!r} is a {sorted(named)[0]}, not a causal language model; mechlens needs a ...ForCausalLM"
        )


def merge_adapter(hf_model: Any, adapter: str) -> Any:
    """The float32 model with a PEFT adapter merged into its weights; refuses an adapter made for another base.

    In float32 because that is the type whose fingerprint an adapter knows its base by; round afterwards.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").exists() and (folder.exists() or _is_path(adapter)):
        raise UserError(f"there is no adapter in {adapter!r}; give the folder that holds adapter_config.json")
    base = _recorded_base(folder)
    if base is not None and base != weight_fingerprint(hf_model.state_dict()):
        raise UserError(
            f"the adapter {adapter!r} was trained on another base (fingerprint {base[:12]}); "
            "load the model that its mechlens.json names"
        )
    name = hf_model.config.name_or_path
    source = str(folder) if folder.exists() else adapter
    try:
        merged = PeftModel.from_pretrained(hf_model, source)
        saved = {key for key in load_peft_weights(source, device="cpu") if "lora" in key}
        used = {key for key in get_peft_model_state_dict(merged, save_embedding_layers=False) if "lora" in key}
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"the adapter {adapter!r} doesn't fit the model {name!r}: {_first_line(error)}") from error
    if saved != used:
        # peft only warns, and would leave out what has no place.
        raise UserError(
            f"the adapter {adapter!r} doesn't fit the model {name!r}: {len(saved ^ used)} of its weights and the "
            f"model's have no counterpart, such as {min(saved ^ used)}"
        )
    return merged.merge_and_unload()


def _recorded_base(folder: Path) -> str | None:
    """Fingerprint of the base that mechlens trained an adapter on; None for an adapter from elsewhere."""
    record = folder / "mechlens.json"
    if not record.exists():
        return None
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["base_fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(record)!r} names no base_fingerprint; train the adapter again") from error


def _round(hf_model: Any, dtype: str) -> Any:
    """The model with its parameters in another type, as from_pretrained does it: rotary tables stay float32."""
    import torch

    for parameter in hf_model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    hf_model.config.dtype = getattr(torch, dtype)
    return hf_model


def _moved(hf_model: Any, device: str) -> Any:
    try:
        hf_model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the model can't be moved to the device {device!r}: {_first_line(error)}") from error
    require_present(hf_model, hf_model.config.name_or_path)
    return hf_model


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")
