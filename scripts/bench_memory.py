"""How much memory analyses of streamed activations take beside a model: random ones, by default 16 GB in bfloat16.

They are written shard by shard as `collect` writes them, in a folder that is removed at the end. Then comes what
`mechlens direction` does with them (mean differences, AUROC with intervals, reliability in every cell) and, at one
level, what `mechlens separate` does (read-outs out of fold, cosines, beliefs). Memory is the process's own (RssAnon)
beyond what it has before the first shard. Pages of the shards, which the system takes back when it needs them, count
in the peak resident set (VmHWM) only. The last line is one JSON object.
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.streamed import STREAMED_BATCH, StreamedTensor, packed
from mechlens.methods.directions.nulls import split_half
from mechlens.methods.probing.auroc import auroc, auroc_bounds
from mechlens.methods.probing.detect import detect
from mechlens.methods.probing.out_of_fold import FOLD_SEEDS, FOLDS, out_of_fold_scores
from mechlens.methods.statistics.resample import family_folds
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.split import split_by_family
from mechlens.runs.folder import FolderCache
from mechlens.settings import FRACTIONS, DetectionPlan
from mechlens.studies.separate.geometry import measure_geometry
from mechlens.studies.shared.two_beliefs import measure_beliefs

Result = TypeVar("Result")
QUADRANTS = ("refused_harmful", "accepted_harmless", "accepted_harmful", "refused_harmless")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--levels", type=int, default=80)
    parser.add_argument("--positions", type=int, default=6)
    parser.add_argument("--d-model", type=int, default=8192)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the shards are put")
    args = parser.parse_args()
    size = 2 * args.prompts * args.levels * args.positions * args.d_model
    free = shutil.disk_usage(args.folder).free
    print(f"{size / 1e9:.1f} GB of disk in {args.folder}, where {free / 1e9:.0f} are free")
    if size > 0.9 * free:
        raise UserError("that is too little; give another --folder, or fewer --prompts or --levels")
    folder = Path(tempfile.mkdtemp(prefix="bench-memory-", dir=args.folder))
    memory = Memory()
    try:
        acts = memory.during("write", lambda: write(folder, args))
        memory.during("direction", lambda: direction(acts))
        memory.during("separate", lambda: separate(acts))
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"values_gb": size / 1e9} | memory.found()))


class Memory:
    """The peak of the process's own memory in every step, beyond what it began with (GB)."""

    def __init__(self) -> None:
        self.start, self.resident = _status("RssAnon"), _status("VmRSS")
        self.highest, self.steps = 0.0, dict[str, dict[str, float]]()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.highest = max(self.highest, _status("RssAnon"))
            time.sleep(0.005)

    def during(self, name: str, work: Callable[[], Result]) -> Result:
        """What the work gives; how much it took is printed and kept."""
        self.highest, started = 0.0, time.monotonic()
        result = work()
        peak, seconds = round(self.highest - self.start, 3), round(time.monotonic() - started, 1)
        self.steps[name] = {"peak_gb": peak, "seconds": seconds}
        print(f"{name}: at most {peak:.2f} GB, {seconds:.0f} s", flush=True)
        return result

    def found(self) -> dict[str, object]:
        """All steps, the baseline, and the highest resident set beyond it, with what is mapped of the shards."""
        resident = round(_status("VmHWM") - self.resident, 3)
        return {"steps": self.steps, "baseline_gb": self.start, "peak_resident_gb": resident}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e9, 3)


def write(folder: Path, args: argparse.Namespace) -> Activations:
    """Shards as `collect` leaves them, each class with a mean of its own."""
    cache, keys = FolderCache(folder), []
    generator = torch.Generator().manual_seed(0)
    labels = tuple(QUADRANTS[i % len(QUADRANTS)] for i in range(args.prompts))
    means = torch.randn(len(QUADRANTS), args.d_model, generator=generator)
    shape = args.levels, args.positions, args.d_model
    most = max(1, STREAMED_BATCH // (4 * args.levels * args.positions * args.d_model))
    for at in range(0, args.prompts, most):
        own = torch.tensor([QUADRANTS.index(label) for label in labels[at : at + most]])
        values = torch.randn(len(own), *shape, generator=generator)
        values += 0.05 * means[own][:, None, None]
        keys.append(f"{at:064x}")
        cache.put(keys[-1], packed(values.copy_(values.bfloat16())))
        del values
    values = StreamedTensor.of(cache, keys, torch.arange(args.prompts))
    assert values is not None
    names = tuple(f"prompt{i}" for i in range(args.prompts))
    return Activations(
        values=values,
        levels=tuple(range(args.levels)),
        positions=("inst", *(f"post[{k}]" for k in range(args.positions - 1))),
        ids=names,
        labels=labels,
        families=names,
        site="resid",
        checkpoint=Checkpoint("random", "random"),
        template="random",
    )


def direction(acts: Activations) -> None:
    """Detection of harmful prompts everywhere, and the reliability of every direction."""
    labelled = replace(acts, labels=tuple(label.rpartition("_")[2] for label in acts.labels))
    split = split_by_family(labelled.labels, labelled.families, fractions=FRACTIONS, seed=0)
    found = detect(labelled, "harmful", "harmless", split, DetectionPlan())
    reliable = split_half(labelled.select(split.train), "harmful", "harmless", 20, 0)
    print(
        f"strongest {found.strongest.auroc} at level {found.strongest.level}, {found.strongest.position}; "
        f"reliability {reliable.mean():.2f}"
    )


def separate(acts: Activations) -> None:
    """At the middle level: harmfulness out of fold at every position, its cosine with refusal, both beliefs."""
    k = len(acts.levels) // 2
    level = replace(acts, values=acts.values[:, k : k + 1], levels=(acts.levels[k],))
    positive = torch.tensor([label.endswith("harmful") for label in acts.labels])
    folds = [family_folds(level.labels, level.families, FOLDS, seed) for seed in range(FOLD_SEEDS)]
    scores = out_of_fold_scores(level, positive, torch.ones_like(positive), folds)
    bounds = auroc_bounds(scores.by_level, positive, level.families)
    print(f"out of fold {auroc(scores.by_level, positive)[0].tolist()}, from {bounds.low[0].tolist()}")
    geometry = measure_geometry(level, level.labels, set(level.ids), level=level.levels[0], seed=0)
    print(f"cosine {geometry.directions.corrected[0]}")
    beliefs = measure_beliefs(level, level.labels, folds[0], 0, DetectionPlan().resamples)
    print(f"belief of harmfulness where refused {beliefs.means['belief_harm.refused_harmful']}")


if __name__ == "__main__":
    main()
