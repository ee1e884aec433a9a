"""What the verbs over checkpoints read: prompts that no checkpoint was trained on, split once for the whole series."""

from dataclasses import dataclass

from mechlens.models.checkpoints.series import CheckpointSeries, content_of
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.text import match_punctuation
from mechlens.settings import ModelChoice
from mechlens.studies.compare.config import Compare
from mechlens.studies.shared.harm_sets import read_harm_sets
from mechlens.studies.shared.training_data import LeftOut
from mechlens.studies.track.config import Track

FRACTIONS = (0.5, 0.2, 0.3)


@dataclass(frozen=True)
class Asked:
    """The prompts of a series with their split, and what they are by fingerprint."""

    prompts: tuple[Prompt, ...]
    split: Split
    punctuation: str
    left_out: LeftOut
    data: dict[str, str]


def asked_of(config: Track | Compare, series: CheckpointSeries) -> Asked:
    """Both classes, without what the base or any checkpoint was trained on; UserError where too few are left."""
    adapters = [None, *(member.path for member in series.members if member.kind == "adapter")]
    sets = read_harm_sets(config, [ModelChoice(model=series.base.path, adapter=adapter) for adapter in adapters])
    matched = match_punctuation(sets.harmful, sets.harmless, config.punctuation)
    prompts = (*matched.positive, *matched.negative)
    split = split_by_family(
        [prompt.label for prompt in prompts], [prompt.group for prompt in prompts], fractions=FRACTIONS,
        seed=config.seed,
    )  # fmt: skip
    contents = {f"checkpoint {member.name}": content_of(member) for member in series.members if member.kind != "base"}
    return Asked(prompts, split, matched.note, sets.left_out, sets.data | contents)
