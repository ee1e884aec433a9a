"""Loading: any causal language model by hub id, folder, GGUF file or packaged name, with an adapter if asked."""

import os
import struct
import sys
from pathlib import Path
from typing import Any

from mechlens import hub
from mechlens.choices import MODELS
from mechlens.errors import UserError, kind_of, require_extra, warn
from mechlens.files import AnyPath, adapter_name, nearest_folder, short_name, user_path
from mechlens.models.bridge import LanguageModel, bridge, require_known
from mechlens.models.checkpoint import Checkpoint, sampled_fingerprint, weight_fingerprint
from mechlens.models.checkpoints.adapter_base import Base
from mechlens.models.checkpoints.folders import CONFIG, other_format, own_tokenizer, read_as_trained, require_inside
from mechlens.models.checkpoints.lora import keeps_the_base, read_config
from mechlens.models.checkpoints.merge import first_line, is_path, merge_adapter, require_adapter
from mechlens.models.device_map import (
    DeviceMap,
    as_they_lie,
    drop_with,
    offload_folder,
    read_device_map,
    require_off_disk,
    require_one_place,
)
from mechlens.models.engine.probes import require_present
from mechlens.models.offline import at_home
from mechlens.models.packaged import ADAPTERS, adapter_folder, cache_dir
from mechlens.models.precision import FULL, chosen_device, main_type, stored_types, warn_of_slow
from mechlens.models.quantise import (
    RUNS_ON,
    configuration,
    keep_layout,
    quantisation,
    quantised,
    require_packed,
    require_quantisable,
)
from mechlens.registry import nearest, required

DTYPES = ("auto", *FULL, *RUNS_ON)


def load(
    model: AnyPath,
    *,
    adapter: AnyPath | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = "auto",
    device_map: DeviceMap | None = None,
) -> LanguageModel:
    """A TransformerBridge on raw weights, with HookedTransformer's hook names.

    `model` is a hub id, a local folder, a GGUF file or a name of `mechlens.choices.MODELS` ("smollm2"); `adapter`
    a PEFT adapter for it, which is merged in. `dtype` "auto" is the checkpoint's own type, "int8", "nf4" or "fp8"
    quantises the weights, and `device` "auto" is CUDA, then MPS, then the CPU. Logits on one prompt are compared with
    plain Hugging Face in the same type and the gap is kept in `model.mechlens.parity`. `device_map` spreads the model
    over devices and the disk, as transformers does it (see `DeviceMap`). No code from the hub is run. Raises UserError,
    in one sentence, for whatever can't be loaded.

    >>> model = ml.load("smollm2")
    >>> model.cfg.n_layers > 0, model.mechlens.checkpoint.name
    (True, 'smollm2')
    """
    if not isinstance(model, str | os.PathLike):
        raise UserError(f"{kind_of(model)} was given as the model; give a hub id, a folder or a name such as 'smollm2'")
    model, adapter = os.fspath(model), None if adapter is None else os.fspath(adapter)
    require_one_place(device, device_map)
    if dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    place = None if device_map is not None else chosen_device(device)
    kind = dtype if dtype in RUNS_ON else None
    if kind is not None:
        require_quantisable(kind, place or "cpu")
    require_wrappable(model, revision=revision)
    if device_map is None and (kind or stored_quantised(model, revision=revision)):
        device_map, place = place, None  # packed weights are made where they stay
    if kind is not None and device_map is not None:
        require_off_disk(read_device_map(device_map, lambda: load_config(model, revision=revision)), kind)
    base = ADAPTERS[model].base if _is_adapter(model) else None
    if adapter is not None:
        base = short_name(model)
        hf_model, tokenizer = load_merged(model, adapter, revision=revision, dtype=dtype, device_map=device_map)
    else:
        hf_model, tokenizer = load_hf(model, revision=revision, dtype=dtype, device_map=device_map)
    if place is not None:
        hf_model = moved(hf_model, place)
        warn_of_slow(str(hf_model.dtype).removeprefix("torch."), place)
    checkpoint = Checkpoint(
        name=adapter_name(adapter) if adapter else short_name(model),
        path=model,
        revision=revision,
        adapter=adapter,
        base=base,
        fingerprint=weight_fingerprint(as_they_lie(hf_model.state_dict(), hf_model)),
        sampled=sampled_fingerprint(as_they_lie(hf_model.state_dict(), hf_model)),
    )
    return bridge(hf_model, tokenizer, checkpoint)


def load_hf(
    model: AnyPath, *, revision: str | None = None, dtype: str = "float32", device_map: DeviceMap | None = None
) -> tuple[Any, Any]:
    """The plain Hugging Face model and its tokenizer, such as for a training of your own.

    `model` and `dtype` as in `load`, float32 by default, and quantised where `device_map` says. What is trained comes
    back by its folder: `load(folder)` of a whole model, `load(model, adapter=folder)` of a PEFT adapter.

    >>> hf_model, tokenizer = ml.load_hf("smollm2")
    >>> logits = hf_model(**tokenizer("bake a cake", return_tensors="pt")).logits
    >>> logits.shape[-1] == hf_model.config.vocab_size
    True
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    model = os.fspath(model)
    if _is_adapter(model):
        merged, tokenizer = load_merged(
            ADAPTERS[model].base, str(adapter_folder(model)), dtype=dtype, device_map=device_map
        )
        merged.name_or_path = merged.config._name_or_path = model  # what peft writes down as a new adapter's base
        return merged, tokenizer
    kind, dtype = _split(model, dtype, revision)
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # transformers would have the hub convert pickled weights
    source, gguf = _locate(model)
    where: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    _check_causal(source, model, revision, gguf)
    if kind and not gguf:
        _require_unquantised(model, revision, f"they can't be made {kind}; give --dtype auto")
        where["quantization_config"] = configuration(kind, getattr(torch, dtype))
    places = read_device_map(device_map, lambda: load_config(model, revision=revision))
    _bars_only_where_watched()
    spill = offload_folder(places, cache_dir())
    try:
        with at_home(source):
            hf_model = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=getattr(torch, dtype),
                device_map=places,
                trust_remote_code=False,
                use_safetensors=True,
                **where,
                **spill,
            )
            drop_with(hf_model, spill)
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
        raise UserError(f"the model {model!r} can't be loaded: {first_line(error)}") from error
    if gguf and hasattr(hf_model.config, "quantization_config"):
        del hf_model.config.quantization_config
    keep_layout(hf_model)
    if kind:
        hf_model = quantised(hf_model, kind, places) if gguf else hf_model
        require_packed(hf_model, kind, model)
    require_present(hf_model, model)
    return hf_model.eval(), load_tokenizer(model, revision=revision)


def load_merged(
    model: str,
    adapter: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device_map: DeviceMap | None = None,
) -> tuple[Any, Any]:
    """The plain Hugging Face model with an adapter merged in float32 and rounded then, and its tokenizer.

    Each matrix is widened alone, and a base that is stored in a wider type than was asked for is read from its file as
    it is merged. The chat template is the adapter's own, where its folder has one.
    """
    require_adapter(adapter)
    _require_unquantised(model, revision, "no adapter can be merged into them; give the model that was quantised, and "
                         "--dtype nf4, say, quantises the merged one")  # fmt: skip
    kind, dtype = _split(model, dtype, revision)
    folder = user_path(adapter)
    whole = (folder / CONFIG).exists() and not keeps_the_base(read_config(folder))  # peft would round the base twice
    first = "float32" if whole else type_without_loss(model, dtype, revision=revision)
    where = None if kind else device_map
    hf_model, tokenizer = load_hf(model, revision=revision, dtype=first, device_map=where)
    tokenizer = _as_trained(tokenizer, adapter)
    hf_model = merge_adapter(hf_model, adapter, dtype)
    _warn_of_other_base(Base(model, hf_model.config), folder)
    if kind:
        hf_model = quantised(hf_model, kind, read_device_map(device_map, lambda: hf_model.config))
        require_packed(hf_model, kind, adapter)
    return hf_model, tokenizer


def _warn_of_other_base(base: Base, adapter: Path) -> None:
    """A warning for an adapter that fits and names another packaged model as its base."""
    doubt = base.doubt(adapter) if (adapter / CONFIG).is_file() else None
    if doubt:
        warn(doubt)


def _as_trained(tokenizer: Any, adapter: str) -> Any:
    """The tokenizer, with the chat template of the adapter's folder where it has one."""
    own = own_tokenizer(user_path(adapter), tokenizer, load_tokenizer)
    return tokenizer if own is None else read_as_trained(tokenizer, own, adapter)


def _split(model: str, dtype: str, revision: str | None) -> tuple[str | None, str]:
    """How weights are to be quantised, if at all, and the type of all else."""
    kind = dtype if dtype in RUNS_ON else None
    return kind, own_type(model, revision=revision) if kind or dtype == "auto" else dtype


def stored_quantised(model: str, *, revision: str | None = None) -> str:
    """How a model's weights are quantised in its files; "" if not, or in a GGUF file, whose numbers become float32."""
    base = ADAPTERS[model].base if _is_adapter(model) else model
    return "" if _locate(base)[1] else quantisation(load_config(base, revision=revision))


def _require_unquantised(model: str, revision: str | None, so: str) -> None:
    """UserError for a model that is stored quantised; `so` says what can't be done with its weights, and what to do."""
    if found := stored_quantised(model, revision=revision):
        raise UserError(f"the weights of {model!r} are stored quantised ({found}), so {so}")


def own_type(model: str, *, revision: str | None = None) -> str:
    """The checkpoint's own type: float32 of a GGUF file, whose packed numbers become float32; else see `main_type`.

    Of a model on the hub, it is the one that its configuration names.
    """
    base = ADAPTERS[model].base if _is_adapter(model) else model
    source, gguf = _locate(base)
    if gguf:
        return "float32"
    return main_type(load_config(base, revision=revision), stored_types(Path(source)))


def type_without_loss(model: str, dtype: str, *, revision: str | None = None) -> str:
    """The type asked for where the weights are stored in it, else float32: what to change weights in, and round after.

    Of a model on the hub, the stored type is the one that its configuration names.
    """
    if _is_adapter(model):
        return "float32"
    source, gguf = _locate(model)
    if gguf:
        return "float32"
    if Path(source).is_dir():
        stored = set(stored_types(Path(source)))
    else:
        stored = {str(getattr(load_config(model, revision=revision), "dtype", None)).removeprefix("torch.")}
    return dtype if stored == {dtype} else "float32"


def load_config(model: str, *, revision: str | None = None) -> Any:
    """The configuration of a model, without its weights (of a GGUF file too); UserError where there is none."""
    from transformers import AutoConfig

    source, gguf = _locate(ADAPTERS[model].base if _is_adapter(model) else model)
    where = {"gguf_file": gguf} if gguf else {}
    try:
        with at_home(source):
            return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable("model configuration", model, source, error) from error


def tokenizer_of(model: str, *, adapter: str | None = None, revision: str | None = None) -> Any:
    """The tokenizer that `load` gives the model, with its adapter's chat template; no weights are read."""
    tokenizer = load_tokenizer(model, revision=revision)
    merged = str(adapter_folder(model)) if _is_adapter(model) else adapter
    return tokenizer if merged is None else _as_trained(tokenizer, merged)


def load_tokenizer(model: AnyPath, *, revision: str | None = None) -> Any:
    """The tokenizer of a model, or of a folder that holds nothing else.

    >>> tokenizer = ml.load_tokenizer("smollm2")
    >>> tokenizer.decode(tokenizer("bake a cake")["input_ids"])
    'bake a cake'
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    model = os.fspath(model)
    source, gguf = _locate(ADAPTERS[model].base if _is_adapter(model) else model)
    where = {"gguf_file": gguf} if gguf else {}
    try:
        with at_home(source):
            if not gguf and Path(source).is_dir() and not (Path(source) / "config.json").exists():
                return PreTrainedTokenizerFast.from_pretrained(source)
            return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable("tokenizer", model, source, error) from error


def _unreadable(what: str, model: str, source: str, error: Exception) -> UserError:
    """Says what can't be read of a folder; of a name that is none, which names are packaged, and the nearest."""
    if Path(source).is_dir():
        return UserError(f"no {what} can be read from {model!r}: {first_line(error)}")
    return _unknown(model, hub.why_not() or first_line(error))


def _unknown(model: str, why: str) -> UserError:
    """For a name that stands for no model: what is packaged, or the nearest id of those that are known here."""
    if "/" in model:
        from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

        here, near = nearest_folder(model), hub.nearest_id(model, OFFICIAL_MODEL_NAMES)
        folder, named = (f" ({one})" if one else "" for one in (here, near))
    else:
        near = nearest(model, MODELS.names())
        folder, named = "", f", nor packaged ({', '.join(MODELS.names())}{near and f'; {near}'})"
    return UserError(f"the model {model!r} is neither a local folder{folder} nor to be had from the hub{named}: {why}")


def _is_adapter(model: str) -> bool:
    """True for the name of a packaged adapter, unless a folder of that name stands here."""
    return model in ADAPTERS and not Path(model).exists()


def _locate(model: str) -> tuple[str, str | None]:
    """Where transformers finds a model: (folder or hub id, name of a GGUF file in it)."""
    if model in MODELS.names() and not Path(model).exists():
        return _folder_of(model), None
    path = user_path(model)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{model!r} is a link to {path.readlink()}, which doesn't exist; mend the link")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"there is no GGUF file {model!r}; check the path")
        require_extra("gguf", "a GGUF file")
        return str(path.parent), path.name
    if path.is_file():
        raise UserError(f"{model!r} is a file; give the model's folder, a GGUF file or a hub id")
    if path.is_dir():
        return str(path), None
    if is_path(model):
        raise UserError(f"there is no folder {model!r}; check the path")
    if hub.has_no_owner(model):
        raise _unknown(model, "the hub's ids have an owner, as in owner/name")
    return model, None


def _folder_of(model: str) -> str:
    """Where a packaged model is, fetched if need be; of `mechlens.choices.MODELS`."""
    folder = required(MODELS, model)(model)
    if not (isinstance(folder, str | Path) and Path(folder).is_dir()):
        raise UserError(f"the model source {model!r} gave {str(folder)!r}, which is no folder")
    return str(folder)


def _bars_only_where_watched() -> None:
    """Shuts transformers' bars, for good, in a log or a pipe."""
    from transformers.utils import logging

    if not ("ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())):
        logging.disable_progress_bar()


def require_wrappable(model: str, *, revision: str | None = None) -> None:
    """UserError, before any weights are read, for an architecture that TransformerLens doesn't know."""
    if not _is_adapter(model):
        source, gguf = _locate(model)
        config = _check_causal(source, model, revision, gguf)
        if config is not None:
            require_known(config, short_name(model))


def _check_causal(source: str, model: str, revision: str | None, gguf: str | None) -> Any:
    """The configuration; refuse what isn't a decoder language model before its weights are read.

    None of a GGUF file, which transformers has to open for it.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if gguf:
        return None
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").exists():
        if found := other_format(folder):
            raise UserError(f"the model {model!r} can't be loaded: {found}")
        raise UserError(
            f"the folder {model!r} has no config.json, so it holds no model; give the folder that "
            "save_pretrained wrote (an adapter goes to --adapter)"
        )
    require_inside(folder)
    if folder.is_dir() and not list(folder.glob("*.safetensors")) and (found := other_format(folder)):
        raise UserError(f"the model {model!r} can't be loaded: {found}")
    try:
        with at_home(source):
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable("model configuration", model, source, error) from error
    named = set(config.architectures or [])
    causal = {str(name).lower() for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    if named and not {name.lower() for name in named} & causal:  # PhiMoE is Phimoe in transformers
        raise UserError(
            f"{model!r} is a {sorted(named)[0]}, not a causal language model; mechlens needs a ...ForCausalLM"
        )
    return config


def moved(hf_model: Any, device: str) -> Any:
    """The model on a device; UserError where it has no room there."""
    try:
        hf_model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the model can't be moved to the device {device!r}: {first_line(error)}") from error
    require_present(hf_model, hf_model.config.name_or_path)
    return hf_model
