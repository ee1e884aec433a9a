"""Logits after continuations of prompts that branch: every prompt is run once, and then one token for each branch."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from mechlens.models.bridge import LanguageModel, n_layers, unembed
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.generate import head_shown
from mechlens.models.engine.packed.packing import PIECE, Packing, pack, pack_prompts, packed_pass, packs, plan_packed
from mechlens.models.engine.probes import finite_on_cpu
from mechlens.models.native import native

Node = tuple[int, tuple[int, ...]]
"""A prompt's number, and the tokens that follow it."""
Prompt = Sequence[int]


@runtime_checkable
class Branches(Protocol):
    """Some prompts and what has been said after them so far."""

    def logits(self, nodes: Sequence[Node]) -> Float[Tensor, "node vocab"]:
        """Logits of the token that comes after each node (float32, on the CPU).

        The prompts themselves are asked for first, all at once, and then nodes that are as long as each other, whose
        paths but for the last token were asked for before.
        """
        ...


def plan_branches(model: LanguageModel, prompts: Sequence[Prompt], longest: int, max_tokens: int) -> list[list[int]]:
    """Numbers of the prompts whose branches are followed together; at most `longest` tokens follow a prompt."""
    if _packs(model, prompts, longest):
        return plan_packed(prompts, max_tokens, 0)
    return [[i] for i in range(len(prompts))]


def branches(model: LanguageModel, prompts: Sequence[Prompt], longest: int) -> Branches:
    """What follows the prompts of one of `plan_branches`' groups."""
    if _packs(model, prompts, longest):
        return _InOneLine(model, prompts)
    (prompt,) = prompts
    return _RowByRow(model, prompt)


def _packs(model: LanguageModel, prompts: Sequence[Prompt], longest: int) -> bool:
    return forward.fits_fast_path(model) and packs(model, max(map(len, prompts)) + longest)


class _InOneLine:
    """All prompts and branches in one line of keys and values; each branch attends to its own path alone."""

    def __init__(self, model: LanguageModel, prompts: Sequence[Prompt]) -> None:
        self.model, self.prompts = model, prompts
        self.cache = DynamicCache()
        self.trees: list[_Tree] = []

    @torch.inference_mode()
    def logits(self, nodes: Sequence[Node]) -> Float[Tensor, "node vocab"]:
        if not self.trees:
            packing, paths = pack_prompts(self.prompts, 0)
            self.trees = [_Tree(path, len(path), {}) for path in paths]
            return self._run(packing, [self.trees[i].keys[-1] for i, _ in nodes])
        return self._run(self._packed(nodes), range(len(nodes)))

    def _packed(self, nodes: Sequence[Node]) -> Packing:
        """New tokens of a prompt side by side in one row, so that its keys are fetched once for all of them."""
        skip = self.cache.get_seq_length()
        new = [(self.trees[i], [path for _, path in own]) for i, own in itertools.groupby(nodes, lambda node: node[0])]
        packing = pack([(tree.keys, [path[-1] for path in paths]) for tree, paths in new], skip)
        hidden = torch.ones(*packing.own.shape, packing.keys.shape[1], dtype=torch.bool)
        positions: list[int] = []
        piece = 0
        for tree, paths in new:
            tree.grow(paths, skip + len(positions))
            positions += [tree.size + len(path) - 1 for path in paths]
            for at in range(0, len(paths), PIECE):
                for k, path in enumerate(paths[at : at + PIECE]):
                    hidden[piece, k, tree.seen(path)] = False
                piece += 1
        return replace(packing, positions=torch.tensor(positions), hidden=hidden)

    def _run(self, packing: Packing, ends: Sequence[int]) -> Float[Tensor, "node vocab"]:
        places = torch.tensor(ends)
        with native(self.model) as hf_model, head_shown(hf_model, torch.zeros_like(places), places) as cut:
            return finite_on_cpu(cut(packed_pass(self.model, hf_model, packing, self.cache).logits))


@dataclass
class _Tree:
    """A prompt and its branches: where in the line each of its tokens stands."""

    keys: list[int]
    size: int
    """Tokens of the prompt, which come first."""
    column: dict[tuple[int, ...], int]
    """Which of the keys is the last token of a path."""

    def grow(self, paths: Sequence[tuple[int, ...]], first: int) -> None:
        """The last tokens of these paths stand in the line from `first` on."""
        self.column |= {path: len(self.keys) + k for k, path in enumerate(paths)}
        self.keys = [*self.keys, *range(first, first + len(paths))]

    def seen(self, path: tuple[int, ...]) -> list[int]:
        """The keys of a path: the prompt, and what was said after it so far."""
        return [*range(self.size), *(self.column[path[:n]] for n in range(1, len(path) + 1))]


class _RowByRow:
    """Branches of one prompt, on its keys and values; where a model doesn't cache those, by whole passes."""

    def __init__(self, model: LanguageModel, prompt: Prompt) -> None:
        self.model, self.prompt = model, prompt
        self.fast = forward.fits_fast_path(model)
        self.start = forward.prefix_cache(model, prompt[:-1]) if self.fast else None

    def logits(self, nodes: Sequence[Node]) -> Float[Tensor, "node vocab"]:
        rows = [Row((*self.prompt, *path), (len(self.prompt) + len(path) - 1,)) for _, path in nodes]
        levels = [n_layers(self.model)]
        if self.fast:
            residual = forward.fast_batch(self.model, rows, levels, self.start)
        else:
            residual = forward.reference_batch(self.model, rows, levels)
        return unembed(self.model, residual[:, 0, 0])
