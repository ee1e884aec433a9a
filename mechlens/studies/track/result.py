"""What a tracking study finds: all tables and verdicts, worked out from snapshots without a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from tqdm.auto import tqdm

from mechlens.methods.probing.detect import DetectionPlan
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.checkpoints.series import UnusableCheckpoint
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.split import Split
from mechlens.studies.shared.quadrants import quadrants_of
from mechlens.studies.track.measures.behaviour import behaviour_table, effect_table, gaps, quadrant_table
from mechlens.studies.track.measures.change import angle_table
from mechlens.studies.track.measures.reference import BaseReference, TrackedConcept
from mechlens.studies.track.measures.snapshot import Snapshot
from mechlens.studies.track.measures.triggers import acceptance_table, readable_table
from mechlens.studies.track.tables import cell_of, readout_table, transfer_table
from mechlens.studies.track.verdict import CHANGES, TrackVerdict, track_verdict


@dataclass(frozen=True)
class TrackPlan:
    """The choices of a tracking study."""

    seed: int
    max_new_tokens: int
    positions: tuple[str, ...]
    levels: tuple[int, ...] | None
    """None is every level; the last one is always collected."""
    steered: int
    """Harmless test prompts on which directions are added."""
    n_resamples: int
    n_permutations: int
    n_random: int
    judge: str = "phrases"
    """A name of `mechlens.choices.JUDGES`."""

    @property
    def detection(self) -> DetectionPlan:
        """How the base's concepts are found."""
        return DetectionPlan(self.seed, self.n_resamples, self.n_permutations, self.n_random)


@dataclass(frozen=True)
class Questions:
    """What every checkpoint is asked."""

    batch: TokenBatch
    split: Split
    texts: tuple[str, ...]
    """Plain text whose cross-entropy is measured."""
    variants: TokenBatch | None = None
    """Prompts with a trigger, with decoys, and without either, labelled so."""


@dataclass(frozen=True)
class Tracking:
    """What was found over the series, and everything that it was worked out from."""

    snapshots: tuple[Snapshot, ...]
    left_out: tuple[UnusableCheckpoint, ...]
    reference: BaseReference
    questions: Questions
    plan: TrackPlan
    readouts: pd.DataFrame
    transfer: pd.DataFrame
    angles: pd.DataFrame
    quadrants: pd.DataFrame
    behaviour: pd.DataFrame
    effects: pd.DataFrame
    matrices: pd.DataFrame
    acceptance: pd.DataFrame
    """Of prompts with a trigger and with decoys; empty without a trigger."""
    trigger_readable: pd.DataFrame
    verdicts: tuple[TrackVerdict, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """Of the checkpoints that were measured, the base first."""
        return tuple(found.step for found in self.snapshots)


def steered_rows(questions: Questions, plan: TrackPlan) -> list[int]:
    """The harmless test prompts that directions are added on."""
    prompts = questions.batch.prompts
    return [i for i in questions.split.test if prompts[i].label == "harmless"][: plan.steered]


def analysed(
    snapshots: Sequence[Snapshot],
    left_out: Sequence[UnusableCheckpoint],
    reference: BaseReference,
    questions: Questions,
    plan: TrackPlan,
) -> Tracking:
    """All tables and verdicts from what was measured; needs no model."""
    steps, acts = [found.step for found in snapshots], [found.acts for found in snapshots]
    chance = {"seed": plan.seed, "n_resamples": plan.n_resamples}
    readouts, transfer, angles = [], [], []
    for concept in tqdm(reference.measurable, desc="comparing checkpoints", unit="concept", delay=2, leave=False):
        readouts.append(readout_table(steps, acts, concept, questions.split, **chance, n_random=plan.n_random))
        transfer.append(transfer_table(steps, acts, concept, questions.split, **chance))
        angles.append(angle_table(steps, acts, concept, seed=plan.seed))
    quadrants = [quadrants_of(questions.batch.prompts, found.verdicts) for found in snapshots]
    families = [questions.batch.prompts[i].group for i in steered_rows(questions, plan)]
    matrices = [{"step": found.step, **row} for found in snapshots for row in found.matrices]
    table = _joined(readouts)
    return Tracking(
        snapshots=tuple(snapshots),
        left_out=tuple(left_out),
        reference=reference,
        questions=questions,
        plan=plan,
        readouts=table,
        transfer=_joined(transfer),
        angles=_joined(angles),
        quadrants=quadrant_table(steps, acts, quadrants, reference, **chance),
        behaviour=behaviour_table(snapshots, reference, **chance),
        effects=effect_table(snapshots, families, **chance),
        matrices=pd.DataFrame(matrices),
        acceptance=acceptance_table(snapshots, **chance) if questions.variants else pd.DataFrame(),
        trigger_readable=readable_table(snapshots, **chance) if questions.variants else pd.DataFrame(),
        verdicts=tuple(
            _verdict(concept, found, snapshots[0], table, plan)
            for concept in reference.concepts
            for found in snapshots[1:]
        ),
    )


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _verdict(
    concept: TrackedConcept, found: Snapshot, base: Snapshot, table: pd.DataFrame, plan: TrackPlan
) -> TrackVerdict:
    gap, change = gaps(found, base, concept, seed=plan.seed, n_resamples=plan.n_resamples)
    numbers = {"gap": gap, "gap_change": change}
    if concept.detection is None:
        numbers |= dict.fromkeys(("base_auroc", *CHANGES), Estimate.missing(min(concept.counts.values())))
    else:
        here, probe = cell_of(table, concept, found.step), cell_of(table, concept, found.step, kind="probe")
        numbers["base_auroc"] = cell_of(table, concept, base.step)["own"]
        numbers |= {name: probe["own_change"] if name == "probe_change" else here[name] for name in CHANGES}
    return track_verdict(concept.name, found.step, numbers)
