"""Two devices where there is one: tensors that say they lie elsewhere, and refuse to meet those that don't.

Each holds an ordinary CPU tensor. An operation on tensors of two devices raises what a GPU would have raised; a
number, an index on the CPU and a scalar are let through, as PyTorch lets them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

FIRST, SECOND = torch.device("meta:0"), torch.device("meta:1")  # a GPU's name needs a build with GPUs


class Elsewhere(Tensor):
    """A CPU tensor under the name of another device."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "Elsewhere":
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=device, requires_grad=False
        )

    def __init__(self, inner: Tensor, device: torch.device) -> None:
        self.inner = inner

    def __repr__(self, **kwargs: Any) -> str:
        return f"Elsewhere({self.inner}, {self.device})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Devices(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    name = func.overloadpacket.__name__
    target = next((x for x in leaves if isinstance(x, torch.device)), None)
    met = {x.device for x in tensors if x.ndim or x.device.type != "cpu"}
    if name in ("index", "index_put", "index_put_"):  # indices may lie on the CPU, whatever they index
        met = {args[0].device, *(x.device for x in args[1] if x is not None and x.device.type != "cpu")}
    if len(met) > 1 and name not in ("to", "_to_copy", "copy_"):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(map(str, met))}: {func}")
    plain = tree_map_only(torch.device, lambda x: torch.device("cpu"), (args, kwargs))
    out = func(*(inner := tree_map_only(Elsewhere, lambda x: x.inner, plain))[0], **inner[1])
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    first = args[0].device if name == "copy_" or (name in ("to", "_to_copy") and args) else next(iter(met), None)
    device = target or first or torch.device("cpu")
    return out if device.type == "cpu" else tree_map_only(Tensor, lambda x: Elsewhere(x, device), out)


class _Literals(TorchFunctionMode):
    """`torch.tensor` makes nothing on these devices, so it makes it on the CPU and moves it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and given.get("device") in (FIRST, SECOND):
            return Elsewhere(func(*args, **given | {"device": "cpu"}), given["device"])
        return func(*args, **given)


@contextlib.contextmanager
def two_devices() -> Iterator[None]:
    with _Devices(), _Literals():
        yield


def place(module: nn.Module, device: torch.device) -> None:
    """Moves a plain module, and what it is called with, as accelerate does for a model in several parts."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(Elsewhere(weight.detach(), device), requires_grad=False)
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else Elsewhere(value, device)
    forward = module.forward

    def there(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
        return forward(*args, **kwargs)

    module.forward = there  # type: ignore[method-assign]
