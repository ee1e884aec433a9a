"""Matrix products by the faster of PyTorch's two libraries.

On AMD processors MKL, which `torch.nn.Linear` calls for float32, doesn't use their wide registers; oneDNN, which it
calls for bfloat16, does: two to three times as fast, to float32 rounding (`scripts/bench_products.py`).
"""

import contextlib
import functools
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FEW = 2
"""Up to so many rows the product reads the matrix once, and neither library is faster."""


@functools.cache
def mkl_is_slow() -> bool:
    """True on an AMD processor with both libraries. Told by name, as a timing would choose otherwise another day."""
    there = torch.backends.mkl.is_available() and torch._C._has_mkldnn  # type: ignore[no-untyped-call]
    return there and hasattr(torch.ops.mkldnn, "_linear_pointwise") and _maker() in ("AuthenticAMD", "HygonGenuine")


def _maker() -> str:
    """What the processor calls its maker."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "AuthenticAMD" if "AuthenticAMD" in platform.processor() else ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


@contextlib.contextmanager
def quick_products(hf_model: nn.Module) -> Iterator[None]:
    """The model with the faster product in every plain linear module; modules come back as they were."""
    changed = [module for module in hf_model.modules() if mkl_is_slow() and _can_be_quick(module)]
    ours = [functools.partial(_product, module) for module in changed]
    for module, forward in zip(changed, ours, strict=True):
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in zip(changed, ours, strict=True):
            if module.__dict__.get("forward") is forward:  # what somebody else has put there since is theirs
                del module.__dict__["forward"]


def _can_be_quick(module: nn.Module) -> bool:
    """A linear module of PyTorch's own, not one that was quantised or wrapped."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


def _product(module: Any, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or x.dtype != torch.float32 or x.numel() <= FEW * x.shape[-1]:
        return nn.functional.linear(x, module.weight, module.bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], "")
    return found
