"""`mechlens compare`: two checkpoints of one model, what was kept and what moves with their activations, recorded."""

from dataclasses import dataclass, replace
from pathlib import Path

from mechlens.errors import UserError
from mechlens.methods.behaviour.damage import PLAIN_TEXT
from mechlens.models.bridge import loaded
from mechlens.models.checkpoints.series import CheckpointSeries, Member, checkpoint_series
from mechlens.models.checkpoints.swap import Turns, turns
from mechlens.prompts.batch import tokenize
from mechlens.prompts.templates.template import chat_template
from mechlens.runs.run import Inputs
from mechlens.runs.writer import RunWriter, open_run
from mechlens.studies.compare.config import Compare
from mechlens.studies.compare.report import record_comparison
from mechlens.studies.compare.study import move_activations
from mechlens.studies.shared.inputs import require_sampling
from mechlens.studies.shared.model import inputs_of, record_inputs
from mechlens.studies.shared.training_data import record_left_out
from mechlens.studies.track.inputs import Asked, asked_of
from mechlens.studies.track.result import Questions, TrackPlan
from mechlens.studies.track.study import track

BASE = "base"


@dataclass(frozen=True)
class Prepared:
    """Everything that goes in, with the fingerprints that a rerun is held to."""

    turns: Turns
    pair: CheckpointSeries
    """A at the first place, B at the second, each at the step it has in its own series."""
    asked: Asked
    questions: Questions
    inputs: Inputs


def prepare(config: Compare) -> Prepared:
    """Both checkpoints, prompts and base; UserError for whatever can't be had."""
    require_sampling(config)
    pair = _pair(config)
    asked = asked_of(config, pair)
    one = turns(
        config.base, revision=config.revision, dtype=config.dtype, device=config.device,
        chat_template=pair.chat_template,
    )  # fmt: skip
    template = chat_template(loaded(one.model).tokenizer, config.template, today=config.today)
    questions = Questions(tokenize(asked.prompts, template), asked.split, PLAIN_TEXT)
    inputs = inputs_of(one.base, template, asked.data)
    return Prepared(one, pair, asked, questions, inputs)


def run(config: Compare) -> Path:
    """The comparison; gives the run folder."""
    prepared = prepare(config)
    with open_run(verb="compare", config=config, out=config.out, wandb=config.wandb) as writer:
        execute(prepared, config, writer)
    return config.out


def execute(prepared: Prepared, config: Compare, writer: RunWriter) -> None:
    """The study itself, written to an open run."""
    with prepared.turns as one:
        record_inputs(writer, one.model, prepared.inputs)
        record_left_out(writer, prepared.asked.left_out)
        writer.prompts(prepared.asked.prompts)
        plan = TrackPlan(
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            positions=("inst", "last"),
            levels=None,
            steered=config.steered,
            n_resamples=config.resamples,
            n_permutations=config.permutations,
            n_random=config.random_directions,
        )
        result = track(one, prepared.pair, prepared.questions, plan, shelf=writer.shelf)
        moved = move_activations(
            one, prepared.pair, result, positions=config.positions, n=config.patched, seed=config.seed,
            shelf=writer.shelf,
        )  # fmt: skip
        record_comparison(writer, result, prepared.pair, moved, prepared.asked.punctuation)


def _pair(config: Compare) -> CheckpointSeries:
    """The two as a series of their own; UserError where either names none or several checkpoints."""
    (first, own), (second, template) = (_member(config, source) for source in (config.first, config.second))
    if first.kind != "base" and own != template:
        raise UserError(
            f"{config.first!r} and {config.second!r} were saved with different chat templates, so positions and "
            "answers can't be compared; give two of one training run"
        )
    if second.kind == "base" or (first.path, first.revision) == (second.path, second.revision):
        raise UserError(f"A is {config.first!r} and B is {config.second!r}; give two checkpoints, the base only as A")
    if second.step <= first.step:  # of two runs, or in the other order: the axis is only first and second then
        first, second = replace(first, step=0), replace(second, step=1)
    return CheckpointSeries((first, second), (), "their records", template)


def _member(config: Compare, source: str) -> tuple[Member, str | None]:
    """The checkpoint, and its chat template where it isn't the base's."""
    if source == BASE:
        return Member(Path(config.base).name, config.base, "base", 0, config.revision), None
    series = checkpoint_series(config.base, [source], revision=config.revision)
    found = series.members[1:]
    if len(found) != 1:
        steps = ", ".join(str(member.step) for member in found)
        raise UserError(f"{source!r} holds {len(found)} checkpoints (steps {steps}); give the folder of one")
    return found[0], series.chat_template
