"""Strengths that can be compared: how much of a direction changes harmless answers by a given KL divergence.

A share of the residual norm does little at one layer and breaks the model at another. Here the strength is found at
which the 95th percentile, over the tokens of the model's own answers to harmless prompts, of KL(unsteered || steered)
is so many nats; so directions and layers are compared at equal damage.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.errors import UserError, kind_of
from mechlens.methods.activations.collect import tokenized
from mechlens.methods.activations.reading import in_halves
from mechlens.methods.behaviour.answers import Answers, answer
from mechlens.methods.behaviour.damage import answered, chunks, logits_everywhere
from mechlens.methods.cache import Cache
from mechlens.methods.progress import phase
from mechlens.methods.steering.interventions import Add
from mechlens.methods.steering.steering import applied
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.settings import ANSWER_TOKENS

PERCENTILE = 0.95
"""Of the tokens' KL: a mean hides the few tokens that break."""
TOLERANCE = 0.02
"""The KL that is found is the one that was asked for, to this share of it."""
DOUBLINGS = 10
"""How often the first strength is doubled, or halved, until the KL lies between two."""
BISECTIONS = 20
FIRST = 0.25
"""Tried first where nobody says: a share of the residual norm that most models bear."""


@dataclass(frozen=True, repr=False)
class Calibration:
    """The strength at which a direction changes harmless answers so much; see `calibrate`.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> direction = ml.mean_difference(ml.collect(model, prompts), "harmful", "harmless", level=2, position="last")
    >>> push = ml.Add(direction, strength=0.5, unit="share", layers=(2,))
    >>> found = ml.calibrate(model, push, ml.builtin_prompts("benign")[:4], kl=0.01, max_new_tokens=4)
    >>> found.tried[0]  # nothing added, nothing changed
    (0.0, 0.0)
    """

    push: Add
    """At the strength that was found: of those that were tried, the one whose KL is nearest."""
    kl: float
    """What the KL is there, in nats."""
    target: float
    """What it should be."""
    tried: tuple[tuple[float, float], ...]
    """Every strength with its KL, from 0 on."""
    passes: int
    """Forward passes over all prompts with their answers, the unsteered one among them: what it cost."""
    tokens: int
    """Of the answers, over which the percentile is taken."""

    @property
    def reached(self) -> bool:
        """Whether the KL is the one that was asked for."""
        return abs(self.kl - self.target) <= TOLERANCE * self.target

    @property
    def monotone(self) -> bool:
        """Whether a stronger push never had a smaller KL, as far as strengths were tried."""
        return all(more >= less for (_, less), (_, more) in zip(self.tried, self.tried[1:], strict=False))

    @property
    def caution(self) -> str:
        """What to know before strengths are compared; empty where it went well."""
        if not self.reached:
            (_, (weakest, least), *_), (strongest, most) = self.tried, self.tried[-1]
            if least > self.target:
                return f"at strength {weakest:.3g}, the weakest tried, it's {least:.3g} nats; begin with a weaker push"
            if most < self.target:
                return (
                    f"{self.target:g} nats aren't reached: at strength {strongest:.3g}, the last tried, it's {most:.3g}"
                )
            return f"the KL jumps past {self.target:g} nats: the nearest that was found is {self.kl:.3g}"
        if not self.monotone:
            return "the KL doesn't rise all the way with the strength, so other strengths may give the same"
        return ""

    @property
    def told(self) -> str:
        """What was found, and at what cost."""
        caution = f"; {self.caution}" if self.caution else ""
        return (
            f"the KL of {PERCENTILE:.0%} of {self.tokens} tokens of harmless answers is at most {self.kl:.3g} nats "
            f"({self.passes} forward passes){caution}"
        )

    def __repr__(self) -> str:
        return f"Calibration(strength {self.push.strength:.4g} ({self.push.unit}): {self.told})"


def calibrate(
    model: LanguageModel,
    push: Add,
    prompts: Prompts | TokenBatch,
    kl: float = 1.0,
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
    force: bool = False,
) -> Calibration:
    """The strength of a push whose 95th-percentile token KL on harmless prompts is `kl` nats.

    `push` says everything else: its direction, layers, tokens and unit. Its own strength is the first one tried, and
    says whether the direction is added or, below 0, subtracted. The KL is that of the unsteered model's greedy answers
    to the prompts, token by token. Strengths are doubled or halved until the KL lies between two, then bisected; where
    it can't be reached, or falls while the strength rises, `caution` says so.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> direction = ml.mean_difference(ml.collect(model, prompts), "harmful", "harmless", level=2, position="last")
    >>> push = ml.Add(direction, strength=0.5, unit="share", layers=(2,))
    >>> found = ml.calibrate(model, push, ml.builtin_prompts("benign")[:4], kl=0.01, max_new_tokens=4)
    >>> abs(found.kl - 0.01) < 0.001, found.passes == len(found.tried)
    (True, True)
    >>> said = ml.answer_under(model, prompts[:2], [found.push], max_new_tokens=4)
    """
    _require(push, kl)
    batch = tokenized(model, prompts, template)
    with phase("calibrating"):
        said = answer(model, batch, max_new_tokens=max_new_tokens, cache=cache)
        return calibrated(model, push, batch, said, kl, force=force)


def calibrated(
    model: LanguageModel, push: Add, batch: TokenBatch, said: Answers, kl: float, *, force: bool = False
) -> Calibration:
    """`calibrate` on answers that are there already."""
    meter = _Meter(model, push, batch, said, force)
    low, high = _bracket(meter, abs(push.strength), kl)
    for _ in range(BISECTIONS):
        if math.isinf(high) or not low or meter.near(kl):
            break
        middle = math.sqrt(low * high)
        low, high = (middle, high) if meter.at(middle) < kl else (low, middle)
    found = min(
        (strength for strength in meter.known if strength), key=lambda strength: abs(meter.known[strength] - kl)
    )
    return Calibration(
        replace(push, strength=math.copysign(found, push.strength)), meter.known[found], kl,
        tuple(sorted(meter.known.items())), meter.passes, meter.tokens,
    )  # fmt: skip


def _bracket(meter: "_Meter", first: float, kl: float) -> tuple[float, float]:
    """A strength below the KL and one at or above it, a doubling apart.

    Infinity where none is strong enough, 0 where none is weak enough.
    """
    strength = first
    if meter.at(first) < kl:
        for _ in range(DOUBLINGS):
            strength *= 2
            if meter.at(strength) >= kl:
                return strength / 2, strength
        return strength, math.inf
    for _ in range(DOUBLINGS):
        strength /= 2
        if meter.at(strength) < kl:
            return strength, strength * 2
    return 0.0, strength


class _Meter:
    """Strengths to KLs; the unsteered model is run once."""

    def __init__(self, model: LanguageModel, push: Add, batch: TokenBatch, said: Answers, force: bool) -> None:
        self.model, self.push, self.batch, self.said, self.force = model, push, batch, said, force
        self.rows = [i for i, tokens in enumerate(said.tokens) if tokens]
        if not self.rows:
            raise UserError(
                "the model says nothing to any of the prompts, so there is no KL; give other harmless prompts"
            )
        self.longest = max(len(batch.row(i)) + len(said.tokens[i]) for i in self.rows)
        self.tokens = sum(len(said.tokens[i]) for i in self.rows)
        self.clean: dict[int, Tensor] = {}
        self.known: dict[float, float] = {}
        self.passes = 0
        self.at(0.0)

    def at(self, strength: float) -> float:
        """The 95th percentile of the tokens' KL."""
        if strength not in self.known:
            one = replace(self.push, strength=math.copysign(strength, self.push.strength))
            found = float(self._kl(one).quantile(PERCENTILE))
            # A push that overflows has broken the model altogether.
            self.known[strength] = math.inf if math.isnan(found) else found
            self.passes += 1
        return self.known[strength]

    def near(self, kl: float) -> bool:
        """Whether one of the strengths tried has this KL."""
        return any(abs(own - kl) <= TOLERANCE * kl for own in self.known.values())

    def _kl(self, one: Add) -> Float64[Tensor, " token"]:
        parts = [
            part
            for chunk in chunks(self.rows)
            for part in in_halves(lambda own: self._of(one, own), chunk, self.longest)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def _of(self, one: Add, rows: list[int]) -> Float64[Tensor, " token"]:
        asked = answered(self.model, self.batch, self.said, rows)
        with applied(self.model, [one], asked.prompts, said=asked.longest, force=self.force):
            read = asked.read(logits_everywhere(self.model, asked.tokens))
        found = []
        for row, logits in zip(rows, read, strict=True):
            p = self.clean.setdefault(row, logits).double().log_softmax(dim=-1)
            q = logits.double().log_softmax(dim=-1)
            found.append((p.exp() * (p - q)).sum(dim=-1))
        return torch.cat(found)


def _require(push: object, kl: float) -> None:
    if not isinstance(push, Add):
        raise UserError(
            f"{kind_of(push)} has no strength to be calibrated; give an ml.Add, whose strength is tried first"
        )
    if push.strength == 0:
        raise UserError("the push has strength 0, which can't be doubled; give the one to try first, such as 0.25")
    require_kl(kl)


def require_kl(kl: float) -> None:
    """UserError for what is no KL that a push can have."""
    if not (math.isfinite(kl) and kl > 0):
        raise UserError(f"the KL is {kl}; give a number of nats above 0, such as 1")
