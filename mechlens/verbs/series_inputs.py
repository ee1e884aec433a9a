"""What the verbs over checkpoints read: prompts that no checkpoint was trained on, split once for the whole series."""

from dataclasses import dataclass

from mechlens.config import Compare, ModelChoice, Track
from mechlens.models.series import CheckpointSeries, content_of
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.text import match_punctuation
from mechlens.verbs.harm_sets import check_harm_sets, read_harm_sets
from mechlens.verbs.unseen import LeftOut, leave_out_trained

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
    harmful, harmless, _ = read_harm_sets(config)
    of = len(harmful) + len(harmless)
    gone: list[str] = []
    known = False
    for adapter in dict.fromkeys([None, *(m.path for m in series.members if m.kind == "adapter")]):
        choice = ModelChoice(model=series.base.path, adapter=adapter)
        (harmful, harmless), left_out = leave_out_trained(choice, {"harmful": harmful, "harmless": harmless})
        gone += left_out.ids
        known = known or left_out.known
    _, data = check_harm_sets(config, harmful, harmless)
    matched = match_punctuation(harmful, harmless, config.punctuation)
    prompts = (*matched.positive, *matched.negative)
    split = split_by_family(
        [prompt.label for prompt in prompts], [prompt.group for prompt in prompts], fractions=FRACTIONS,
        seed=config.seed,
    )  # fmt: skip
    data |= {f"checkpoint {member.name}": content_of(member) for member in series.members if member.kind != "base"}
    return Asked(prompts, split, matched.note, LeftOut(tuple(gone), of, known), data)
