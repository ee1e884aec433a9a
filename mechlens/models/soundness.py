"""Weights and logits that no number should be made with: off-loaded, NaN or infinite."""

import torch
from torch import Tensor, nn

from mechlens.errors import UserError


def require_present(hf_model: nn.Module, name: str) -> None:
    """UserError for weights that are not in memory: on the meta device, or off-loaded to a disk or another device."""
    for key, weight in (*hf_model.named_parameters(), *hf_model.named_buffers()):
        if weight.is_meta:
            raise UserError(
                f"{key} of the model {name!r} isn't in memory (off-loaded, or on the meta device) and mechlens reads "
                "weights where they are; load the model whole, with a smaller dtype or more memory"
            )


@torch.no_grad()
def require_finite_weights(hf_model: nn.Module, name: str) -> None:
    """UserError that names the first tensor of a checkpoint, buffers included, with NaN or infinity in it."""
    kept = {key for key in hf_model.state_dict() if "." in key}
    buffers = ((key, buffer) for key, buffer in hf_model.named_buffers() if key in kept)
    for key, weight in (*hf_model.named_parameters(), *buffers):
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
    if weight.dtype.itemsize == 1:  # float8 has no minimum
        return all(bool(torch.isfinite(rows.float()).all()) for rows in weight)
    # Smallest and largest value are NaN where any is: one look at each value, and no copy of them.
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(weight))


def require_finite_logits(logits: Tensor, computed_in: torch.dtype | None = None) -> None:
    """UserError where the likeliest of a row's tokens has no finite logit; -inf for tokens ruled out is none."""
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        raise not_finite(computed_in or logits.dtype)


def not_finite(dtype: torch.dtype) -> UserError:
    return UserError(f"the model's logits are not finite; {overflow_advice(dtype)}")


def overflow_advice(dtype: torch.dtype) -> str:
    """What to do about values that are not finite, in this type."""
    if dtype == torch.float16:
        return "float16 overflows, so load the model in bfloat16 or float32"
    kind = str(dtype).removeprefix("torch.")
    return f"{kind} rarely overflows, so look for damaged weights, a hook, or an intervention that is too strong"
