"""What a tracking study finds: all tables and verdicts, worked out from snapshots without a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from tqdm.auto import tqdm

from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.checkpoints.series import UnusableCheckpoint
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.split import Split
from mechlens.studies.shared.quadrants import quadrants_of
from mechlens.studies.track.config import TrackPlan
from mechlens.studies.track.measures.behaviour import behaviour_table, effect_table, gaps, quadrant_table
from mechlens.studies.track.measures.change import angle_table
from mechlens.studies.track.measures.reference import BaseReference, TrackedConcept
from mechlens.studies.track.measures.snapshot import Snapshot
from mechlens.studies.track.measures.triggers import acceptance_table, readable_table
from mechlens.studies.track.tables import cell_of, readout_table, transfer_table
from mechlens.studies.track.verdict import CHANGES, TrackVerdict, track_verdict


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
        return tuple(snapshot.step for snapshot in self.snapshots)

    @property
    def last_verdicts(self) -> tuple[TrackVerdict, ...]:
        """One for each concept, on the last checkpoint."""
        return tuple(verdict for verdict in self.verdicts if verdict.step == self.steps[-1])

    def metrics(self) -> dict[str, Estimate]:
        """The base's and the last checkpoint's numbers, by name and step."""
        count = len(self.snapshots) - 1
        numbers = {"n.checkpoints": Estimate.exact(count, count + len(self.left_out))}
        for step in dict.fromkeys((self.steps[0], self.steps[-1])):
            for concept in self.reference.measurable:
                here = cell_of(self.readouts, concept, step)
                numbers |= {f"{concept.name}.{name}.step{step}": here[name] for name in ("frozen", "own", "accuracy")}
            for row in self.behaviour[self.behaviour["step"] == step].to_dict("records"):
                numbers[f"{row['number']}.step{step}"] = Estimate.of_row(row)
        for verdict in self.last_verdicts:
            numbers |= {f"{verdict.concept}.{name}": verdict.deciding[name] for name in (*CHANGES, "gap_change")}
        return numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        names = (
            "readouts", "transfer", "angles", "quadrants", "behaviour", "effects", "matrices", "acceptance",
            "trigger_readable",
        )  # fmt: skip
        answers = [
            checkpoint.answers.table().assign(step=checkpoint.step, log_odds=checkpoint.log_odds.tolist())
            for checkpoint in self.snapshots
        ]
        return {
            "left_out_checkpoints": pd.DataFrame(
                [vars(checkpoint) for checkpoint in self.left_out], columns=["name", "reason"]
            ),
            "verdicts": self.verdict_table(),
            **{name: getattr(self, name) for name in names},
            "answers": pd.concat(answers, ignore_index=True),
        }

    def artifacts(self) -> dict[str, object]:
        """The base's directions of every concept that it can be measured on."""
        return {
            f"directions_{concept.name}": concept.detection.directions
            for concept in self.reference.measurable
            if concept.detection is not None
        }

    def verdict_table(self) -> pd.DataFrame:
        """One row for each concept and checkpoint: the word, and the numbers that decided it."""
        rows = [
            {"concept": verdict.concept, "step": verdict.step, "verdict": verdict.word, "also": verdict.also}
            | {name: str(value) for name, value in verdict.deciding.items()}
            for verdict in self.verdicts
        ]
        return pd.DataFrame(rows)


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
    steps, acts = [snapshot.step for snapshot in snapshots], [snapshot.acts for snapshot in snapshots]
    chance = {"seed": plan.seed, "resamples": plan.resamples}
    readouts, transfer, angles = [], [], []
    for concept in tqdm(reference.measurable, desc="comparing checkpoints", unit="concept", delay=2, leave=False):
        readouts.append(
            readout_table(steps, acts, concept, questions.split, **chance, random_directions=plan.random_directions)
        )
        transfer.append(transfer_table(steps, acts, concept, questions.split, **chance))
        angles.append(angle_table(steps, acts, concept, seed=plan.seed))
    quadrants = [quadrants_of(questions.batch.prompts, snapshot.verdicts) for snapshot in snapshots]
    families = [questions.batch.prompts[i].group for i in steered_rows(questions, plan)]
    matrices = [{"step": snapshot.step, **row} for snapshot in snapshots for row in snapshot.matrices]
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
            _verdict(concept, snapshot, snapshots[0], table, plan)
            for concept in reference.concepts
            for snapshot in snapshots[1:]
        ),
    )


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _verdict(
    concept: TrackedConcept, snapshot: Snapshot, base: Snapshot, table: pd.DataFrame, plan: TrackPlan
) -> TrackVerdict:
    gap, change = gaps(snapshot, base, concept, seed=plan.seed, resamples=plan.resamples)
    numbers = {"gap": gap, "gap_change": change}
    if concept.detection is None:
        numbers |= dict.fromkeys(("base_auroc", *CHANGES), Estimate.missing(min(concept.counts.values())))
    else:
        here, probe = cell_of(table, concept, snapshot.step), cell_of(table, concept, snapshot.step, kind="probe")
        numbers["base_auroc"] = cell_of(table, concept, base.step)["own"]
        numbers |= {name: probe["own_change"] if name == "probe_change" else here[name] for name in CHANGES}
    return track_verdict(concept.name, snapshot.step, numbers)
