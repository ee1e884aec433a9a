"""What a tracking study finds: all tables and verdicts, worked out from snapshots without a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mechlens.methods.progress import progress_bar
from mechlens.methods.shown import few, html_with, lines
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.checkpoints.series import UnusableCheckpoint
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.split import Split
from mechlens.studies.shared.quadrants import quadrants_of
from mechlens.studies.track.config import TrackPlan
from mechlens.studies.track.measures.behaviour import behaviour_table, effect_table, gaps, quadrant_table
from mechlens.studies.track.measures.change import angle_table
from mechlens.studies.track.measures.floor import Floor
from mechlens.studies.track.measures.home import (
    FLOORS,
    HomeQuestion,
    home_numbers,
    home_question,
    home_readings,
    home_table,
)
from mechlens.studies.track.measures.reference import BaseReference, TrackedConcept
from mechlens.studies.track.measures.snapshot import Snapshot
from mechlens.studies.track.measures.triggers import acceptance_table, readable_table
from mechlens.studies.track.tables import readout_table, transfer_table
from mechlens.studies.track.verdict import CHANGES, GAINS, TrackVerdict, nearest, track_verdict


@dataclass(frozen=True)
class Questions:
    """What every checkpoint is asked.

    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> labels, families = [prompt.label for prompt in prompts], [prompt.group for prompt in prompts]
    >>> split = ml.split_by_family(labels, families, fractions=(0.5, 0.2, 0.3), seed=0)
    >>> plan = ml.TrackPlan(resamples=50, permutations=10, random_directions=2, random_networks=1, steered=2)
    >>> with ml.checkpoint_swapper("smollm2") as one:
    ...     batch = ml.tokenize(prompts, ml.template_of(one.model))
    ...     questions = ml.Questions(batch, split, texts=("Water boils at 100 degrees.",))
    ...     found = ml.track(one, ml.checkpoint_series("smollm2", ["runs/tuned"]), questions, plan)
    >>> found.steps
    (0, 10)
    """

    batch: TokenBatch
    split: Split
    texts: tuple[str, ...]
    """Plain text whose cross-entropy is measured."""
    variants: TokenBatch | None = None
    """Prompts with a trigger, with decoys, and without either, labelled so."""


@dataclass(frozen=True, repr=False)
class Tracking:
    """What was found over the series, and everything that it was worked out from.

    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> labels, families = [prompt.label for prompt in prompts], [prompt.group for prompt in prompts]
    >>> split = ml.split_by_family(labels, families, fractions=(0.5, 0.2, 0.3), seed=0)
    >>> plan = ml.TrackPlan(resamples=50, permutations=10, random_directions=2, random_networks=1, steered=2)
    >>> with ml.checkpoint_swapper("smollm2") as one:
    ...     batch = ml.tokenize(prompts, ml.template_of(one.model))
    ...     questions = ml.Questions(batch, split, texts=("Water boils at 100 degrees.",))
    ...     found = ml.track(one, ml.checkpoint_series("smollm2", ["runs/tuned"]), questions, plan)
    >>> found.steps
    (0, 10)
    """

    snapshots: tuple[Snapshot, ...]
    left_out: tuple[UnusableCheckpoint, ...]
    reference: BaseReference
    questions: Questions
    plan: TrackPlan
    floor: Floor
    at_home: pd.DataFrame
    """Out of fold at each concept's home: concept, step, number, value, low, high, n (see `home_numbers`)."""
    readouts: pd.DataFrame
    """On test prompts, at every level and position."""
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
    def base_beliefs(self) -> pd.DataFrame:
        """Rows of belief of harmfulness by the base's quadrants and centroids; none where it can't be measured."""
        of_base = (self.quadrants["number"] == "belief_harm") & (self.quadrants["by"] == "reference")
        return self.quadrants[of_base].dropna(subset=["mean"])

    @property
    def last_verdicts(self) -> tuple[TrackVerdict, ...]:
        """One for each concept, on the last checkpoint."""
        return tuple(verdict for verdict in self.verdicts if verdict.step == self.steps[-1])

    def metrics(self) -> dict[str, Estimate]:
        """The base's and the last checkpoint's numbers, by name and step."""
        count = len(self.snapshots) - 1
        numbers = {"n.checkpoints": Estimate.exact(count, count + len(self.left_out))}
        for step in dict.fromkeys((self.steps[0], self.steps[-1])):
            for row in self.at_home[self.at_home["step"] == step].to_dict("records"):
                kind, _, name = row["number"].partition(".")
                if kind == "auroc":
                    key = f"floor.{name}" if name in FLOORS else f"{name}.step{step}"
                    numbers[f"{row['concept']}.{key}"] = Estimate.of_row(row, called=kind)
                elif row["number"] == "accuracy.frozen":
                    numbers[f"{row['concept']}.accuracy.step{step}"] = Estimate.of_row(row)
            for row in self.behaviour[self.behaviour["step"] == step].to_dict("records"):
                numbers[f"{row['number']}.step{step}"] = Estimate.of_row(row)
        for verdict in self.last_verdicts:
            names = (*CHANGES, *GAINS, "gap_change")
            numbers |= {f"{verdict.concept}.{name}": verdict.deciding[name] for name in names}
        return numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        names = (
            "at_home", "readouts", "transfer", "angles", "quadrants", "behaviour", "effects", "matrices", "acceptance",
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
            {"concept": verdict.concept, "step": verdict.step, "verdict": verdict.word, "also": verdict.also,
             "decided_by": verdict.decided, "to_settle": verdict.settle}
            | {name: str(value) for name, value in verdict.deciding.items()}
            for verdict in self.verdicts
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        facts = {verdict.concept: str(verdict.headline) for verdict in self.last_verdicts}
        return lines(f"Tracking of {self.snapshots[0].acts.checkpoint.name} at steps {few(self.steps)}", facts)

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.verdict_table())


def steered_rows(questions: Questions, plan: TrackPlan) -> list[int]:
    """The harmless test prompts that directions are added on."""
    prompts = questions.batch.prompts
    return [i for i in questions.split.test if prompts[i].label == "harmless"][: plan.steered]


def home_questions(reference: BaseReference, questions: Questions, seed: int) -> list[HomeQuestion]:
    """Of every concept that can be measured, its prompts in folds."""
    families = [prompt.group for prompt in questions.batch.prompts]
    return [home_question(concept, families, seed) for concept in reference.measurable]


def analysed(
    snapshots: Sequence[Snapshot],
    left_out: Sequence[UnusableCheckpoint],
    reference: BaseReference,
    questions: Questions,
    plan: TrackPlan,
    floor: Floor,
) -> Tracking:
    """All tables and verdicts from what was measured; needs no model."""
    steps, acts = [snapshot.step for snapshot in snapshots], [snapshot.acts for snapshot in snapshots]
    chance = {"seed": plan.seed, "resamples": plan.resamples}
    readouts, transfer, angles = [], [], []
    at_home: dict[str, list[dict[str, Estimate]]] = {}
    asked = home_questions(reference, questions, plan.seed)
    for question in progress_bar(asked, title="comparing checkpoints", unit="concept"):
        concept = question.concept
        found = home_readings(question, acts)
        under = floor.scores[concept.name]
        at_home[concept.name] = [home_numbers(question, here, found[0], under, **chance) for here in found]
        grid = floor.grids[concept.name]
        readouts.append(
            readout_table(
                steps, acts, concept, questions.split, grid, **chance, random_directions=plan.random_directions
            )
        )
        transfer.append(transfer_table(steps, acts, concept, questions.split))
        angles.append(angle_table(steps, acts, concept, seed=plan.seed))
    quadrants = [quadrants_of(questions.batch.prompts, snapshot.verdicts) for snapshot in snapshots]
    families = [questions.batch.prompts[i].group for i in steered_rows(questions, plan)]
    matrices = [{"step": snapshot.step, **row} for snapshot in snapshots for row in snapshot.matrices]
    return Tracking(
        snapshots=tuple(snapshots),
        left_out=tuple(left_out),
        reference=reference,
        questions=questions,
        plan=plan,
        floor=floor,
        at_home=_joined([home_table(name, steps, numbers) for name, numbers in at_home.items()]),
        readouts=_joined(readouts),
        transfer=_joined(transfer),
        angles=_joined(angles),
        quadrants=quadrant_table(steps, acts, quadrants, reference, **chance),
        behaviour=behaviour_table(snapshots, reference, **chance),
        effects=effect_table(snapshots, families, **chance),
        matrices=pd.DataFrame(matrices),
        acceptance=acceptance_table(snapshots, **chance) if questions.variants else pd.DataFrame(),
        trigger_readable=readable_table(snapshots, **chance) if questions.variants else pd.DataFrame(),
        verdicts=tuple(
            verdict_on(concept, snapshots, k, at_home.get(concept.name, []), plan)
            for concept in reference.concepts
            for k in range(1, len(snapshots))
        ),
    )


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["concept", "step", "number"])


def verdict_on(
    concept: TrackedConcept,
    snapshots: Sequence[Snapshot],
    k: int,
    numbers: Sequence[Mapping[str, Estimate]],
    plan: TrackPlan,
) -> TrackVerdict:
    """On the checkpoint `k` from the concept's numbers at every checkpoint; none where it can't be measured."""
    deciding: dict[str, Estimate] = {}
    if numbers:
        gap, change = gaps(snapshots[k], snapshots[0], concept, seed=plan.seed, resamples=plan.resamples)
        deciding |= {"gap": gap, "gap_change": change}
        base, here = numbers[0], numbers[k]
        deciding |= {"base_auroc": base["auroc.probe"], "base_gain": base[nearest(base)]}
        deciding |= {name: here[name] for name in (*CHANGES, *GAINS)}
    else:
        missing = Estimate.missing(min(concept.counts.values()))
        deciding |= dict.fromkeys(("gap", "gap_change", "base_auroc", "base_gain", *CHANGES, *GAINS), missing)
    return track_verdict(concept.name, snapshots[k].step, deciding)
