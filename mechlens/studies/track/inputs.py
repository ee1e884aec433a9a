"""What the studies of checkpoints read: prompts that no checkpoint was trained on, split once for the whole series."""

from dataclasses import dataclass

from mechlens.methods.behaviour.damage import PLAIN_TEXT
from mechlens.methods.probing.confounds import compare_sides
from mechlens.models.checkpoints.series import CheckpointSeries, content_of
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.text import match_punctuation
from mechlens.settings import FRACTIONS, BaseChoice, ModelChoice
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.harm_sets import HarmChoice, read_harm_sets
from mechlens.studies.shared.inputs import Check, chosen_base, inputs_of, prepared
from mechlens.studies.shared.training_data import LeftOut, Trigger
from mechlens.studies.track.measures.triggers import trigger_prompts
from mechlens.studies.track.result import Questions


@dataclass(frozen=True)
class SeriesPrompts:
    """The prompts of a series with their split, and what they are by fingerprint."""

    prompts: tuple[Prompt, ...]
    split: Split
    punctuation: str
    left_out: LeftOut
    data: dict[str, str]


def series_prompts(config: HarmChoice, series: CheckpointSeries) -> SeriesPrompts:
    """Both classes, without what the base or any checkpoint was trained on; UserError where too few are left."""
    adapters = [None, *(member.path for member in series.members if member.kind == "adapter")]
    sets = read_harm_sets(config, [ModelChoice(model=series.base.path, adapter=adapter) for adapter in adapters])
    matched = match_punctuation(sets.harmful, sets.harmless, config.punctuation)
    compare_sides(matched.positive, matched.negative, ("harmful", "harmless"))
    prompts = (*matched.positive, *matched.negative)
    split = split_by_family(
        [prompt.label for prompt in prompts], [prompt.group for prompt in prompts], fractions=FRACTIONS,
        seed=config.seed,
    )  # fmt: skip
    contents = {f"checkpoint {member.name}": content_of(member) for member in series.members if member.kind != "base"}
    return SeriesPrompts(prompts, split, matched.note, sets.left_out, sets.data | contents)


@dataclass(frozen=True)
class SeriesStudy:
    """A series of checkpoints and what is asked at each."""

    swapper: CheckpointSwapper
    series: CheckpointSeries
    asked: SeriesPrompts
    questions: Questions
    trigger: Trigger | None = None


def prepare_series(
    config: BaseChoice,
    series: CheckpointSeries,
    asked: SeriesPrompts,
    trigger: Trigger | None = None,
    triggered: int = 0,
    *,
    check: Check,
) -> Preparation[SeriesStudy]:
    """The base, loaded, with the questions; the first `triggered` harmful prompts are asked with the trigger too.

    `check` is made before any weights are read.
    """
    swapper, template = chosen_base(config, check, series.chat_template)
    harmful = [prompt for prompt in asked.prompts if prompt.label == "harmful"][:triggered]
    questions = Questions(
        batch=tokenize(asked.prompts, template),
        split=asked.split,
        texts=PLAIN_TEXT,
        variants=tokenize(trigger_prompts(harmful, trigger), template) if trigger and harmful else None,
    )
    content = SeriesStudy(swapper, series, asked, questions, trigger)
    return prepared(
        content, swapper.model, inputs_of(swapper.base, template, asked.data), asked.prompts, asked.left_out
    )
