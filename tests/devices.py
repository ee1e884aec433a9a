"""Two devices where there is one: tensors that say they lie elsewhere, and refuse to meet those that don't.

Each holds an ordinary CPU tensor. An operation on tensors of two devices raises what a GPU would have raised; a
number, an index on the CPU and a scalar are let through, as PyTorch lets them. Neither knows float64, as MPS doesn't.
What makes the CPU wait for a GPU, and what is sent to it, can be `counted`.
"""

import contextlib
import sys
from collections import Counter
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
        _count("wait")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive")
"""What gives the CPU a value, or makes a tensor of a size that depends on values: a GPU has to finish first."""
Traffic = Counter[tuple[str, str]]
"""How often, by kind ("wait" for values; "send" from the CPU) and by the file and function of ours that did it."""
_COUNTING: list[Traffic] = []


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Counts as long as the block lasts."""
    _COUNTING.append(Counter())
    try:
        yield _COUNTING[-1]
    finally:
        _COUNTING.pop()


def _count(kind: str) -> None:
    if not _COUNTING:
        return
    frame: Any = sys._getframe()
    while frame is not None and "/mechlens/" not in frame.f_code.co_filename:
        frame = frame.f_back
    where = "" if frame is None else f"{frame.f_code.co_filename.rpartition('/')[2]} {frame.f_code.co_name}"
    _COUNTING[-1][kind, where] += 1


def _note(name: str, args: Any, to: torch.device) -> None:
    """Counts an operation that takes values from a GPU, or sends some to it."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if name in WAITS and any(x.device.type != "cpu" for x in tensors):
        _count("wait")
    elif name in ("index", "index_put", "index_put_") and args[0].device.type != "cpu":
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype == torch.bool for x in indices):
            _count("wait")
        elif any(x.device.type == "cpu" for x in indices):
            _count("send")
    elif name in ("to", "_to_copy", "copy_") and tensors:
        come = tensors[-1].device
        if come.type != to.type:
            _count("send" if come.type == "cpu" else "wait")


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
    first = args[0].device if name == "copy_" or (name in ("to", "_to_copy") and args) else next(iter(met), None)
    device = target or first or torch.device("cpu")
    _note(name, args, device)
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    if device.type != "cpu" and any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_flatten(out)[0]):
        raise TypeError(f"Cannot convert a MPS Tensor to float64, which that framework doesn't support: {func}")
    return out if device.type == "cpu" else tree_map_only(Tensor, lambda x: Elsewhere(x, device), out)


class _Literals(TorchFunctionMode):
    """`torch.tensor`, and a list as an index, make nothing on these devices, so it is made on the CPU and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and given.get("device") in (FIRST, SECOND):
            _count("send")
            return Elsewhere(func(*args, **given | {"device": "cpu"}), given["device"])
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(args[0], _index(args[1]), *args[2:])
        return func(*args, **given)


def _index(given: Any) -> Any:
    if isinstance(given, tuple):
        return tuple(map(_index, given))
    return torch.tensor(given, dtype=torch.long if not given else None) if isinstance(given, list) else given


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
