"""Where the parts of a model lie: a map of its modules to devices, and weights that aren't in memory between calls.

transformers reads the map and accelerate carries it out: it moves what each part is given to that part's device. The
weights of a part on "disk" are read before each of its calls and let go after it.
"""

import contextlib
import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mechlens.errors import UserError, require_extra
from mechlens.files import user_path
from mechlens.models.checkpoint import Elsewhere
from mechlens.models.native import blocks_of, plain_module

DeviceMap = str | Mapping[str, str | int]
"""Module names and devices as in `model.hf_device_map`; a JSON file of that; "auto"; or one device for all."""
CHOSEN = ("auto", "balanced", "balanced_low_0", "sequential")
"""Maps that accelerate works out."""
OFFLOADED = ("cpu", "disk")


def require_one_place(device: str | None, device_map: DeviceMap | None) -> None:
    """UserError for a device beside a map."""
    if device not in (None, "auto") and device_map is not None:
        raise UserError("a device and a device map are given, and a model is placed by one of them; leave one out")


def read_device_map(given: DeviceMap | None, config: Callable[[], Any]) -> str | dict[str, str | int] | None:
    """The map as transformers takes it, for a model of the configuration that is asked for.

    UserError, before any weights are read, for a file that holds no map, modules that there are not or that are left
    out, and devices that this machine hasn't.
    """
    if given is None:
        return None
    require_extra("finetune", "a device map")
    if isinstance(given, str) and given in CHOSEN:
        return given
    places, what = (_in_file(given), f"the device map {given!r}") if isinstance(given, str) else (given, "the map")
    for name, device in places.items():
        _require_there(device, f"{what} puts {name or 'the model'} on {device!r}")
    _require_one_kind(places, what)
    return dict(places) if list(places) == [""] else _whole(places, config(), what)


def _in_file(given: str) -> Mapping[str, str | int]:
    """What a JSON file holds; a name that is no file's is that of a device for everything."""
    path = user_path(given)
    if not path.is_file():
        if given.endswith(".json") or "/" in given:
            raise UserError(f"there is no device map {given!r}; check the path")
        return {"": given}
    try:
        places = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the device map {given!r} can't be read as JSON: {error}") from error
    right = isinstance(places, dict) and all(type(device) in (str, int) for device in places.values())
    if not right or not places:
        raise UserError(
            f'the device map {given!r} must be a JSON object of module names and devices, such as {{"model": 0, '
            '"lm_head": "cpu"}'
        )
    return dict(places)


def _require_there(device: str | int, said: str) -> None:
    if device in OFFLOADED:
        return
    try:
        wanted = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError as error:
        raise UserError(f"{said}, which is no device; give cpu, disk, cuda or a GPU's number, or 'auto'") from error
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if kind is not None and kind.type == wanted.type else 0
    if (wanted.index or 0) >= count:
        raise UserError(f"{said}, and this machine has {count} of that kind; choose others, or 'auto'")


def _require_one_kind(places: Mapping[str, str | int], what: str) -> None:
    if len({device in OFFLOADED for device in places.values()}) > 1:
        raise UserError(
            f"{what} has parts on GPUs and others on the CPU or the disk, which TransformerLens doesn't take; "
            "put all on GPUs, or none"
        )


def _whole(places: Mapping[str, str | int], config: Any, what: str) -> dict[str, str | int]:
    """The map with tied ends named both; UserError for names that no module has, and weights that no name covers."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        outline = AutoModelForCausalLM.from_config(config)
    weights = [name for name, _ in (*outline.named_parameters(), *outline.named_buffers())]
    known = {name for name, _ in outline.named_modules()} | set(weights)
    if odd := [name for name in places if name not in known]:
        raise UserError(
            f"{what} names {odd[0]!r}, and {type(outline).__name__} has no such module; its modules are called as in "
            f"{', '.join(name for name, _ in outline.named_parameters())[:120]}..."
        )
    found = dict(places)
    for one, other in getattr(outline, "all_tied_weights_keys", {}).items():
        ends = _covering(places, one), _covering(places, other)
        if None not in ends and places[str(ends[0])] != places[str(ends[1])]:
            raise UserError(
                f"{what} puts {ends[0]} and {ends[1]} in different places, and their weights are one matrix in this "
                "model; give them the same"
            )
        for end, name, given in ((one, *ends), (other, *ends[::-1])):
            if name is None and given is not None:
                found[end.rpartition(".")[0]] = places[given]
    if left := [one for one in weights if _covering(found, one) is None]:
        raise UserError(f"{what} says of {len(left)} weights nothing, such as {left[0]}; give each module a device")
    return found


def _covering(places: Mapping[str, str | int], weight: str) -> str | None:
    """The name in the map that a weight lies under, the longest of several."""
    found = [name for name in places if name in ("", weight) or weight.startswith(f"{name}.")]
    return max(found, key=len) if found else None


def require_off_disk(places: str | Mapping[str, str | int] | None, dtype: str) -> None:
    """UserError for weights of a type that can't lie on the disk."""
    if isinstance(places, Mapping) and "disk" in places.values():
        raise UserError(f"{dtype} weights can't lie on the disk; give a map without it, or another --dtype")


def offload_folder(places: str | Mapping[str, str | int] | None, folder: Path) -> dict[str, str]:
    """An argument of from_pretrained: where weights go that can't be fetched from the checkpoint as they are."""
    if not (isinstance(places, str) or "disk" in (places or {}).values()):
        return {}
    return {"offload_folder": str(folder / f"offloaded-{uuid4().hex}")}  # made where it is needed


def drop_with(model: nn.Module, folder: Mapping[str, str]) -> None:
    """Removes the `offload_folder` when the model is let go, or the process ends."""
    for path in folder.values():
        weakref.finalize(model, shutil.rmtree, path, ignore_errors=True)


def fetch_by_block(hf_model: nn.Module) -> None:
    """Has all weights of a block in memory as long as the block runs.

    accelerate has each module's own as long as that module runs, and what reads a module's weight without calling it
    (state-space mixers, TransformerLens' components) would compute with none. TransformerLens gives the blocks of some
    models another `forward`, so this is asked for again after it.
    """
    if not weights_elsewhere(hf_model):
        return
    for block in map(plain_module, blocks_of(hf_model)):
        ready = getattr(block.forward, "func", None) is _with_its_weights
        if weights_elsewhere(block) and not ready:
            block.forward = partial(_with_its_weights, block, block.forward)


def _with_its_weights(block: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    parts = [(part, hook) for part in block.modules() if (hook := _offloading(part)) is not None]
    with contextlib.ExitStack() as stack:
        for part, hook in parts:
            stack.callback(hook.post_forward, part, None)
            hook.pre_forward(part)
            hook.offload = False  # a call within the block neither fetches nor drops them
            stack.callback(setattr, hook, "offload", True)
        return run(*args, **kwargs)


class _NoneMissing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """RuntimeError for an operation with weights that aren't in memory, which PyTorch may give any numbers for, and
    for one that writes to them, which nothing would come of."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        written = name.endswith("_") and bool(tensors) and tensors[0].is_meta
        if written or len({x.is_meta for x in tensors if x.ndim}) > 1:
            raise RuntimeError(f"{name} is run with weights that are on the disk")
        return func(*args, **(kwargs or {}))


def require_fetched(hf_model: nn.Module, run: Callable[[], Any]) -> None:
    """UserError where a pass of a model in parts computes with weights that weren't fetched for it."""
    if not weights_elsewhere(hf_model):
        return
    try:
        with _NoneMissing():  # type: ignore[no-untyped-call]
            run()
    except RuntimeError as error:
        raise UserError(f"{type(hf_model).__name__} can't be run in parts: {error}; load it whole") from error


def where_run(module: nn.Module) -> torch.device:
    """Where a module computes: where its first weight lies, or is fetched to."""
    weight = next(iter(module.parameters()))
    hooks = (hook for part in module.modules() if (hook := _offloading(part)) is not None)
    if weight.is_meta and (hook := next(hooks, None)) is not None:
        return torch.device(hook.execution_device)
    return weight.device


def weights_elsewhere(whole: nn.Module) -> dict[str, Elsewhere]:
    """Weights and buffers that are fetched before each call, by their names in the model."""
    if not any(_offloading(part) for part in whole.modules()):
        return {}
    return {
        f"{path}.{name}" if path else name: Elsewhere(value, partial(_fetched, hook, name, value))
        for path, part in whole.named_modules(remove_duplicate=False)
        if (hook := _offloading(part)) is not None
        for name, value in (*part._parameters.items(), *part._buffers.items())
        if value is not None and value.is_meta
    }


def as_they_lie(state: Mapping[str, Tensor], whole: nn.Module) -> dict[str, Tensor | Elsewhere]:
    """A model's state with values to be fetched in place of those that are not in memory."""
    away = weights_elsewhere(whole)
    return {name: away.get(name, value) for name, value in state.items()}


def weight_of(module: nn.Module) -> Tensor:
    """A module's weight, fetched if it isn't in memory."""
    found = weights_elsewhere(module).get("weight")
    weight: Tensor = module.weight if found is None else found.read()  # type: ignore[assignment]
    return weight


def require_in_memory(whole: nn.Module, what: str) -> None:
    """UserError where weights are off-loaded, as what is written to them wouldn't last; `what` can't be done so."""
    if found := next(iter(weights_elsewhere(whole)), None):
        raise UserError(f"{found} is off-loaded, so {what}; load the model whole, without a part on the disk")


def _offloading(module: nn.Module) -> Any:
    """accelerate's hook that fetches this module's own weights; None where they stay."""
    pending = [module.__dict__.get("_hf_hook")]  # not by getattr, by which TransformerLens' components show another's
    while pending:
        hook = pending.pop()
        pending += getattr(hook, "hooks", ())
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            return hook
    return None


def _fetched(hook: Any, name: str, like: Tensor) -> Tensor:
    value: Tensor = hook.weights_map[name]
    return value.to(like.dtype)  # as accelerate does it
