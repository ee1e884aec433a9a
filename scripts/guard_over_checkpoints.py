"""Does a Latent Guard hold while its model is fine-tuned? Frozen scores and threshold at every checkpoint of a series.

Guards are fitted on the base (`mechlens guard fit`) and never refitted. All checkpoints answer the same prompts, none
of which the guard was fitted on or any checkpoint trained on; changes are paired with the base, with 95% intervals over
prompt families. The last line is one JSON object: AUROC and the shares flagged, by step.
"""

import argparse
import json
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.probing.auroc import auroc
from mechlens.methods.statistics.resample import family_weights, interval
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.series import CheckpointSeries, checkpoint_series
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.prompts.batch import tokenize
from mechlens.runs.artifacts import load as load_artifact
from mechlens.studies.guard.evaluation import EvaluationPrompts, examine
from mechlens.studies.shared.sources import load_source, read_sources

MEASURES = ("auroc", "tpr", "fpr")
RESAMPLES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", help="folder of checkpoints, as `mechlens track --checkpoints` takes it")
    parser.add_argument("--base", default="smollm2-refuser", help="the model that the guards were fitted on")
    parser.add_argument("--guards", type=Path, nargs="+", required=True, help="files that `mechlens guard fit` made")
    parser.add_argument("--sources", default="published", help="preset or JSON list, as in `mechlens guard eval`")
    parser.add_argument("--folder", type=Path, help="folder that holds the files of the sources")
    parser.add_argument("--kinds", nargs="+", default=["requests", "over-refusal"], help="kinds of sources to ask")
    parser.add_argument("--n", type=int, help="at most so many prompts of each source")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    guards = {str(path): load_artifact(path, FittedGuard) for path in args.guards}
    series = checkpoint_series(args.base, [args.checkpoints])
    adapters = [member.path for member in series.members if member.kind == "adapter"]
    examined = _examined(args, list(guards.values()), adapters)
    print(examined.left_out.to_string(index=False))
    found = _over(args.base, series, guards, examined)
    for name, steps in found.items():
        print(f"\n{name}: {guards[name].settings.rule} at {', '.join(guards[name].positions)}")
        for step, drawn in steps.items():
            told = [
                f"{measure} {_told(drawn[measure])} ({_told(drawn[measure] - steps[0][measure])})"
                for measure in MEASURES
            ]
            print(f"step {step:4d}  " + "  ".join(told))
    positive = sum(prompt.label == "harmful" for prompt in examined.prompts)
    short = {
        name: {
            step: {measure: round(float(drawn[measure][0]), 4) for measure in MEASURES} for step, drawn in steps.items()
        }
        for name, steps in found.items()
    }
    print(json.dumps({"n_harmful": positive, "n_harmless": len(examined.prompts) - positive, "guards": short}))


def _over(
    base: str, series: CheckpointSeries, guards: dict[str, FittedGuard], examined: EvaluationPrompts
) -> dict[str, dict[int, dict[str, Float[Tensor, " draw"]]]]:
    """By guard and step: every measure on the sample and on resamples of its families, the same at every step."""
    labels = [prompt.label for prompt in examined.prompts]
    positive = torch.tensor([label == "harmful" for label in labels])
    drawn = family_weights([prompt.group for prompt in examined.prompts], RESAMPLES, 0, labels)
    weights = torch.cat([torch.ones(1, len(labels), dtype=torch.float64), drawn])
    levels = sorted({level for guard in guards.values() for level in guard.levels})
    positions = list(dict.fromkeys(position for guard in guards.values() for position in guard.positions))
    found: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in guards}
    with checkpoint_swapper(base) as one:
        batch = tokenize(examined.prompts, template_of(one.model))
        for member in tqdm(series.members, desc="checkpoints"):
            acts = collect(one.put(member), batch, positions=positions, levels=levels)
            for name, guard in guards.items():
                scores = guard.scores(acts, other_weights=True)
                found[name][member.step] = _measured(scores, guard.calibration.threshold, positive, weights)
    return found


def _examined(args: argparse.Namespace, guards: list[FittedGuard], adapters: list[str]) -> EvaluationPrompts:
    """Test prompts that neither a guard nor the base nor any adapter of the series has seen."""
    if len({frozenset(guard.train_sha256) for guard in guards}) > 1:
        raise UserError("the guards were fitted on different prompts; give guards of one fit's prompts to compare them")
    sources = [source for source in read_sources(args.sources) if source.kind in args.kinds]
    found = [load_source(source, args.folder, args.seed, args.n) for source in sources]
    known = [Checkpoint(args.base, args.base, adapter=adapter) for adapter in adapters]
    return examine(found, guards[0], [*known, guards[0].checkpoint])


def _measured(
    scores: Float[Tensor, " prompt"],
    threshold: float,
    positive: Bool[Tensor, " prompt"],
    weights: Float[Tensor, "draw prompt"],
) -> dict[str, Float[Tensor, " draw"]]:
    """AUROC and shares flagged of both classes, on the sample and on every resample of it."""
    flagged = (scores > threshold).double()
    return {
        "auroc": auroc(scores, positive, weights),
        "tpr": (weights * flagged)[:, positive].sum(dim=1) / weights[:, positive].sum(dim=1),
        "fpr": (weights * flagged)[:, ~positive].sum(dim=1) / weights[:, ~positive].sum(dim=1),
    }


def _told(drawn: Float[Tensor, " draw"]) -> str:
    bounds = interval(drawn[1:])
    return f"{float(drawn[0]):+.2f} [{float(bounds.low):.2f}, {float(bounds.high):.2f}]"


if __name__ == "__main__":
    main()
