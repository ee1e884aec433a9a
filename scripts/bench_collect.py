"""How fast `collect` is: residuals of 64 chat prompts at every level, at the positions `inst` and `last`.

Against TransformerLens' `run_with_cache` with a names filter and against plain Hugging Face with forward hooks (a
copy of the model that was never bridged), both in batches of 32 in file order. The three take turns in one process,
from the same tokens. The last line is one JSON object with the seconds, the speed-ups and the largest relative
difference; two calls with another `--dtype` say how types compare.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from both_models import add_options, both, clock, where
from torch import Tensor, nn

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.models.bridge import n_layers
from mechlens.models.sites import level_hook
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import builtin_prompts

POSITIONS = ("inst", "last")
BATCH = 32


def main() -> None:
    warnings.filterwarnings("error", ".*takes the plain path")  # this measures the fast one
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser, "smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    model, hf_model = both(args)
    half = args.prompts // 2
    prompts = builtin_prompts("harmful")[:half] + builtin_prompts("harmless")[:half]
    batch = tokenize(prompts, template_of(model))
    ways: dict[str, Callable[[], Tensor]] = {
        "mechlens collect": lambda: collect(model, batch, positions=POSITIONS).values,
        "TransformerLens run_with_cache": lambda: with_transformerlens(model, batch),
        "Hugging Face hooks": lambda: with_huggingface(hf_model, batch),
    }
    seconds, values = take_turns(ways, args.repeats)
    report(f"{args.model} ({where(hf_model)})", batch, seconds, values)


def with_transformerlens(model: Any, batch: TokenBatch) -> Tensor:
    """Every level at the read positions through TransformerLens' own cache."""
    names = [level_hook(model, level) for level in range(n_layers(model) + 1)]
    parts = []
    for tokens, read in chunks(batch, model):
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names, prepend_bos=False)
        rows = torch.arange(len(tokens)).unsqueeze(1)
        parts.append(torch.stack([cache[name][rows, read] for name in names], dim=1))
    return torch.cat(parts).float().cpu()


def with_huggingface(hf_model: nn.Module, batch: TokenBatch) -> Tensor:
    """The same through forward hooks on the decoder layers."""
    layers = decoder_layers(hf_model)
    parts = []
    for tokens, read in chunks(batch, hf_model):
        rows = torch.arange(len(tokens)).unsqueeze(1)
        found: list[Tensor] = []

        def entering(module: nn.Module, args: Any, kwargs: Any, rows=rows, read=read, found=found) -> None:
            found.append((args[0] if args else kwargs["hidden_states"])[rows, read])

        def leaving(module: nn.Module, args: Any, output: Any, rows=rows, read=read, found=found) -> None:
            found.append((output if isinstance(output, Tensor) else output[0])[rows, read])

        handles = [layer.register_forward_pre_hook(entering, with_kwargs=True) for layer in layers]
        handles.append(layers[-1].register_forward_hook(leaving))
        hf_model(tokens)
        for handle in handles:
            handle.remove()
        parts.append(torch.stack(found, dim=1))
    return torch.cat(parts).float().cpu()


def chunks(batch: TokenBatch, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Tokens, on the model's device, and read positions in file order, right-padded to the longest of each batch.

    Right padding needs no attention mask, which is the baselines' fastest case.
    """
    read = torch.stack([batch.at(name) for name in POSITIONS], dim=1)
    starts, device = range(0, len(batch.prompts), BATCH), next(model.parameters()).device
    widths = [int(batch.lengths[start : start + BATCH].max()) for start in starts]
    return [
        (batch.tokens[start : start + BATCH, :width].to(device), read[start : start + BATCH])
        for start, width in zip(starts, widths, strict=True)
    ]


def decoder_layers(hf_model: Any) -> nn.ModuleList:
    """The blocks of a plain Hugging Face model: its one module list of that length."""
    depth = hf_model.config.get_text_config().num_hidden_layers
    return next(m for m in hf_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


@torch.inference_mode()
def take_turns(ways: dict[str, Callable[[], Tensor]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of every repeat, after one round that isn't counted, and what each way found."""
    values = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return seconds, values


def relative(values: Tensor, truth: Tensor) -> float:
    """Largest relative L2 difference of a vector."""
    return float(((values - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


def report(model: str, batch: TokenBatch, seconds: dict[str, list[float]], values: dict[str, Tensor]) -> None:
    mine, *others = values
    median = {name: statistics.median(times) for name, times in seconds.items()}
    tokens = int(batch.lengths.sum())
    print(f"\n{model}: {len(batch.prompts)} prompts, {tokens} tokens")
    print(f"{'way':<32}{'median':>9}{'fastest':>9}{'slowest':>9}{'mechlens is':>14}{'rel. diff':>11}")
    for name, times in seconds.items():
        factor = f"{median[name] / median[mine]:.2f}x faster" if name in others else ""
        apart = f"{relative(values[mine], values[name]):.1e}" if name in others else ""
        print(f"{name:<32}{median[name]:>8.3f}s{min(times):>8.3f}s{max(times):>8.3f}s{factor:>14}{apart:>11}")
    lens, plain = others
    result = {
        "seconds": round(median[mine], 3),
        "vs_transformerlens": round(median[lens] / median[mine], 2),
        "vs_huggingface": round(median[plain] / median[mine], 2),
        "max_rel_diff": float(f"{max(relative(values[mine], values[name]) for name in others):.2g}"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except (UserError, UserWarning) as error:
        raise SystemExit(f"bench_collect: {error}") from error
