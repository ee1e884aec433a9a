"""Which weights a number came from: a checkpoint by name, and fingerprints of its weights and settings."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """One set of weights, named so that a result made with it can never be taken for another's.

    >>> model = ml.load("smollm2")
    >>> model.mechlens.checkpoint.name
    'smollm2'
    """

    name: str
    """Short name for tables and figures."""
    path: str
    """Hub id, or the local path as it was given."""
    revision: str | None = None
    adapter: str | None = None
    """PEFT adapter loaded on top of `path`."""
    base: str | None = None
    """Name of the checkpoint that this one was fine-tuned from."""
    step: int | None = None
    """Training step within a series; the base is step 0."""
    regime: str = "raw"
    """"raw": weights as Hugging Face stores them; "processed": folded or centred by TransformerLens; else how they are
    quantised, such as "int8". Directions of two regimes differ and are never mixed."""
    fingerprint: str = ""
    """Of every byte of the weights."""
    sampled: str = ""
    """The older fingerprint, of a sample, by which records of earlier versions know these weights."""

    config: str = ""
    """Fingerprint of the configuration with which the weights are run; empty in records of earlier versions."""
    dtype: str = ""
    """Type that is computed in, such as "bfloat16"; empty in records of earlier versions."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """What decides every number: weights, configuration and regime."""
        return self.fingerprint, self.config, self.regime

    def has_weights_of(self, other: "Checkpoint") -> bool:
        """True where both are of the same weights, run with the same configuration.

        Where one is of an earlier version, as far as its sample tells, and whatever its configuration.
        """
        if "" not in (self.config, other.config) and self.config != other.config:
            return False
        if is_sampled(self.fingerprint) == is_sampled(other.fingerprint):
            return self.fingerprint == other.fingerprint
        ours, theirs = (one.fingerprint if is_sampled(one.fingerprint) else one.sampled for one in (self, other))
        return ours == theirs != ""

    def __repr__(self) -> str:
        told = {"revision": self.revision, "adapter": self.adapter, "base": self.base, "step": self.step}
        more = "".join(f", {name} {value}" for name, value in told.items() if value is not None)
        where = "" if self.path == self.name else f" from {self.path}"
        kind = ", ".join(word for word in (self.dtype, self.regime, self.fingerprint[:12]) if word)
        return f"Checkpoint({self.name}{where}{more}; {kind})"


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """A weight that isn't in memory: read when its turn comes, and let go after it."""

    like: "Tensor"
    """Shape and type, without values."""
    read: "Callable[[], Tensor]"

    @property
    def shape(self) -> Any:
        return self.like.shape


VERSION = "v2-"
"""What a fingerprint of every byte begins with; those of earlier versions are of a sample, and plain hexadecimal."""
PIECE = 1 << 22
"""Values of a tensor that are turned into bytes at once."""
WORDS = 1 << 21
"""32-bit words that `stamp` sums at once on a device: many, as every sum is a kernel to launch, and few enough that
what stands between (16 MB) stays in a GPU's cache."""


def weight_fingerprint(state: Mapping[str, Any]) -> str:
    """sha256 over names, shapes and every value of every tensor, integers too.

    Floating-point types up to 32 bits count as float32, so a bfloat16 file has one fingerprint whichever type it is
    loaded in.
    """
    import torch

    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor | Elsewhere)}
    places = {name: _place(value) for name, value in tensors.items()}
    different = {place: tensors[name] for name, place in places.items()}  # tied matrices are read once
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        digests = dict(zip(different, threads.map(_digest, different.values()), strict=True))
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name}{tuple(tensors[name].shape)}".encode())
        whole.update(digests[places[name]])
    return VERSION + whole.hexdigest()


NO_NUMBERS = re.compile(
    r"_.*|transformers_version|(torch_)?dtype|architectures|use_cache|.*dropout|.*_pdrop|initializer_range|name_or_path|"
    r"(bos|eos|pad)_token_id|tie_word_embeddings|attn_implementation|quantization_config|id2label|label2id|num_labels|output_.*|return_dict"
)
"""Settings of a configuration that change no number computed from given weights and tokens."""


def computing_settings(config: Any) -> dict[str, Any]:
    """A Hugging Face configuration's settings that decide what is computed with the weights, where not the default.

    What tools add of their own, and a context length that no rotary table depends on, decide nothing.
    """
    settings: dict[str, Any] = config.to_diff_dict()
    try:
        known = set(type(config)().to_dict())
    except (TypeError, ValueError, AttributeError):
        known = set(settings)
    known -= set() if "dynamic" in str(settings.get("rope_parameters")) else {"max_position_embeddings"}
    return {name: value for name, value in settings.items() if name in known and not NO_NUMBERS.fullmatch(name)}


def config_fingerprint(config: Any) -> str:
    """sha256 of `computing_settings`: one set of weights gives other numbers with other scales or rotary tables."""
    return hashlib.sha256(json.dumps(computing_settings(config), sort_keys=True, default=str).encode()).hexdigest()


SWITCHES = re.compile(r"training|.*checkpointing|max_seq_len_cached|layerdrop|.*jitter.*|.*loss_coef|p")
"""Plain attributes of modules that a pass changes, or that only training reads (`p` is a dropout's)."""


def settings_stamp(model: Any) -> str:
    """A hash over the plain attributes of a model's modules, such as a norm's epsilon: equal until one is edited.

    TransformerLens' own modules around Hugging Face's are left out: they hold how it is computed, and no number.
    """
    found = hashlib.sha256()
    for place, module in model.named_modules():
        if type(module).__module__.startswith(("transformer_lens.hook_points", "transformer_lens.model_bridge")):
            continue
        for name, value in sorted(vars(module).items()):
            plain = isinstance(value, float | int | str) and not SWITCHES.fullmatch(name)
            if plain and not NO_NUMBERS.fullmatch(name):
                found.update(f"{place}.{name}={value!r};".encode())
    return found.hexdigest()


def sampled_fingerprint(state: Mapping[str, Any]) -> str:
    """The fingerprint of earlier versions: sha256 over names, shapes and at most 8191 strided values of every tensor.

    Blind between its samples; only for knowing again what earlier records name.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].read() if isinstance(state[name], Elsewhere) else state[name]
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        for flat in plain_parts(tensor):
            picked = flat[:: max(1, flat.numel() // 4096)].float().cpu().contiguous()
            digest.update(picked.numpy().tobytes())
    return digest.hexdigest()


def is_sampled(fingerprint: str) -> bool:
    """True for a fingerprint of an earlier version."""
    return not fingerprint.startswith(VERSION)


def is_fingerprint_of(recorded: str, state: Mapping[str, Any]) -> bool:
    """True where a record, of this version or an earlier one, names these weights."""
    return recorded == (sampled_fingerprint(state) if is_sampled(recorded) else weight_fingerprint(state))


def _place(tensor: "Tensor | Elsewhere") -> tuple[Any, ...]:
    """Where a tensor's values lie: equal for two names of one matrix."""
    if isinstance(tensor, Elsewhere) or tensor.numel() == 0 or not tensor.data_ptr():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def is_packed(weight: "Tensor") -> bool:
    """True for a quantised weight, whose numbers are no longer its values: packed, or apart from their scales."""
    made_of_parts = hasattr(type(weight), "__tensor_flatten__")
    return made_of_parts or not weight.is_floating_point() or weight.dtype.itemsize < 2


def plain_parts(tensor: "Tensor") -> Iterator["Tensor"]:
    """The tensor as a row of values, or those that a quantised one is made of."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        packed: Any = tensor
        for name in packed.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(packed, name))
    else:
        yield tensor.detach().reshape(-1)


def _digest(tensor: "Tensor | Elsewhere") -> bytes:
    import torch

    digest = hashlib.sha256()
    for flat in plain_parts(tensor.read() if isinstance(tensor, Elsewhere) else tensor):
        small = flat.is_floating_point() and flat.dtype.itemsize <= 4
        digest.update(b"float" if small else str(flat.dtype).encode())
        for piece in torch.split(flat, PIECE):
            values = (piece.float() if small else piece).cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.digest()


def stamp(state: Mapping[str, Any]) -> str:
    """A fast hash over every byte, by which weights that were edited are known: about the speed of memory.

    Not a fingerprint: it depends on the weights' type and device. Of weights that are not in memory, which are fetched
    anew for every call and so can't be edited, only names and shapes count.
    """
    import torch

    found, seen = hashlib.sha256(), set()
    sums: list[torch.Tensor] = []
    for name, tensor in state.items():
        if isinstance(tensor, Elsewhere):
            found.update(f"{name}{tuple(tensor.shape)} elsewhere".encode())
        elif isinstance(tensor, torch.Tensor) and (place := _place(tensor)) not in seen:
            seen.add(place)
            found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            for part in plain_parts(tensor):
                if part.device.type == "cpu":
                    found.update(_read_here(part))
                else:
                    sums.append(_summed_there(part))
    for device in dict.fromkeys(one.device for one in sums):  # each is waited for once
        found.update(torch.cat([one for one in sums if one.device == device]).cpu().numpy().tobytes())
    return found.hexdigest()


def _read_here(flat: "Tensor") -> bytes:
    import torch
    import xxhash

    return xxhash.xxh3_128(flat.view(torch.uint8).numpy().data).digest()


def _summed_there(flat: "Tensor") -> "Tensor":
    """Sums of 32-bit words times random 64-bit numbers, made on the tensor's device, so that only sums are moved.

    Two tensors that differ have the same sum with a chance of 2^-32 at most (multilinear hashing: Dietzfelbinger
    1996); a single changed word never has.
    """
    import torch

    octets = flat.view(torch.uint8)
    odd = len(octets) % 4
    words = torch.cat([octets, octets.new_zeros(4 - odd)]) if odd else octets
    factors = _factors(flat.device)
    sums = [(piece * factors[: len(piece)]).sum() for piece in torch.split(words.view(torch.int32), WORDS)]
    return torch.stack(sums) if sums else octets.new_zeros(0, dtype=torch.int64)


@cache
def _factors(device: Any) -> "Tensor":
    import torch

    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(1 << 63), (1 << 63) - 1, (WORDS,), generator=generator) | 1).to(device)


def _is_fixed_table(module: Any, name: str) -> bool:
    """A rotary table that no pass changes; LongRoPE's and dynamic NTK's change with the number of tokens."""
    return name.endswith("inv_freq") and getattr(module, "rope_type", "") in ("default", "linear", "llama3", "yarn")


def weights_of(whole: Any) -> "dict[str, Tensor]":
    """Every parameter, every buffer that a checkpoint would hold, such as packed integers, and rotary tables."""
    buffers = {
        f"{place}.{name}": buffer
        for place, module in whole.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and (name not in module._non_persistent_buffers_set or _is_fixed_table(module, name))
    }
    return {**dict(whole.named_parameters()), **buffers}
