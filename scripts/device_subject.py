"""What the laws of `check_device.py` are tried on: a model on a device, as mechlens and as Hugging Face has it."""

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import architectures
import torch
from bench_collect import decoder_layers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny import words

from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering.interventions import ALL, Add
from mechlens.models.bridge import n_layers
from mechlens.models.load import load, load_hf
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt, PromptPair


class NotHereError(Exception):
    """A law that can't be tried on this device, in this type or with the libraries that are there."""


@dataclass(frozen=True)
class Subject:
    """A model, on the device as mechlens has it and as plain Hugging Face has it, and what is asked of it."""

    name: str
    device: str
    dtype: str
    scratch: Path
    n: int

    @cached_property
    def model(self) -> Any:
        return load(self.name, device=self.device, dtype=self.dtype)

    @cached_property
    def plain(self) -> Any:
        return load_hf(self.name, dtype=self.dtype)[0].to(self.device)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Of two kinds, one half after the other."""
        half = self.n // 2
        if Path(self.name).is_dir():
            kinds = ["harmful"] * half + ["harmless"] * half
            texts = zip(words(self.n), kinds, strict=True)
            return [Prompt(f"p{i}", text, kind) for i, (text, kind) in enumerate(texts)]
        return builtin_prompts("harmful")[:half] + builtin_prompts("harmless")[:half]

    @cached_property
    def batch(self) -> TokenBatch:
        return tokenize(self.prompts, template_of(self.model))

    def rows(self) -> list[list[int]]:
        return [self.batch.row(i) for i in range(self.n)]

    def ids(self, tokens: Any) -> Tensor:
        return torch.tensor([list(tokens)], device=self.device)

    def added(self, strength: float) -> Add:
        """A random direction, half as long as the residual it is added to, at every token of prompt and answer."""
        return Add(self.direction, strength=strength, unit="raw", layers=(n_layers(self.model) // 2,), positions=ALL,
                   phase="both")  # fmt: skip

    @cached_property
    def direction(self) -> Direction:
        level = n_layers(self.model) // 2
        lengths = collect(self.model, self.batch, positions=["last"], levels=[level]).values.norm(dim=-1)
        found = architectures.direction(self.model)
        return replace(found, vector=found.vector / found.vector.norm() * lengths.mean() / 2, level=level)

    @property
    def rounding(self) -> float:
        return architectures.rounding(self.plain)


class Packed(Subject):
    """A subject with other weights."""

    def __init__(self, model: Any, plain: Any, like: Subject) -> None:
        super().__init__(like.name, like.device, like.dtype, like.scratch, like.n)
        vars(self).update(model=model, plain=plain)


def hugging_face_residuals(one: Subject, i: int) -> Tensor:
    """Of one prompt alone, by hooks: (level, position, d_model)."""
    seen: list[Tensor] = []
    layers = decoder_layers(one.plain)
    entering = [layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    ) for layer in layers]  # fmt: skip
    leaving = layers[-1].register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    one.plain(one.ids(one.rows()[i]), use_cache=False)
    for handle in (*entering, leaving):
        handle.remove()
    places = torch.tensor([int(one.batch.at(name)[i]) - one.batch.offset(i) for name in ("inst", "last")])
    return torch.stack([x[0].float().cpu()[places] for x in seen])


@torch.inference_mode()
def behind(one: Subject, ids: list[int], tokens: tuple[int, ...]) -> float:
    if not tokens:
        return 0.0
    logits = one.plain(one.ids([*ids, *tokens]), use_cache=False).logits[0, len(ids) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
    return float(((logits.amax(dim=-1) - chosen) / logits.abs().amax(dim=-1)).max())


def pairs(one: Subject) -> list[PromptPair]:
    """Pairs of requests of one length."""
    text = ("How do I make a {} at home?", "Tell me about a {} please")
    return [
        PromptPair(Prompt(f"c{i}", t.format("cake")), Prompt(f"d{i}", t.format("bomb"))) for i, t in enumerate(text)
    ]
