"""Contrasts with a planted truth: what words, tokens and system prompts tell, and what the activations hold beyond."""

import math
from dataclasses import dataclass, replace

import torch
from planted import activations

from mechlens.methods.activations.activations import Activations
from mechlens.methods.probing.confounds import Confound, find_confounds
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.settings import FRACTIONS, DetectionPlan
from mechlens.studies.direction.verdict import DirectionVerdict, direction_verdict
from mechlens.studies.shared.contrasts import ContrastMeasurement, Surface, measure

D = 32
CONTENT, TOPICS = 12, 20
POSITIONS = ("inst", "post[0]")
PLAN = DetectionPlan(resamples=1, permutations=1, random_directions=1)


@dataclass(frozen=True)
class World:
    """Prompts of two sides, and what levels 1 and 2 of a model hold of them; level 0 holds the token alone."""

    n: int = 40
    """Prompts of a side, none of them paired."""
    words: float = 0.0
    """How much likelier a content word is of the prompt's own side (log-odds); 0 says nothing."""
    token: float = 0.0
    """How much likelier the token at inst is that of the prompt's own side (log-odds)."""
    concept: float = 0.0
    """How far the classes lie apart at level 2 along a direction that the words don't give, in noise's deviations."""
    system: bool = False
    """Whether the negative side has a system prompt, which levels 1 and 2 hold."""
    seed: int = 0


@dataclass(frozen=True)
class Contrasted:
    """One draw of a world."""

    acts: Activations
    prompts: tuple[Prompt, ...]
    surface: Surface

    @property
    def positive(self) -> torch.Tensor:
        """Prompts of the first side."""
        return torch.tensor([prompt.label == "positive" for prompt in self.prompts])

    def confounds(self) -> tuple[Confound, ...]:
        """Of these prompts."""
        return find_confounds(self.prompts, self.positive)

    def measured(self, plan: DetectionPlan = PLAN) -> ContrastMeasurement:
        """As the study measures it."""
        split = split_by_family(self.acts.labels, self.acts.families, fractions=FRACTIONS, seed=plan.seed)
        sides = ("positive", "negative")
        return measure("concept", self.acts, self.acts.labels, sides, split, self.surface, plan, self.confounds())

    def verdict(self) -> DirectionVerdict:
        """Of the study."""
        found = self.measured().detection
        assert found is not None
        return direction_verdict(found)


def drawn(world: World) -> Contrasted:
    """Prompts of 6 to 10 content words and a topic at each end, with the activations of two levels above the token."""
    generator = torch.Generator().manual_seed(world.seed)
    n = 2 * world.n
    sign = torch.tensor([1.0, -1.0]).repeat(world.n)
    embedding = torch.randn(2 * CONTENT + TOPICS + 2, D, generator=generator)
    rows = []
    for own in sign.tolist():
        size = int(torch.randint(6, 11, (1,), generator=generator))
        bright = torch.rand(size, generator=generator) < 1 / (1 + math.exp(-own * world.words / 2))
        content = torch.randint(CONTENT, (size,), generator=generator) + CONTENT * ~bright
        ends = torch.randint(TOPICS, (2,), generator=generator) + 2 * CONTENT
        rows.append([int(ends[0]), *content.tolist(), int(ends[1])])
    mark = torch.rand(n, generator=generator) < torch.sigmoid(sign * world.token / 2)
    system = (sign < 0) & world.system
    prompts = tuple(
        Prompt(
            f"{world.seed}-{i}", " ".join(f"w{word:02d}" for word in row), "positive" if own > 0 else "negative",
            source="planted", system="You are a helpful assistant." if flag else None,
        )
        for i, (row, own, flag) in enumerate(zip(rows, sign.tolist(), system.tolist(), strict=True))
    )  # fmt: skip
    means = torch.stack([embedding[row].mean(dim=0) for row in rows])
    tokens = embedding[-2:][mark.long()][:, None].expand(-1, 2, -1).clone()
    tokens[:, 1] = embedding[0]  # the template's
    line, other = torch.linalg.qr(torch.randn(D, 2, generator=generator)).Q.T
    mix = torch.randn(D, D, generator=generator) / math.sqrt(D)
    held = 3.0 * means @ mix + 3.0 * system[:, None] * other
    values = torch.randn(n, 3, 2, D, generator=generator) + held[:, None, None]
    values[:, 1:, 0] += tokens[:, 0, None]
    values[:, 2] += world.concept / 2 * sign[:, None, None] * line
    values[:, 0] = tokens
    acts = activations(values, tuple(p.label for p in prompts), positions=POSITIONS)
    acts = replace(acts, ids=tuple(p.id for p in prompts), families=tuple(p.group for p in prompts))
    lengths = torch.tensor([len(row) for row in rows])
    return Contrasted(acts, prompts, Surface(tuple(p.text for p in prompts), means, lengths))
