"""Activation patching against transformer_lens.patching: same pairs, same sites, one process.

    .venv/bin/python scripts/bench_patching.py [--model smollm2] [--pairs 8]

TransformerLens does one forward pass per site, every site at the same cost, so it is timed on an evenly spread
subset of the sites (--peer-sites) and scaled; the largest difference is over that subset. The floor is the
arithmetic of what an edit changes (blocks above it, tokens from it on) at the matrix-product rate of this process.
"""

import argparse
import json
import resource
import time
from collections import Counter
from dataclasses import dataclass

import pandas as pd
import torch
from transformer_lens import patching as peer

from mechlens.methods.metrics import LogitDifference
from mechlens.methods.patch_plan import PatchPlan
from mechlens.methods.patching import patch_sweep
from mechlens.models.bridge import loaded, site_hook
from mechlens.models.load import load
from mechlens.prompts.batch import tokenize
from mechlens.prompts.builtin import builtin_pairs
from mechlens.prompts.template import ChatTemplate, chat_template


@dataclass(frozen=True)
class Case:
    """One grid of sites."""

    site: str
    positions: tuple[int, ...]
    heads: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--peer-sites", type=int, default=60)
    options = parser.parse_args()
    model = load(options.model)
    tokenizer = loaded(model).tokenizer
    if tokenizer.chat_template is None:  # a base model: a plain frame serves the timing as well
        tokenizer.chat_template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant:"
    template = chat_template(tokenizer)
    pairs = one_length(template, options.pairs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "one_pair": {
            name: measure(model, template, pairs[:1], case, options) for name, case in cases(template, pairs[:1])
        },
        "eight_pairs": {name: measure(model, template, pairs, case, options) for name, case in cases(template, pairs)},
    }
    growth(model, template, pairs)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({**result, "peak_extra_mb": round(peak)}))


def one_length(template: ChatTemplate, n: int) -> list:
    """Built-in pairs whose prompts all have the commonest length."""
    pairs = builtin_pairs()
    lengths = tokenize([pair.clean for pair in pairs], template).lengths.tolist()
    others = tokenize([pair.corrupt for pair in pairs], template).lengths.tolist()
    same = [i for i in range(len(pairs)) if lengths[i] == others[i]]
    common = Counter(lengths[i] for i in same).most_common(1)[0][0]
    return [pairs[i] for i in same if lengths[i] == common][:n]


def cases(template: ChatTemplate, pairs: list) -> list[tuple[str, Case]]:
    clean, corrupt = (tokenize([getattr(pair, side) for pair in pairs], template) for side in ("clean", "corrupt"))
    length = clean.tokens.shape[1]
    first = int((clean.tokens != corrupt.tokens).any(dim=0).int().argmax())
    return [
        ("resid_pre_all", Case("resid_pre", tuple(range(length)), False)),
        ("resid_pre_from_first_difference", Case("resid_pre", tuple(range(first, length)), False)),
        ("z_last", Case("z", (length - 1,), True)),
    ]


def measure(model, template, pairs: list, case: Case, options) -> dict:
    metric = LogitDifference(*answer_tokens(model, template, pairs[0]))
    plan = PatchPlan(case.site, positions=tuple(f"token[{k}]" for k in case.positions))
    start = time.perf_counter()
    ours = patch_sweep(model, pairs, metric, plan, template=template)
    took = time.perf_counter() - start
    peer_took, difference, sites = run_peer(model, template, pairs, case, metric, ours, options.peer_sites)
    floor = floor_seconds(
        model, case, ours.values.shape, len(pairs), tokenize([pairs[0].clean], template).tokens.shape[1]
    )
    row = {
        "ratio": round(peer_took / took, 2),
        "max_abs_diff": float(f"{difference:.2g}"),
        "share_of_floor": round(floor / took, 2),
    }
    print(
        f"{len(pairs)} pair(s) {case.site:10s} {ours.values[0].numel():5d} sites: mechlens {took:7.1f} s "
        f"({ours.engine}), "
        f"TransformerLens {peer_took:7.1f} s (from {sites} sites), ratio {row['ratio']}, "
        f"largest difference {row['max_abs_diff']}, floor {floor:.1f} s",
        flush=True,
    )
    return row


def answer_tokens(model, template, pair) -> tuple[int, int]:
    """The tokens that the clean and the corrupt prompt favour next."""
    batch = tokenize([pair.clean, pair.corrupt], template)
    with torch.inference_mode():
        tops = [int(model(torch.tensor([batch.row(i)]))[0, -1].argmax()) for i in (0, 1)]
    return (tops[0], tops[1]) if tops[0] != tops[1] else (tops[0], (tops[0] + 1))


@torch.inference_mode()
def run_peer(model, template, pairs: list, case: Case, metric, ours, budget: int) -> tuple[float, float, int]:
    """Seconds of TransformerLens for the whole grid, the largest difference, and the sites it was timed on."""
    clean, corrupt = (tokenize([getattr(pair, side) for pair in pairs], template) for side in ("clean", "corrupt"))
    names = {site_hook(case.site, layer) for layer in ours.layers}
    _, cache = model.run_with_cache(clean.tokens, names_filter=lambda name: name in names)
    axes = [(layer, pos, head) for layer in ours.layers for pos in case.positions for head in (ours.heads or (0,))]
    picked = axes[:: max(1, len(axes) // budget)]
    columns = ["layer", "pos", "head"] if case.heads else ["layer", "pos"]
    index = pd.DataFrame([axis[: len(columns)] for axis in picked], columns=columns)
    setter = peer.layer_pos_head_vector_patch_setter if case.heads else peer.layer_pos_patch_setter
    found = []

    def keep(logits):
        found.append(metric(logits[:, -1].float(), logits[0, -1]))
        return found[-1].mean()

    start = time.perf_counter()
    peer.generic_activation_patch(model, corrupt.tokens, cache, keep, setter, case.site, index_df=index)
    took = (time.perf_counter() - start) * len(axes) / len(picked)
    flat = {axis: k for k, axis in enumerate(axes)}
    mine = ours.values.flatten(1)[:, [flat[axis] for axis in picked]].T
    return took, float((torch.stack(found) - mine).abs().max()), len(picked)


def floor_seconds(model, case: Case, shape, n_pairs: int, length: int) -> float:
    """The changed rectangle's multiplications at the rate of one of this model's own matrix products."""
    layers = shape[1]
    per_token_block = sum(p.numel() for p in model.blocks[0].parameters()) * 2
    sites = sum((layers - layer) * (length - pos) for layer in range(layers) for pos in case.positions)
    weight = next(p for p in model.blocks[0].parameters() if p.ndim == 2)
    x = torch.randn(1024, weight.shape[1])
    with torch.inference_mode():
        x @ weight.T
        start = time.perf_counter()
        for _ in range(20):
            x @ weight.T
        rate = 20 * 2 * 1024 * weight.numel() / (time.perf_counter() - start)
    return n_pairs * sites * shape[3] * per_token_block / rate


def growth(model, template, pairs: list) -> None:
    """How the cost grows with layers, positions and pairs."""
    metric = LogitDifference(1, 2)
    length = tokenize([pairs[0].clean], template).tokens.shape[1]
    layers = model.cfg.n_layers
    for what, n_layers, n_positions, n_pairs in (
        ("all layers, last 4 positions", layers, 4, 1),
        ("half the layers (upper)", layers // 2, 4, 1),
        ("twice the positions", layers, 8, 1),
        ("two pairs", layers, 4, 2),
    ):
        plan = PatchPlan(
            "resid_pre",
            layers=tuple(range(layers - n_layers, layers)),
            positions=tuple(f"token[{k}]" for k in range(length - n_positions, length)),
        )
        start = time.perf_counter()
        patch_sweep(model, pairs[:n_pairs], metric, plan, template=template)
        print(f"cost: {what:32s} {time.perf_counter() - start:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
