"""How fast a series of adapter checkpoints is read: residuals of 128 chat prompts at every level of each checkpoint.

mechlens loads the base once and lets the checkpoints take turns in it; the plain loop loads the base, merges the
adapter, bridges it and calls TransformerLens' `run_with_cache`, anew for each checkpoint. The adapters are random,
made in a temporary folder. The last line is one JSON object: how many times faster, the largest relative difference
of a vector, and by how many megabytes the process grew beyond the loaded model while the checkpoints took turns.
"""

import argparse
import json
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from both_models import clock
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.models.bridge import device_of, n_layers
from mechlens.models.checkpoints.series import CheckpointSeries, checkpoint_series
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.engine import products
from mechlens.models.load import load, load_hf
from mechlens.models.sites import level_hook
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt

POSITIONS = ("inst", "last")
BATCH = 32


def main() -> None:
    warnings.filterwarnings("error", ".*takes the plain path")  # this measures the fast one
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="packaged name, hub id or folder")
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--mkl", action="store_true", help="with the matrix products that the peers have, on AMD too")
    parser.add_argument("--quick", action="store_true", help="3 checkpoints and 32 prompts")
    args = parser.parse_args()
    if args.mkl:
        products.mkl_is_slow = lambda: False
    n_checkpoints, n_prompts = (3, 32) if args.quick else (args.checkpoints, args.prompts)
    half = n_prompts // 2
    prompts = builtin_prompts("harmful")[:half] + builtin_prompts("harmless")[:half]
    with tempfile.TemporaryDirectory() as scratch:
        make_adapters(args.model, Path(scratch), n_checkpoints)
        measured = race(checkpoint_series(args.model, [scratch]), prompts, args.device, args.dtype)
    print(f"\n{args.model}: {n_checkpoints} adapters, {n_prompts} prompts, {args.device}")
    print(f"checkpoints taking turns {measured.mine:8.1f} s, of which loading the base {measured.loading:.1f} s")
    print(f"plain loop               {measured.plain:8.1f} s")
    result = {
        "ratio": round(measured.plain / measured.mine, 2),
        "max_rel_diff": float(f"{measured.difference:.2g}"),
        "peak_extra_mb": round(measured.growth),
    }
    print(json.dumps(result))


@dataclass
class Measured:
    """Seconds of both ways in all, and what was found beside them."""

    loading: float
    mine: float
    plain: float = 0.0
    difference: float = 0.0
    growth: float = 0.0


def race(series: CheckpointSeries, prompts: list[Prompt], device: str, dtype: str) -> Measured:
    """Both ways take turns, checkpoint by checkpoint, so that a busy machine slows both alike."""
    load(series.base.path, device=device, dtype=dtype)  # so that neither way pays for imports and a cold disk
    start = clock()
    with checkpoint_swapper(series.base.path, device=device, dtype=dtype) as one:
        loading = clock() - start
        found = Measured(loading, loading)
        batch = tokenize(prompts, template_of(one.model))
        collect(one.model, batch, positions=POSITIONS)  # what a pass itself needs is no growth by the swap
        for member in series.members[1:]:
            start = clock()
            with Growth() as growth:
                mine = collect(one.put(member), batch, positions=POSITIONS).values
            found.mine += clock() - start
            found.growth = max(found.growth, growth.peak - mine.numel() * 4 / 2**20)
            start = clock()
            model = load(series.base.path, adapter=member.path, device=device, dtype=dtype)
            theirs = with_transformerlens(model, tokenize(prompts, template_of(model)))
            found.plain += clock() - start
            found.difference = max(found.difference, relative(mine, theirs))
            del model
    return found


def relative(values: Tensor, truth: Tensor) -> float:
    """Largest relative L2 difference of a vector."""
    return float(((values - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


def make_adapters(model: str, folder: Path, n: int) -> None:
    """Rank-8 LoRA adapters on every linear layer, random in both factors, as PEFT folders `checkpoint-STEP`."""
    from peft import LoraConfig, get_peft_model

    hf_model, _ = load_hf(model, dtype="auto")
    lora = get_peft_model(hf_model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, n + 1):
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        lora.save_pretrained(str(folder / f"checkpoint-{step}"), save_embedding_layers=False)


@torch.inference_mode()
def with_transformerlens(model: Any, batch: TokenBatch) -> Tensor:
    """Every level at the read positions through TransformerLens' own cache, in file order, padded on the right."""
    names = [level_hook(model, level) for level in range(n_layers(model) + 1)]
    read = torch.stack([batch.at(name) for name in POSITIONS], dim=1)
    parts = []
    for start in range(0, len(batch.prompts), BATCH):
        rows = slice(start, start + BATCH)
        tokens = batch.tokens[rows, : int(batch.lengths[rows].max())].to(device_of(model))
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names, prepend_bos=False)
        index = torch.arange(len(tokens)).unsqueeze(1)
        parts.append(torch.stack([cache[name][index, read[rows]] for name in names], dim=1))
    return torch.cat(parts).float().cpu()


class Growth:
    """How far this process's memory rises above its start (MB), sampled."""

    def __enter__(self) -> "Growth":
        self.peak, self._done = 0.0, threading.Event()
        self._start = resident_mb()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, resident_mb() - self._start)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def resident_mb() -> float:
    """Resident memory of this process (weights may lie in mapped pages of their file until they are changed)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise UserError("this system doesn't tell how much memory a process has; run the benchmark on Linux")


if __name__ == "__main__":
    try:
        main()
    except (UserError, UserWarning) as error:
        raise SystemExit(f"bench_tracking: {error}") from error
