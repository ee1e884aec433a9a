"""What a model is tried on before anything is believed of it: short passes, compared with whole ones."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig

from mechlens.errors import UserError
from mechlens.models.checkpoint import PIECE, Elsewhere, is_packed, plain_parts
from mechlens.models.device_map import as_they_lie, where_run
from mechlens.models.native import blocks_of
from mechlens.models.precision import Parity

UNTRIED = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)
"""What a model's code raises when it is run in a way that it can't bear; see `is_misfit`."""
_NOT_THE_MODEL = ("out of memory", "can't allocate", "same device", "cuda error", "device-side", "meta tensor")


def is_misfit(error: Exception) -> bool:
    """Whether an error of a trial tells of the model's code, and not of memory, of devices or of a fault elsewhere."""
    said = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, UNTRIED) and not any(words in said for words in _NOT_THE_MODEL)


def apart(found: Tensor, right: Tensor) -> float:
    """Largest difference of two results, as a share of the largest value of the right one; infinite for NaN."""
    if found.shape != right.shape:
        return float("inf")
    scale = max(float(right.float().abs().max()), 0.01)  # all but zero in a hand-built model
    gap = float((found.float() - right.float().to(found.device)).abs().max()) / scale
    return gap if gap == gap else float("inf")


def tolerance(dtype: torch.dtype) -> float:
    """How far `apart` two ways of computing the same may be.

    Far above rounding (1.2e-4 in SmolLM2's late heads on some CPUs, where plain float32 is as far from float64) and
    far below what a way that doesn't fit gives (0.1 and more).
    """
    return 2e-3 if dtype == torch.float32 else 5e-2


def loses(gap: float, dtype: torch.dtype) -> bool:
    """Whether tokens that continue a cache are so far `apart` from a whole pass that something was lost between.

    What is lost gives half of the largest logit and more; rounding in half precision, on real models, up to a tenth.
    """
    return not gap <= (2e-3 if dtype == torch.float32 else 0.2)


def spread_tokens(hf_model: nn.Module, numbers: Iterable[int]) -> list[int]:
    """Small numbers as tokens from all over the vocabulary, 0 being the first and 1 to 10 an eleventh apart.

    On the first tokens, often special, half precision is all rounding.
    """
    size = int(hf_model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    return [number * max(1, size // 11) % size for number in numbers]


def probe_tokens(hf_model: nn.Module, n: int) -> Int[Tensor, "1 token"]:
    """So many of them, where the model takes its tokens."""
    device = where_run(hf_model.get_input_embeddings())  # type: ignore[operator]
    return torch.tensor([spread_tokens(hf_model, range(1, n + 1))], device=device)


class Probed(NamedTuple):
    """What one fixed prompt gives (float32, on the CPU)."""

    logits: Float[Tensor, "1 token vocab"]
    residuals: list[Float[Tensor, "1 token d_model"]]
    """What every block puts out; empty where no blocks were found."""


@torch.inference_mode()
def probe(hf_model: nn.Module) -> Probed:
    """One pass over a fixed prompt, of a plain or bridged model."""
    residuals: list[Tensor] = []

    def keep(block: nn.Module, args: object, output: Any) -> None:
        residuals.append((output if isinstance(output, Tensor) else output[0]).float().cpu())

    handles = [block.register_forward_hook(keep) for block in _blocks(hf_model)]
    try:
        # Without a cache: models whose layers are all recurrent can't count the tokens in theirs.
        logits: Tensor = hf_model(probe_tokens(hf_model, 16), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return Probed(logits.float().cpu(), residuals)


def _blocks(hf_model: nn.Module) -> list[nn.Module]:
    try:
        return list(blocks_of(hf_model))
    except UserError:
        return []


def parity(before: Probed, after: Probed, dtype: torch.dtype) -> Parity | None:
    """How far a bridged model's pass is from the plain model's; None where its logits are not finite."""
    largest = float(before.logits.abs().max())
    gap = float((after.logits - before.logits).abs().max())
    if not math.isfinite(gap):
        return None
    shares = [
        float(((new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-30)).max())
        for new, old in zip(after.residuals, before.residuals, strict=False)
    ]
    return Parity(
        str(dtype).removeprefix("torch."), gap, tolerance(dtype) * largest, largest, max(shares, default=None)
    )


@torch.inference_mode()
def decode_gap(hf_model: nn.Module) -> float:
    """How far the library's own generation, token by token with its cache, is `apart` from one pass over all tokens.

    Infinite where it can't be run so. Keys and values may get lost between two passes, and recurrent states too,
    in a model whose every single pass is right.
    """
    start = probe_tokens(hf_model, 6)
    settings = GenerationConfig(
        max_new_tokens=3, do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True
    )
    own: Any = hf_model.generation_config
    try:
        hf_model.generation_config = settings
        out = hf_model.generate(start, attention_mask=torch.ones_like(start))  # type: ignore[operator]
        whole = hf_model(out.sequences[:, :-1], use_cache=False).logits[0, start.shape[1] - 1 :]
    except UNTRIED as error:
        if not is_misfit(error):
            raise
        return float("inf")
    finally:
        hf_model.generation_config = own
    return apart(torch.cat(out.logits), whole)


def require_present(hf_model: nn.Module, name: str) -> None:
    """UserError for weights that are nowhere: on the meta device, and not fetched from a disk or another memory."""
    named = dict((*hf_model.named_parameters(), *hf_model.named_buffers()))
    for key, weight in as_they_lie(named, hf_model).items():
        if isinstance(weight, Tensor) and weight.is_meta:
            raise UserError(
                f"{key} of the model {name!r} has no values (it is on the meta device); load the model with its weights"
            )


@torch.no_grad()
def require_finite_weights(hf_model: nn.Module, name: str) -> None:
    """UserError that names the first tensor of a checkpoint, buffers included, with NaN or infinity in it."""
    kept = {key for key in hf_model.state_dict() if "." in key}
    buffers = {key: buffer for key, buffer in hf_model.named_buffers() if key in kept}
    for key, found in as_they_lie(dict(hf_model.named_parameters()) | buffers, hf_model).items():
        weight = found.read() if isinstance(found, Elsewhere) else found
        if weight.is_floating_point() and weight.numel() and not _is_finite(weight):
            bad = int((~torch.isfinite(weight.float())).sum())
            remedy = "take an earlier checkpoint or save it again"
            if weight.dtype == torch.float16:
                remedy = f"{overflow_advice(weight.dtype)}, or {remedy}"
            raise UserError(
                f"{key} of the model {name!r} holds NaN or infinity ({bad} of {weight.numel()} values), so nothing "
                f"that it computes means anything; {remedy}"
            )


def _is_finite(weight: Tensor) -> bool:
    if is_packed(weight):
        real = (part for part in plain_parts(weight) if part.is_floating_point())
        return all(bool(torch.isfinite(few.float()).all()) for part in real for few in torch.split(part, PIECE))
    # Smallest and largest value are NaN where any is: one look at each value, and no copy of them.
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(weight))


def require_finite_logits(logits: Tensor, computed_in: torch.dtype | None = None) -> None:
    """UserError where the likeliest of a row's tokens has no finite logit; -inf for tokens ruled out is none."""
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        raise not_finite(computed_in or logits.dtype)


def finite_on_cpu(logits: Tensor) -> Tensor:
    """The same in float32 on the CPU, looked at there: a GPU is waited for once."""
    moved = logits.float().cpu()
    require_finite_logits(moved, logits.dtype)
    return moved


def not_finite(dtype: torch.dtype) -> UserError:
    return UserError(f"the model's logits are not finite; {overflow_advice(dtype)}")


def overflow_advice(dtype: torch.dtype) -> str:
    """What to do about values that are not finite, in this type."""
    if dtype == torch.float16:
        return "float16 overflows, so load the model in bfloat16 or float32"
    kind = str(dtype).removeprefix("torch.")
    return f"{kind} rarely overflows, so look for damaged weights, a hook, or an intervention that is too strong"
