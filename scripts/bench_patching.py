"""Activation patching against transformer_lens.patching: same pairs, same sites, one process.

    .venv/bin/python scripts/bench_patching.py [--model smollm2] [--quick]

TransformerLens does one forward pass per site, every site at the same cost, so it is timed on an evenly spread
subset of the sites (--peer-sites) and scaled; the largest difference is over that subset. Both sides are warmed up
on one site; what the first sweep of a site kind costs mechlens besides, the check that the engine fits, is printed.
The floor is the arithmetic of what an edit changes (blocks above it, tokens from it on; nothing before the first token
that differs) at the rate of this process for the model's own matrix products. The last line is one JSON object.
"""

import argparse
import json
import resource
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from both_models import add_options, both, clock, where
from torch import Tensor
from transformer_lens import patching as peer

from mechlens.methods.patching.metrics import LogitDifference
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.result import PatchResult
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.models.bridge import device_of, loaded, n_layers
from mechlens.models.engine.growing import can_grow
from mechlens.models.native import native, native_blocks
from mechlens.models.sites import site_hook
from mechlens.prompts.batch import tokenize
from mechlens.prompts.builtin import builtin_pairs
from mechlens.prompts.prompt import PromptPair
from mechlens.prompts.templates.template import ChatTemplate, chat_template

FRAME = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant:"
"""For a base model, which has no chat template: the timing is the same."""


@dataclass(frozen=True)
class Case:
    """One grid of sites on pairs of one length."""

    name: str
    site: str
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    clean: Tensor
    corrupt: Tensor
    metric: LogitDifference

    @property
    def plan(self) -> PatchPlan:
        return PatchPlan(self.site, layers=self.layers, positions=tuple(f"token[{k}]" for k in self.positions))


def main() -> None:
    warnings.filterwarnings("error", ".*takes the plain path")  # this measures the fast one
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "smollm2")
    parser.add_argument("--peer-sites", type=int, default=60, help="sites that TransformerLens is timed on")
    parser.add_argument("--quick", action="store_true", help="four layers, few sites: does it run? No result")
    options = parser.parse_args()
    model, hf_model = both(options)
    print(f"{options.model} ({where(hf_model)})")
    del hf_model
    tokenizer = loaded(model).tokenizer
    tokenizer.chat_template = tokenizer.chat_template or FRAME
    template = chat_template(tokenizer)
    pairs = one_length(template, 8)
    count = n_layers(model)
    layers = tuple(range(0, count, -(-count // 4))) if options.quick else tuple(range(count))
    sites = 4 if options.quick else options.peer_sites
    warm_up(model, template, pairs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result: dict[str, Any] = {
        name: {case.name: measure(model, template, some, case, sites) for case in cases(model, template, some, layers)}
        for name, some in (("one_pair", pairs[:1]), ("eight_pairs", pairs))
    }
    growth(model, template, pairs, layers)
    # The process's peak, so what TransformerLens took is in it.
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({**result, "peak_extra_mb": round(peak)}))


def one_length(template: ChatTemplate, n: int) -> list[PromptPair]:
    """Built-in pairs whose prompts all have the commonest length."""
    pairs = builtin_pairs()
    clean, corrupt = (tokenize([getattr(pair, side) for pair in pairs], template) for side in ("clean", "corrupt"))
    lengths = clean.lengths.tolist()
    same = [i for i, other in enumerate(corrupt.lengths.tolist()) if lengths[i] == other]
    common = Counter(lengths[i] for i in same).most_common(1)[0][0]
    return [pairs[i] for i in same if lengths[i] == common][:n]


def cases(model: Any, template: ChatTemplate, pairs: list[PromptPair], layers: tuple[int, ...]) -> list[Case]:
    sides = [tokenize([getattr(pair, side) for pair in pairs], template).tokens for side in ("clean", "corrupt")]
    length = sides[0].shape[1]
    first = int((sides[0] != sides[1]).any(dim=0).int().argmax())
    metric = LogitDifference(*favoured(model, *sides))
    every, late, last = tuple(range(length)), tuple(range(first, length)), (length - 1,)
    return [
        Case("resid_pre_all", "resid_pre", layers, every, *sides, metric),
        Case("resid_pre_from_first_difference", "resid_pre", layers, late, *sides, metric),
        Case("z_last", "z", layers, last, *sides, metric),
    ]


@torch.inference_mode()
def favoured(model: Any, clean: Tensor, corrupt: Tensor) -> tuple[int, int]:
    """The tokens that the first pair's clean and corrupt prompt favour next."""
    a, b = (int(model(tokens[:1].to(device_of(model)))[0, -1].argmax()) for tokens in (clean, corrupt))
    return a, b if a != b else a + 1


def warm_up(model: Any, template: ChatTemplate, pairs: list[PromptPair]) -> None:
    for case in cases(model, template, pairs[:1], (0,))[1:]:
        start = clock()
        can_grow(model, case.site)
        print(f"{case.site}: the growing batch fits, found in {clock() - start:.2f} s", flush=True)
        ours = patch_sweep(model, pairs[:1], case.metric, case.plan, template=template)
        by_transformer_lens(model, case, ours, 1)


def measure(model: Any, template: ChatTemplate, pairs: list[PromptPair], case: Case, sites: int) -> dict[str, float]:
    start = clock()
    ours = patch_sweep(model, pairs, case.metric, case.plan, template=template)
    took = clock() - start
    peer_took, difference, timed = by_transformer_lens(model, case, ours, sites)
    floor = floor_seconds(model, case, ours)
    print(
        f"{len(pairs)} pair(s), {case.name}, {ours.values[0].numel()} sites: mechlens {took:.2f} s ({ours.engine}), "
        f"TransformerLens {peer_took:.2f} s (from {timed} sites), ratio {peer_took / took:.2f}, largest difference "
        f"{difference:.1e}, floor {floor:.2f} s",
        flush=True,
    )
    return {
        "ratio": round(peer_took / took, 2),
        "max_abs_diff": float(f"{difference:.2g}"),
        "share_of_floor": round(floor / took, 2),
    }


@torch.inference_mode()
def by_transformer_lens(model: Any, case: Case, ours: PatchResult, sites: int) -> tuple[float, float, int]:
    """Seconds for the whole grid, the largest difference, and the number of sites that were timed."""
    names = {site_hook(case.site, layer) for layer in ours.layers}
    start = clock()
    _, cache = model.run_with_cache(case.clean.to(device_of(model)), names_filter=lambda name: name in names)
    once = clock() - start
    axes = [(layer, pos, head) for layer in ours.layers for pos in case.positions for head in (ours.heads or (0,))]
    picked = axes[:: max(1, len(axes) // sites)]
    columns = ["layer", "pos", "head"] if ours.heads else ["layer", "pos"]
    index = pd.DataFrame([axis[: len(columns)] for axis in picked], columns=columns)
    setter = peer.layer_pos_head_vector_patch_setter if ours.heads else peer.layer_pos_patch_setter
    found = []

    def keep(logits: Tensor) -> Tensor:
        found.append(case.metric(logits[:, -1].float(), logits[0, -1]))
        return found[-1].mean()

    start = clock()
    peer.generic_activation_patch(
        model, case.corrupt.to(device_of(model)), cache, keep, setter, case.site, index_df=index
    )
    took = once + (clock() - start) * len(axes) / len(picked)
    place = {axis: k for k, axis in enumerate(axes)}
    mine = ours.values.flatten(1)[:, [place[axis] for axis in picked]].T
    return took, float((torch.stack(found).cpu() - mine).abs().max()), len(picked)


def floor_seconds(model: Any, case: Case, ours: PatchResult) -> float:
    """The changed rectangle's multiplications at the rate of one of this model's own matrix products."""
    blocks, length = n_layers(model), case.clean.shape[1]
    per_token_block = sum(p.numel() for p in model.blocks[0].parameters()) * 2
    firsts = (case.clean != case.corrupt).int().argmax(dim=1).tolist()
    tokens = sum(length - pos for first in firsts for pos in case.positions if pos >= first)
    changed = tokens * sum(blocks - layer for layer in case.layers)
    with torch.inference_mode(), native(model):
        linear = next(m for m in native_blocks(model)[0].modules() if type(m) is torch.nn.Linear)
        x = torch.randn(1024, linear.in_features).to(linear.weight)
        linear(x)
        start = clock()
        for _ in range(20):
            linear(x)
        rate = 20 * 2 * 1024 * linear.weight.numel() / (clock() - start)
    return changed * ours.values.shape[3] * per_token_block / rate


def growth(model: Any, template: ChatTemplate, pairs: list[PromptPair], layers: tuple[int, ...]) -> None:
    """How the cost grows with layers, positions and pairs."""
    length = tokenize([pairs[0].clean], template).tokens.shape[1]
    upper = layers[len(layers) // 2 :]
    for what, some, positions, n in (
        ("last 4 positions", layers, 4, 1),
        ("the upper half of the layers", upper, 4, 1),
        ("8 positions", layers, 8, 1),
        ("16 positions", layers, 16, 1),
        ("2 pairs", layers, 4, 2),
        ("4 pairs", layers, 4, 4),
    ):
        plan = PatchPlan("resid_pre", some, tuple(f"token[{k}]" for k in range(length - positions, length)))
        start = clock()
        patch_sweep(model, pairs[:n], LogitDifference(1, 2), plan, template=template)
        print(f"cost: {what:30s} {clock() - start:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
