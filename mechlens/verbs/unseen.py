"""What a model was trained on is no test of it: such prompts are left out of every study of it, and counted."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mechlens.config import ModelChoice
from mechlens.errors import UserError
from mechlens.methods.estimate import Estimate
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.prompt import Prompt, PromptPair
from mechlens.records.writer import RunWriter
from mechlens.studies.training_data import trained_on, was_seen


@dataclass(frozen=True)
class LeftOut:
    """Prompts that the chosen model's adapters were trained on, as far as their records tell."""

    ids: tuple[str, ...]
    of: int
    """Prompts that were looked at."""
    known: bool
    """False where no record says what the model was trained on."""

    def __add__(self, other: "LeftOut") -> "LeftOut":
        """Both together, for sets that are read one after the other."""
        return LeftOut((*self.ids, *other.ids), self.of + other.of, self.known or other.known)


def leave_out_trained(
    models: Sequence[ModelChoice], sets: Mapping[str, Sequence[Prompt]]
) -> tuple[list[list[Prompt]], LeftOut]:
    """The sets without the prompts that any of the models was trained on, with one warning that counts them.

    An attack is seen where its goal is. UserError where nothing is left of a set.
    """
    seen = _seen(models)
    kept = [[prompt for prompt in prompts if not was_seen(prompt, seen)] for prompts in sets.values()]
    gone = [prompt.id for prompts in sets.values() for prompt in prompts if was_seen(prompt, seen)]
    for name, before, after in zip(sets, sets.values(), kept, strict=True):
        if before and not after:
            raise UserError(
                f"the model was trained on all {len(before)} {name} prompts, so they can't test it; give others"
            )
    return kept, _told(gone, sum(map(len, sets.values())), bool(seen), "prompts")


def leave_out_trained_pairs(config: ModelChoice, pairs: Sequence[PromptPair]) -> tuple[list[PromptPair], LeftOut]:
    """The pairs of which the model was trained on neither side; see `leave_out_trained`."""
    seen = _seen([config])
    gone = [pair for pair in pairs if was_seen(pair.clean, seen) or was_seen(pair.corrupt, seen)]
    if pairs and len(gone) == len(pairs):
        raise UserError(f"the model was trained on prompts of all {len(pairs)} pairs, so they can't test it")
    kept = [pair for pair in pairs if pair not in gone]
    return kept, _told([pair.clean.id for pair in gone], len(pairs), bool(seen), "pairs")


def record_left_out(writer: RunWriter, left_out: LeftOut) -> None:
    """Puts count and ids into an open run, where the model's training prompts are known."""
    if left_out.known:
        writer.metric("n.left_out_trained_on", Estimate.exact(len(left_out.ids), left_out.of))
        writer.table("left_out_trained_on", pd.DataFrame({"id": list(left_out.ids)}, dtype=str))


def _seen(models: Sequence[ModelChoice]) -> frozenset[str]:
    checkpoints = (Checkpoint(name=one.model, path=one.model, adapter=one.adapter) for one in models)
    return frozenset().union(*map(trained_on, checkpoints))


def _told(ids: Sequence[str], of: int, known: bool, what: str) -> LeftOut:
    if ids:
        warnings.warn(f"left out {len(ids)} of {of} {what}: the model was trained on them", stacklevel=3)
    return LeftOut(tuple(ids), of, known)
