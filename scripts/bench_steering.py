"""Steering sweeps and direction selection against plain Hugging Face with hooks, in one process.

    .venv/bin/python scripts/bench_steering.py [--model smollm2-refuser] [--quick]

(a) The refusal rate of 32 prompts under an addition at every layer, at three strengths, answers of up to 24 tokens:
    mechlens answers all settings together; Hugging Face runs one batched `generate` with a hook for each setting, and,
    on an evenly spread subset (--single of them), one prompt at a time as published; that is scaled to all.
(b) Bypass, induce and KL scores of every post-instruction position and layer on 32 + 32 prompts: the published loop
    runs three hooked passes for each candidate, on an evenly spread subset (--peer-candidates), and is scaled to all;
    the scores of that subset are compared.

Both sides have the same weights, prompts and tokens; the plain model is a copy that was never bridged. The last line is
one JSON object. On a machine that others use, --clock cpu counts this process's processor time instead of the wall's.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from both_models import add_options, both, where
from both_models import clock as wall
from torch import Tensor, nn
from transformers import GenerationConfig

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.judges import PHRASES, OnceRefused, fallback_refusal_tokens
from mechlens.methods.directions.direction import Direction, DirectionGrid, direction_grid
from mechlens.methods.steering.candidates import score_candidates
from mechlens.methods.steering.interventions import ALL, Add
from mechlens.methods.steering.steering import answer_under
from mechlens.models.bridge import loaded, n_layers
from mechlens.models.engine.generate import stop_tokens
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import builtin_prompts

STRENGTHS = (0.5, 1.0, 2.0)
CLOCKS: dict[str, Callable[[], float]] = {"wall": wall, "cpu": time.process_time}


def main() -> None:
    warnings.filterwarnings("error", ".*takes the plain path")  # this measures the fast one
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "smollm2-refuser")
    parser.add_argument("--quick", action="store_true", help="six layers, 16 prompts, fewer candidates: a first look")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--single", type=int, default=24, help="answers that are timed one prompt at a time")
    parser.add_argument(
        "--peer-candidates", type=int, default=18, help="candidates that the published loop is timed on"
    )
    parser.add_argument("--sweep-only", action="store_true", help="leave out (b)")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    model, hf_model = both(options)
    print(f"{options.model} ({where(hf_model)})")
    per_class = 8 if options.quick else 16
    harmful, harmless = builtin_prompts("harmful"), builtin_prompts("harmless")
    acts = collect(model, [*harmful[64:128], *harmless[64:128]], positions=["post[*]"])
    grid = direction_grid(acts, "harmful", "harmless")
    asked = tokenize([*harmful[:per_class], *harmless[:per_class]], template_of(model))
    layers = list(range(n_layers(model)))
    if options.quick:
        layers = layers[:: max(1, len(layers) // 6)]
    result = sweep(model, hf_model, asked, grid, layers, options, clock)
    if options.sweep_only:
        print(json.dumps(result))
        return
    scored = tokenize([*harmful[: 2 * per_class], *harmless[: 2 * per_class]], template_of(model))
    result |= selection(model, hf_model, scored, candidates_of(grid, layers, options.quick), options, clock)
    order = ("sweep_ratio", "sweep_ratio_batch1", "selection_ratio", "labels_equal", "max_abs_diff")
    print(json.dumps({name: result[name] for name in order}))


def candidates_of(grid: DirectionGrid, layers: Sequence[int], quick: bool) -> list[Direction]:
    """Every position and layer with a direction; level 0 has none where all prompts have the same token."""
    positions = grid.positions[-2:] if quick else grid.positions
    found = [grid.at(level, position) for position in positions for level in layers]
    return [one for one in found if one.norm > 0]


# (a) The sweep


def sweep(
    model: Any,
    hf_model: Any,
    asked: TokenBatch,
    grid: DirectionGrid,
    layers: Sequence[int],
    options: argparse.Namespace,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """The refusal rate of every layer and strength."""
    settings = [(layer, strength) for layer in layers for strength in STRENGTHS]
    vectors = {layer: grid.at(layer, "last").vector for layer in layers}
    settings = [(layer, strength) for layer, strength in settings if float(vectors[layer].norm()) > 0]
    n = len(asked.prompts)
    each = [
        [Add(grid.at(layer, "last"), strength=strength, unit="raw", layers=(layer,), positions=ALL, phase="prompt")]
        for layer, strength in settings
        for _ in range(n)
    ]
    decided = OnceRefused(PHRASES, loaded(model).tokenizer)
    start = clock()
    rows = asked.select(list(range(n)) * len(settings))
    said = answer_under(model, rows, each, max_new_tokens=options.new_tokens, decided=decided)
    mine = PHRASES(rows.prompts, said.texts)
    took = clock() - start
    print(f"sweep: {len(settings)} settings x {n} prompts, mechlens {took:.1f} s ({said.engine})", flush=True)
    stop, tokenizer = sorted(stop_tokens(model)), loaded(model).tokenizer
    left = tokenize(asked.prompts, template_of(model), padding_side="left")

    def generate(batch: TokenBatch, layer: int, strength: float) -> list[str]:
        return hooked_answers(hf_model, tokenizer, batch, layer, strength * vectors[layer], stop, options.new_tokens)

    start, theirs = clock(), []
    for layer, strength in settings:
        theirs += PHRASES(asked.prompts, generate(left, layer, strength))
    batched = clock() - start
    print(f"sweep: one batched generate a setting {batched:.1f} s", flush=True)
    total = len(settings) * n
    picked = list(range(0, total, max(1, total // options.single)))
    start = clock()
    alone = [generate(tokenize([asked.prompts[i % n]], template_of(model)), *settings[i // n]) for i in picked]
    single = (clock() - start) * total / len(picked)
    print(f"sweep: one prompt at a time {single:.0f} s, scaled from {len(picked)} of {total} answers", flush=True)
    wrong = [i for i in range(total) if mine[i] != theirs[i]]
    for i in wrong[:5]:
        layer, strength = settings[i // n]
        print(f"label differs: layer {layer}, strength {strength}, {asked.prompts[i % n].id}: {said.texts[i]!r}")
    refused = sum(verdict == "refused" for verdict in mine)
    agree = sum(PHRASES([asked.prompts[0]], text)[0] == mine[i] for i, text in zip(picked, alone, strict=True))
    print(
        f"sweep: {refused} of {total} refused, {len(wrong)} labels differ; one at a time {agree} of {len(picked)} equal"
    )
    return {
        "sweep_ratio": round(batched / took, 2),
        "sweep_ratio_batch1": round(single / took, 2),
        "labels_equal": not wrong,
    }


@torch.inference_mode()
def hooked_answers(
    hf_model: Any, tokenizer: Any, batch: TokenBatch, layer: int, vector: Tensor, stop: list[int], new_tokens: int
) -> list[str]:
    """Greedy answers with the vector added at a block's input in the prompt's pass only."""

    def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden + vector.to(hidden), *args[1:]) if hidden.shape[1] > 1 else args

    tokens, mask = (x.to(hf_model.device) for x in (batch.tokens, batch.mask.long()))
    settings = GenerationConfig(eos_token_id=stop or None, pad_token_id=stop[0] if stop else 0)
    with hooked([(decoder_layers(hf_model)[layer], add, True)]):
        out = hf_model.generate(
            tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, generation_config=settings
        )
    answers = out[:, batch.tokens.shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(row) if token in stop), len(row)) for row in answers]
    return [
        tokenizer.decode(row[:end], skip_special_tokens=True).strip() for row, end in zip(answers, ends, strict=True)
    ]


# (b) The selection


def selection(
    model: Any,
    hf_model: Any,
    batch: TokenBatch,
    candidates: Sequence[Direction],
    options: argparse.Namespace,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Bypass, induce and KL of every candidate."""
    half = len(batch.prompts) // 2
    tokens = list(fallback_refusal_tokens(loaded(model).tokenizer).ids)
    start = clock()
    mine = score_candidates(model, candidates, batch, range(half), range(half, 2 * half), tokens).means()
    took = clock() - start
    print(f"selection: {len(candidates)} candidates x {half} + {half} prompts, mechlens {took:.1f} s", flush=True)
    picked = list(range(0, len(candidates), max(1, len(candidates) // options.peer_candidates)))
    left = tokenize(batch.prompts, template_of(model), padding_side="left")
    harmful, harmless = left.select(range(half)), left.select(range(half, 2 * half))
    clean = last_logits(hf_model, harmless, []).double().softmax(-1)
    start = clock()
    theirs = torch.stack([published(hf_model, candidates[i], harmful, harmless, clean, tokens) for i in picked])
    loop = (clock() - start) * len(candidates) / len(picked)
    difference = float((mine[picked] - theirs).abs().max())
    print(f"selection: published loop {loop:.0f} s, scaled from {len(picked)} candidates", flush=True)
    return {"selection_ratio": round(loop / took, 2), "max_abs_diff": float(f"{difference:.2g}")}


def published(
    hf_model: Any, one: Direction, harmful: TokenBatch, harmless: TokenBatch, clean: Tensor, tokens: list[int]
) -> Tensor:
    """One candidate's three mean scores as refusal_direction computes them: three hooked passes."""
    blocks, unit = decoder_layers(hf_model), one.vector / (one.vector.norm() + 1e-8)

    def off(x: Tensor) -> Tensor:
        along = unit.to(x)
        return x - (x @ along).unsqueeze(-1) * along

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (off(args[0]), *args[1:])

    def after(module: nn.Module, args: object, output: Any) -> Any:
        return (off(output[0]), *output[1:]) if isinstance(output, tuple) else off(output)

    def plus(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + one.vector.to(args[0]), *args[1:])

    parts = [part for block in blocks for part in (attention_of(block), block.mlp)]
    ablating = [(block, before, True) for block in blocks] + [(part, after, False) for part in parts]
    ablated = last_logits(hf_model, harmless, ablating).double().softmax(-1)
    kl = (clean * (torch.log(clean + 1e-6) - torch.log(ablated + 1e-6))).sum(-1)
    bypass = score(last_logits(hf_model, harmful, ablating), tokens)
    induce = score(last_logits(hf_model, harmless, [(blocks[one.level], plus, True)]), tokens)
    return torch.stack([bypass.mean(), induce.mean(), kl.mean()])


def score(logits: Tensor, tokens: list[int]) -> Tensor:
    share = logits.double().softmax(-1)[:, tokens].sum(-1)
    return torch.log(share + 1e-8) - torch.log(1 - share + 1e-8)


@torch.inference_mode()
def last_logits(hf_model: Any, batch: TokenBatch, hooks: list[tuple[nn.Module, Any, bool]]) -> Tensor:
    """As published: the whole batch's logits, of which the last are read."""
    tokens, mask = (x.to(hf_model.device) for x in (batch.tokens, batch.mask.long()))
    with hooked(hooks):
        logits: Tensor = hf_model(tokens, attention_mask=mask).logits[:, -1]
    return logits.cpu()


# The plain model


@contextmanager
def hooked(hooks: list[tuple[nn.Module, Any, bool]]) -> Iterator[None]:
    """Forward hooks, each with its module and whether it comes before."""
    handles = [m.register_forward_pre_hook(h) if before else m.register_forward_hook(h) for m, h, before in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(hf_model: Any) -> nn.ModuleList:
    """The blocks of a plain Hugging Face model: its one module list of that length."""
    depth = hf_model.config.get_text_config().num_hidden_layers
    return next(m for m in hf_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


def attention_of(block: Any) -> nn.Module:
    """A block's attention by its usual names."""
    for name in ("self_attn", "attn", "attention"):
        if hasattr(block, name):
            found: nn.Module = getattr(block, name)
            return found
    raise UserError(f"{type(block).__name__} has no attention by a known name; choose another model")


if __name__ == "__main__":
    try:
        main()
    except (UserError, UserWarning) as error:
        raise SystemExit(f"bench_steering: {error}") from error
