"""Activation patching: which layer, position and head carries the difference between two runs.

Denoising runs the corrupt prompt and puts one clean activation in (is it enough to bring the behaviour back?);
noising runs the clean prompt and puts one corrupt activation in (is it needed?). Heimersheim & Nanda 2024.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.errors import UserError
from mechlens.methods.activations.reading import halving
from mechlens.methods.cache import Cache
from mechlens.methods.patching.attribution import attributed
from mechlens.methods.patching.metrics import Metric, OwnMetric, require_tokens
from mechlens.methods.patching.plan import PatchPlan, opened_axes, opened_positions, refuse_other_shape, tokenized_pairs
from mechlens.methods.patching.result import PatchResult
from mechlens.models.bridge import (
    LanguageModel,
    checkpoint_now,
    device_of,
    dtype_of,
    embedding_rows,
    has_hooks,
    loaded,
    n_layers,
)
from mechlens.models.engine.edits import (
    Edit,
    Recording,
    bears_edits,
    is_laid_out,
    reference_edited_logits,
    reference_record,
    value_at,
)
from mechlens.models.engine.growing import can_grow, edit_batches, edited_logits, record, why_not_growing
from mechlens.prompts.batch import TokenBatch, token_text
from mechlens.prompts.prompt import PromptPair
from mechlens.prompts.templates.template import ChatTemplate


def pair_edits(
    plan: PatchPlan,
    layers: Sequence[int],
    heads: Sequence[int],
    start: Recording,
    source: Recording,
    places: Sequence[tuple[int, int]],
) -> list[Edit]:
    """Every site with the value that is put there, in the grid's order: layer, position, head.

    `start` is the run that is edited, `source` the one that values come from, `places` one role's index in each.
    """
    values = source.values
    if plan.random_seed is not None:
        # Every pair draws its own vectors: one vector for all would have an effect of its own, the same in each.
        drawn = hashlib.sha256(json.dumps([plan.random_seed, start.ids, source.ids]).encode()).hexdigest()
        generator = torch.Generator().manual_seed(int(drawn[:15], 16))
        values = _as_far_at_random(start.values, values, plan.site, layers, heads, places, generator)
        places = [(place, place) for place, _ in places]
    return [
        Edit(layer, to, value_at(values[layer], plan.site, come, head), head)
        for layer in layers
        for to, come in places
        for head in (heads or (None,))
    ]


def _as_far_at_random(
    own: dict[int, Tensor],
    source: dict[int, Tensor],
    site: str,
    layers: Sequence[int],
    heads: Sequence[int],
    places: Sequence[tuple[int, int]],
    generator: torch.Generator,
) -> dict[int, Tensor]:
    """The run's own values plus, at each place, a random vector of the norm of the difference to the source."""
    changed = {layer: value.clone() for layer, value in own.items()}
    for layer in layers:
        for to, come in places:
            for head in heads or (None,):
                mine = value_at(own[layer], site, to, head)
                gap = (value_at(source[layer], site, come, head) - mine).float().norm()
                noise = torch.randn(mine.shape, generator=generator).to(mine.device)
                if site == "pattern":
                    noise[mine == 0] = 0  # tokens that can't be attended to stay so
                length = noise.norm().clamp(min=torch.finfo(noise.dtype).tiny)  # a pattern may attend to nothing
                value_at(changed[layer], site, to, head).copy_(mine + (noise * gap / length).to(mine.dtype))
    return changed


GROWING, PLAIN, ATTRIBUTION = "growing batch", "plain", "attribution"


def patch_sweep(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    metric: Metric,
    plan: PatchPlan,
    *,
    source_model: LanguageModel | None = None,
    template: ChatTemplate | None = None,
    cache: Cache | None = None,
    engine: str = "auto",
) -> PatchResult:
    """The metric after patching every site of the plan, for every pair.

    `source_model` takes the values from another checkpoint instead: its run of each pair's prompt (`clean` when
    denoising) is run through it. `engine`: "growing batch" and "plain" are exact and equal, "auto" takes the first
    that the model bears; "attribution" is the first-order estimate from two forward passes and one backward.
    Pairs of unequal length are aligned by role, which needs named positions. UserError for sites, layers, heads
    and positions that there are not.
    """
    require_tokens(metric, embedding_rows(model))
    both = tokenized_pairs(model, pairs, template)
    layers, heads = opened_axes(model, plan)
    positions = opened_positions(both, plan, pairs)
    source = model if source_model is None else source_model
    refuse_other_shape(model, source)
    if isinstance(metric, OwnMetric) or has_hooks(model) or has_hooks(source):
        cache = None  # two functions can't be told apart by name, so nothing of theirs is kept
    if not is_laid_out(model, plan.site, layers[0]):
        raise UserError(
            f"TransformerLens lays out {plan.site!r} of this model in a way of its own, so tokens and heads can't be "
            "told apart there; choose another site, such as resid_pre or attn_out"
        )
    if not bears_edits(model, plan.site, layers[0]):
        raise UserError(f"in this model {plan.site!r} can be read and not changed; choose another site, such as z")
    used = _choose_engine(model, plan.site, engine)
    weights = tuple(now.identity for now in map(checkpoint_now, (model, source)))
    work = _Sweep(model, source, metric, plan, layers, heads, used, weights)
    rows = []
    for i in tqdm(range(len(pairs)), desc=f"patching {plan.site}", unit="pair", delay=2, leave=False):
        rows.append(work.pair(both[0], both[1], i, positions, cache))
    values, clean, corrupt = (torch.stack(column) for column in zip(*rows, strict=True))
    tokenizer = loaded(model).tokenizer
    first = both[0].row(0)
    shown = [token_text(tokenizer, first[int(both[0].at(name)[0]) - both[0].offset(0)]) for name in positions]
    return PatchResult(
        values=values,
        clean=clean,
        corrupt=corrupt,
        pairs=tuple(pair.clean.id for pair in pairs),
        families=tuple(pair.clean.group for pair in pairs),
        layers=layers,
        positions=positions,
        heads=heads,
        tokens=tuple(shown),
        site=plan.site,
        metric=metric.name,
        mode=plan.mode,
        engine=used,
        source=_source_name(plan, source_model),
        why_plain=why_not_growing(model, plan.site) if engine == "auto" else "",
    )


def _source_name(plan: PatchPlan, source_model: LanguageModel | None) -> str:
    if plan.random_seed is not None:
        return "random"
    return loaded(source_model).checkpoint.name if source_model is not None else "other prompt"


def _choose_engine(model: LanguageModel, site: str, engine: str) -> str:
    if engine not in ("auto", GROWING, PLAIN, ATTRIBUTION):
        raise UserError(f"there is no engine {engine!r}; choose auto, {GROWING}, {PLAIN} or {ATTRIBUTION}")
    if engine in (PLAIN, ATTRIBUTION):
        return engine
    if engine == GROWING and (reason := why_not_growing(model, site)):
        raise UserError(f"this model can't take the growing-batch engine: {reason}; choose engine='auto' or 'plain'")
    return GROWING if can_grow(model, site) else PLAIN


@dataclass(frozen=True)
class _Sweep:
    """Everything that stays the same from pair to pair."""

    model: LanguageModel
    source_model: LanguageModel
    metric: Metric
    plan: PatchPlan
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    engine: str
    weights: tuple[tuple[str, str, str], ...]
    """Identity of the model and of the source as they are now."""

    def pair(
        self, clean: TokenBatch, corrupt: TokenBatch, i: int, positions: tuple[str, ...], cache: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values (layer, position, head), and the metric of the clean and the corrupt run."""
        start, source = (corrupt, clean) if self.plan.mode == "denoising" else (clean, corrupt)
        places = [(self._index(start, name, i), self._index(source, name, i)) for name in positions]
        read = self._index(start, self.plan.read, i)
        if self.plan.site == "pattern":
            same_length = len(start.row(i)) == len(source.row(i))
            if not same_length or any(to != come for to, come in places):
                raise UserError(
                    f"a row of 'pattern' has one number for each token, and the tokens of {start.prompts[i].id!r} and "
                    f"{source.prompts[i].id!r} don't stand in the same places; choose pairs of one length"
                )
        key = self._key(start.row(i), source.row(i), places, read)
        piece = cache.get(key) if cache is not None else None
        if piece is None:
            piece = self._compute(start.row(i), source.row(i), places, read, self._index(source, self.plan.read, i))
            if cache is not None:
                cache.put(key, piece)
        ends = (piece["source"], piece["start"])
        shape = (len(self.layers), len(positions), max(len(self.heads), 1))
        return piece["values"].reshape(shape), *(ends if self.plan.mode == "denoising" else ends[::-1])

    def _index(self, batch: TokenBatch, name: str, i: int) -> int:
        return int(batch.at(name)[i]) - batch.offset(i)

    def _compute(
        self, start_ids: list[int], source_ids: list[int], places: list[tuple[int, int]], read: int, source_read: int
    ) -> dict[str, Tensor]:
        start = self._run(self.model, start_ids, read, self.layers if self.plan.random_seed is not None else ())
        source = self._run(self.source_model, source_ids, source_read, self.layers)
        edits = pair_edits(self.plan, self.layers, self.heads, start, source, places)
        clean = source.logits if self.plan.mode == "denoising" else start.logits
        if self.engine == ATTRIBUTION:
            values = attributed(self.model, self.plan.site, start_ids, edits, self.metric, clean, read)
        else:
            values = (self._grown if self.engine == GROWING else self._plain)(start, edits, read, clean)
        ends = self.metric(torch.stack([start.logits, source.logits]), clean)
        return {"values": values, "start": ends[0].clone(), "source": ends[1].clone()}

    def _run(self, model: LanguageModel, ids: list[int], read: int, layers: tuple[int, ...]) -> Recording:
        if self.engine == GROWING and can_grow(model, self.plan.site):
            return record(model, ids, read, self.plan.site, layers)
        return reference_record(model, ids, read, self.plan.site, layers)

    def _plain(self, start: Recording, edits: list[Edit], read: int, clean: Tensor) -> Tensor:
        rows = [reference_edited_logits(self.model, start.ids, self.plan.site, edit, read) for edit in edits]
        return torch.cat([self.metric(row[None], clean) for row in rows])

    def _grown(self, start: Recording, edits: list[Edit], read: int, clean: Tensor) -> Tensor:
        values = torch.empty(len(edits), dtype=torch.float64)
        budget = self.plan.max_tokens or (2048 if device_of(self.model).type == "cpu" else 32768)

        def run(chunk: list[int]) -> Tensor:
            logits = edited_logits(self.model, start, self.plan.site, [edits[i] for i in chunk], read)
            return self.metric(logits[1:], clean)

        for chunk in edit_batches(edits, len(start.ids), read, n_layers(self.model), budget):
            values[torch.tensor(chunk)] = halving(run, chunk, len(start.ids))
        return values

    def _key(self, start: list[int], source: list[int], places: list[tuple[int, int]], read: int) -> str:
        record_ = [
            "patch", self.weights, str(dtype_of(self.model)), str(dtype_of(self.source_model)), self.engine,
            repr(replace(self.plan, max_tokens=None)), repr(self.metric),
            self.layers, self.heads, start, source, places, read,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(record_).encode()).hexdigest()
