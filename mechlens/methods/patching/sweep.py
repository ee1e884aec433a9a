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

from mechlens.errors import UserError
from mechlens.methods.activations.reading import halving, in_halves
from mechlens.methods.cache import Cache
from mechlens.methods.patching.attribution import attributed
from mechlens.methods.patching.metrics import Metric, MetricLike, OwnMetric, as_metric, require_tokens, try_metric
from mechlens.methods.patching.packed import packed_pieces
from mechlens.methods.patching.plan import PatchPlan, opened_axes, opened_positions, refuse_other_shape, tokenized_pairs
from mechlens.methods.patching.result import PatchResult
from mechlens.methods.patching.task import PairTask, pair_edits, pair_task, piece
from mechlens.methods.progress import progress_bar
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
)
from mechlens.models.engine.forward import batch_tokens
from mechlens.models.engine.growing import can_grow, edit_batches, edited_logits, record, why_not_growing
from mechlens.models.engine.packed.edits import (
    packs_edits,
)
from mechlens.prompts.asked import Pairs, as_pairs
from mechlens.prompts.batch import token_text
from mechlens.prompts.templates.template import TemplateChoice

GROWING, PLAIN, ATTRIBUTION = "growing batch", "plain", "attribution"


def patch_sweep(
    model: LanguageModel,
    pairs: Pairs,
    metric: MetricLike,
    plan: PatchPlan,
    *,
    source_model: LanguageModel | None = None,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
    engine: str = "auto",
) -> PatchResult:
    """The metric after patching every site of the plan, for every pair.

    A metric is one of ours (`LogitDifference`, ...) or a function of the logits at `plan.read`, (row, vocab), that
    gives one number for each row, such as `lambda logits: logits[:, 5] - logits[:, 7]`; pairs may be two texts each.

    `source_model` takes the values from another checkpoint instead: its run of each pair's prompt (`clean` when
    denoising) is run through it. `engine`: "growing batch" and "plain" are exact and equal, "auto" takes the first
    that the model bears; "attribution" is the first-order estimate from two forward passes and one backward.
    Pairs of unequal length are aligned by role, which needs named positions. UserError for sites, layers, heads
    and positions that there are not.

    >>> model = ml.load("smollm2")
    >>> pairs = ml.builtin_pairs()[:2]
    >>> plan = ml.PatchPlan("resid_pre", positions=("inst", "post[*]"))
    >>> result = ml.patch_sweep(model, pairs, ml.LogProbability(model.to_single_token("a")), plan)
    >>> result.values.shape[0], result.positions[0]
    (2, 'inst')
    """
    pairs, metric = as_pairs(pairs), as_metric(metric)
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
    own = checkpoint_now(model).identity  # looks at every weight
    weights = (own, own if source is model else checkpoint_now(source).identity)
    longest = int(max(batch.lengths.max() for batch in both))
    packed = used == GROWING and all(packs_edits(one, plan.site, longest) for one in (model, source))
    work = _Sweep(model, source, metric, plan, layers, heads, used, weights, packed)
    tasks = [pair_task(both, i, plan, positions) for i in range(len(pairs))]
    if isinstance(metric, OwnMetric):
        ends = [reference_record(model, tasks[0].start, tasks[0].read, plan.site, ()).logits]
        ends.append(reference_record(source, tasks[0].source, tasks[0].source_read, plan.site, ()).logits)
        try_metric(metric, torch.stack(ends), gradient=used == ATTRIBUTION)
    rows = work.run(tasks, cache)
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
    packed: bool
    """Whether edits of several pairs share passes, without padding."""

    def run(self, tasks: list[PairTask], cache: Cache | None) -> list[tuple[Tensor, ...]]:
        """Of each pair values (layer, position, head), and the metric of the clean and the corrupt run."""
        keys = [self._key(task) for task in tasks]
        pieces = {i: kept for i, key in enumerate(keys) if cache is not None and (kept := cache.get(key)) is not None}
        bar = progress_bar(total=len(tasks), done=len(pieces), title=f"patching {self.plan.site}", unit="pair")
        with bar:
            # Groups don't depend on what is on the cache, so a sweep that goes on ends with the same numbers.
            for group in self._groups(tasks):
                if all(i in pieces for i in group):
                    continue
                for i, made in zip(group, self._computed([tasks[i] for i in group]), strict=True):
                    bar.update(i not in pieces)
                    pieces[i] = made
                    if cache is not None:
                        cache.put(keys[i], made)
        shape = (len(self.layers), len(tasks[0].places), max(len(self.heads), 1))
        ends = ("source", "start") if self.plan.mode == "denoising" else ("start", "source")
        return [(pieces[i]["values"].reshape(shape), *(pieces[i][end] for end in ends)) for i in range(len(tasks))]

    def _groups(self, tasks: list[PairTask]) -> list[list[int]]:
        """Pairs whose edits make up one pass together."""
        if not self.packed:
            return [[i] for i in range(len(tasks))]
        each = len(self.layers) * max(len(self.heads), 1)
        groups: list[list[int]] = []
        room = 0
        for i, task in enumerate(tasks):
            size = len(task.start) + len(task.source) + each * task.tokens(one_model=self.source_model is self.model)
            if size > room:
                groups.append([])
                room = self._budget
            groups[-1].append(i)
            room -= size
        return groups

    @property
    def _budget(self) -> int:
        on_cpu = device_of(self.model).type == "cpu"
        return self.plan.max_tokens or (batch_tokens(self.model, 2048) if on_cpu else 32768)

    def _computed(self, tasks: list[PairTask]) -> list[dict[str, Tensor]]:
        if self.packed:
            parts = in_halves(self._packed, tasks, max(len(task.start) for task in tasks))
            return [made for part in parts for made in part]
        (task,) = tasks
        start = self._recorded(
            self.model, task.start, task.read, self.layers if self.plan.random_seed is not None else ()
        )
        source = self._recorded(self.source_model, task.source, task.source_read, self.layers)
        edits = pair_edits(self.plan, self.layers, self.heads, start, source, task.places)
        clean = source.logits if self.plan.mode == "denoising" else start.logits
        if self.engine == ATTRIBUTION:
            values = attributed(self.model, self.plan.site, task.start, edits, self.metric, clean, task.read)
        else:
            values = (self._grown if self.engine == GROWING else self._plain)(start, edits, task.read, clean)
        return [piece(self.plan, self.metric, values, start, source)]

    def _packed(self, tasks: list[PairTask]) -> list[dict[str, Tensor]]:
        return packed_pieces(
            self.model, self.source_model, tasks, self.plan, self.layers, self.heads, self.metric, self._budget
        )

    def _recorded(self, model: LanguageModel, ids: Sequence[int], read: int, layers: tuple[int, ...]) -> Recording:
        if self.engine == GROWING and can_grow(model, self.plan.site):
            return record(model, ids, read, self.plan.site, layers)
        return reference_record(model, ids, read, self.plan.site, layers)

    def _plain(self, start: Recording, edits: list[Edit], read: int, clean: Tensor) -> Tensor:
        rows = [reference_edited_logits(self.model, start.ids, self.plan.site, edit, read) for edit in edits]
        return torch.cat([self.metric(row[None], clean) for row in rows])

    def _grown(self, start: Recording, edits: list[Edit], read: int, clean: Tensor) -> Tensor:
        values = torch.empty(len(edits), dtype=torch.float64)

        def run(chunk: list[int]) -> Tensor:
            logits = edited_logits(self.model, start, self.plan.site, [edits[i] for i in chunk], read)
            return self.metric(logits[1:], clean)

        for chunk in edit_batches(edits, len(start.ids), read, n_layers(self.model), self._budget):
            values[torch.tensor(chunk)] = halving(run, chunk, len(start.ids))
        return values

    def _key(self, task: PairTask) -> str:
        record_ = [
            "patch", self.weights, str(dtype_of(self.model)), str(dtype_of(self.source_model)), self.engine,
            repr(replace(self.plan, max_tokens=None)), repr(self.metric),
            self.layers, self.heads, task.start, task.source, task.places, task.read,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(record_).encode()).hexdigest()
