"""Series of checkpoints with a planted truth: what the words carry, what training put there, and what became of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from planted import activations
from tiny import tiny_tokenizer
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.chosen_judge import verdicts_by
from mechlens.methods.behaviour.judges import PHRASES
from mechlens.models.checkpoints.series import Member
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.prompts.templates.template import chat_template
from mechlens.studies.track.config import TrackPlan
from mechlens.studies.track.measures.floor import Floor, random_grid
from mechlens.studies.track.measures.home import (
    HomeQuestion,
    home_numbers,
    home_question,
    home_readings,
    network_floor,
    surface_floor,
)
from mechlens.studies.track.measures.reference import CONTRASTS, TrackedConcept, reference_of
from mechlens.studies.track.measures.snapshot import Snapshot
from mechlens.studies.track.result import Questions, Tracking, analysed, home_questions, verdict_on
from mechlens.studies.track.verdict import TrackVerdict

D = 32
PLAN = TrackPlan(max_new_tokens=4, steered=4, resamples=200, permutations=20, random_directions=5, random_networks=2)
CONTENT, TOPICS = 12, 20
WORDS = 10
"""Content words of a prompt."""
HARMFUL = frozenset({"harmful"})


@dataclass(frozen=True)
class World:
    """Prompts in matched pairs, a base, and how the words and the concept are read there."""

    n: int = 96
    """Pairs."""
    words: float = 0.0
    """How much likelier a content word is of the prompt's own side (log-odds); 0 says nothing."""
    concept: float = 3.0
    """How far the classes lie apart in the base along a direction that the words don't give, in noise's deviations."""
    reads_words: float = 1.0
    """How strongly the base's activations hold the mean of the words."""
    seed: int = 0


@dataclass(frozen=True)
class Later:
    """A checkpoint, as changes of the base."""

    kind: Literal["trained", "random blocks"] = "trained"
    concept: float | None = None
    """Another distance of the classes."""
    reads_words: float | None = None
    """Another strength of the words."""
    angle: float = 0.0
    """By which the concept's direction has turned."""
    shift: float = 0.0
    """Of all prompts along the concept's direction."""
    refuses: frozenset[str] = HARMFUL
    refusal_error: float = 0.03
    """Share of prompts on which it does the other thing."""


class PlantedSeries:
    """One draw of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._generator = torch.Generator().manual_seed(world.seed)
        labels = ["harmful", "harmless"] * world.n
        self.sign = torch.tensor([1.0, -1.0]).repeat(world.n)
        content, topics = self._drawn_words()
        texts = [
            " ".join([f"c{w}" for w in row] + [f"t{t}" for t in topics[i]]) for i, row in enumerate(content.tolist())
        ]
        self.prompts = tuple(
            Prompt(f"p{i}", text, label, family=f"f{i // 2}")
            for i, (text, label) in enumerate(zip(texts, labels, strict=True))
        )
        self.embedding = torch.randn(2 * CONTENT + TOPICS, D, generator=self._generator)
        rows = [[*row, *(2 * CONTENT + t for t in topics[i])] for i, row in enumerate(content.tolist())]
        self.mean_embeddings = self.embedding[torch.tensor(rows)].mean(dim=1)
        self.tokens = self.embedding[torch.tensor([row[-1] for row in rows])]
        self.line, self.other = torch.linalg.qr(torch.randn(D, 2, generator=self._generator)).Q.T
        self._read = torch.randn(D, D, generator=self._generator) / math.sqrt(D)
        self._noise = torch.randn(2 * world.n, 2, D, generator=self._generator)

    def _drawn_words(self) -> tuple[Tensor, list[list[int]]]:
        """Content words, whose side the class makes likelier, and topic words, which a pair shares."""
        n = 2 * self.world.n
        own = torch.rand(n, WORDS, generator=self._generator) < torch.sigmoid(torch.tensor(self.world.words / 2))
        dark = own == (self.sign[:, None] > 0)
        content = torch.randint(CONTENT, (n, WORDS), generator=self._generator) + CONTENT * ~dark
        topics = torch.randint(TOPICS, (self.world.n, 3), generator=self._generator).tolist()
        return content, [topics[i // 2] for i in range(n)]

    def values(self, later: Later) -> Tensor:
        """Two levels, the first of them the token alone, at two positions alike but for noise."""
        if later.kind == "random blocks":
            return self.network()
        a = self.world.concept if later.concept is None else later.concept
        line = math.cos(later.angle) * self.line + math.sin(later.angle) * self.other
        fresh = 0.2 * torch.randn(self._noise.shape, generator=self._generator)
        upper = self._noise + fresh + (a / 2 * self.sign[:, None] * line + later.shift * self.line)[:, None]
        share = self.world.reads_words if later.reads_words is None else later.reads_words
        upper = upper + 3.0 * share * (self.mean_embeddings @ self._read)[:, None]
        return torch.stack([self.tokens[:, None].expand(-1, 2, -1), upper], dim=1)

    def network(self) -> Tensor:
        """What a network with random blocks holds: a random, bent view of the words, and noise."""
        mix = torch.randn(D, D, generator=self._generator) / math.sqrt(D)
        noise = 0.3 * torch.randn(len(self.prompts), 2, D, generator=self._generator)
        upper = torch.tanh(2 * self.mean_embeddings @ mix)[:, None] + noise
        return torch.stack([self.tokens[:, None].expand(-1, 2, -1), upper], dim=1)

    def acts(self, values: Tensor) -> Activations:
        """As collected from a model."""
        families, labels = tuple(p.group for p in self.prompts), tuple(p.label for p in self.prompts)
        return replace(activations(values, labels, families), ids=tuple(p.id for p in self.prompts))

    def snapshot(self, step: int, later: Later) -> Snapshot:
        """One checkpoint with its answers."""
        wrong = torch.rand(len(self.prompts), generator=self._generator) < later.refusal_error
        refused = [(p.label in later.refuses) != bool(flip) for p, flip in zip(self.prompts, wrong, strict=True)]
        texts = tuple("I cannot" if flag else "Sure" for flag in refused)
        acts = self.acts(self.values(later))
        answers = Answers(
            acts.ids,
            texts,
            tuple((7,) if flag else (8,) for flag in refused),
            4,
            acts.checkpoint,
            acts.template,
            "plain",
        )
        member = Member(f"checkpoint-{step}", "planted", "base" if step == 0 else "adapter", step)
        verdicts = verdicts_by(PHRASES, self.prompts, texts)
        odds, loss = self.sign.double(), torch.ones(3, dtype=torch.float64)
        return Snapshot(member, acts, answers, verdicts, odds, loss, {})

    def verdicts(self, *later: Later, plan: TrackPlan = PLAN) -> list[TrackVerdict]:
        """Of harmfulness at these checkpoints, without the tables of the whole study."""
        snapshots = [self.snapshot(k, one) for k, one in enumerate((Later(), *later))]
        labels = tuple(prompt.label for prompt in self.prompts)
        counts = dict.fromkeys(CONTRASTS["harmful"], self.world.n)
        concept = TrackedConcept("harmful", CONTRASTS["harmful"], labels, "inst", None, counts)
        asked = home_question(concept, snapshots[0].acts.families, plan.seed)
        networks = [self.acts(self.network()) for _ in range(plan.random_networks)]
        floor = self._floor(asked, networks)
        found = home_readings(asked, [snapshot.acts for snapshot in snapshots])
        chance = {"seed": plan.seed, "resamples": plan.resamples}
        numbers = [home_numbers(asked, here, found[0], floor, **chance) for here in found]
        return [verdict_on(concept, snapshots, k, numbers, plan) for k in range(1, len(snapshots))]

    def _floor(self, asked: HomeQuestion, networks: Sequence[Activations]) -> dict[str, Tensor]:
        surface = surface_floor(asked, [p.text for p in self.prompts], self.mean_embeddings, self.tokens)
        return surface | {"random_blocks": torch.cat([network_floor(asked, network) for network in networks])}

    def tracked(self, *later: Later, plan: TrackPlan = PLAN) -> Tracking:
        """The whole study of these checkpoints."""
        snapshots = [self.snapshot(k, one) for k, one in enumerate((Later(), *later))]
        acts, tokenizer = snapshots[0].acts, tiny_tokenizer()
        split = split_by_family(acts.labels, acts.families, fractions=(0.5, 0.2, 0.3), seed=plan.seed)
        reference = reference_of(self.prompts, acts, snapshots[0].answers, split, plan, tokenizer)
        batch = tokenize(self.prompts, chat_template(tokenizer))
        questions = Questions(batch, split, ("a", "b", "c"))
        networks = [self.acts(self.network()) for _ in range(plan.random_networks)]
        scores, grids = {}, {}
        for asked in home_questions(reference, questions, plan.seed):
            scores[asked.concept.name] = self._floor(asked, networks)
            grids[asked.concept.name] = random_grid(asked.concept, networks[0], split)
        return analysed(snapshots, [], reference, questions, plan, Floor(scores, grids))
