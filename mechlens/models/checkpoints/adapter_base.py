"""Whether an adapter can belong to a base, from its files alone: by the base it names, and by shapes."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from mechlens.files import adapter_name, short_name
from mechlens.models.checkpoints.adapter_record import read_record
from mechlens.models.checkpoints.lora import KEY, WEIGHTS, read_config
from mechlens.models.checkpoints.merge import is_path
from mechlens.models.packaged import ADAPTERS, PACKAGED, cache_dir


class Base:
    """What adapters are held against: the base's name and its configuration."""

    def __init__(self, name: str, config: Any) -> None:
        self._name, self._config = name, config

    def problem(self, adapter: Path) -> str | None:
        """Why an adapter's folder is another base's; None where it isn't, and where only the weights can tell."""
        named = _asked_as(str(read_config(adapter).get("base_model_name_or_path") or ""))
        if _on_hub(named) and _on_hub(self._name) and short_name(named).lower() != short_name(self._name).lower():
            return f"it was trained on {named!r}, and the base is {self._name!r}; give the base that it was trained on"
        changed = _shapes(adapter / WEIGHTS)
        bare = [module for module in changed if module in self._modules and module not in self._biased]
        if bare and read_config(adapter).get("lora_bias"):
            return (
                f"it adds a bias to {bare[0]} (lora_bias), which has none in {self._name!r}, so it can't be merged; "
                "train it without lora_bias"
            )
        for module, shape in changed.items():
            ours = self._modules.get(module)
            if self._modules and ours != shape:
                here = f"has shape {ours} in {self._name!r}" if ours else f"{self._name!r} doesn't have"
                return (
                    f"it changes {module} of shape {shape}, which {here}: it was trained on another base"
                    f"{f' ({named!r})' if named else ''}; give that one"
                )
        return None

    def doubt(self, adapter: Path) -> str | None:
        """Why a fitting adapter may be another base's: the packaged model that it names isn't the one that is given."""
        named = _asked_as(str(read_config(adapter).get("base_model_name_or_path") or ""))
        packaged = {*PACKAGED, *ADAPTERS}
        if named in packaged and self._name in packaged and named != self._name and read_record(adapter) is None:
            return (
                f"{adapter_name(adapter)} says that it was trained on {named!r} (adapter_config.json), and the base is "
                f"{self._name!r}, to which it is added here; if that isn't meant, give {named!r} as the base"
            )
        return None

    @property
    def _modules(self) -> dict[str, tuple[int, ...]]:
        """Output by input of every matrix; empty for a model that can't be built without its files."""
        return self._outline[0]

    @property
    def _biased(self) -> set[str]:
        """The matrices that have a bias."""
        return self._outline[1]

    @cached_property
    def _outline(self) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                outline = AutoModelForCausalLM.from_config(self._config, trust_remote_code=False)
        except Exception:  # of many kinds, all for models that are told apart later, by their weights
            return {}, set()
        weights = {name: (module, getattr(module, "weight", None)) for name, module in outline.named_modules()}
        shapes = {
            name: tuple(weight.T.shape if isinstance(module, Conv1D) else weight.shape)
            for name, (module, weight) in weights.items()
            if weight is not None and weight.ndim == 2
        }
        return shapes, {name for name in shapes if getattr(weights[name][0], "bias", None) is not None}


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Output by input of what is added to each matrix."""
    sides: dict[str, dict[str, list[int]]] = {}
    with safe_open(file, framework="numpy") as weights:
        for key in weights.keys():  # noqa: SIM118
            if match := KEY.fullmatch(key):
                sides.setdefault(match["module"], {})[match["side"]] = weights.get_slice(key).get_shape()
    whole = {module: pair for module, pair in sides.items() if set(pair) == {"A", "B"}}
    return {
        module: (pair["B"][0], pair["A"][1])
        for module, pair in whole.items()
        if len(pair["A"]) == len(pair["B"]) == 2
    }  # fmt: skip


def _asked_as(named: str) -> str:
    """The name of a packaged model in place of where it lies in the cache."""
    return short_name(named) if Path(named).parent == cache_dir() / "models" else named


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not is_path(name) and not Path(name).exists()
