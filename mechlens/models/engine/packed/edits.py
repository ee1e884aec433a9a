"""Many edits of many runs in packed passes: each edit runs the tokens from its own on, from its own block on.

The runs are recorded together. An edited row joins the line at its block, as a copy of its run's tokens there, and
reads the keys before them from the recording. No token is run that the edits leave as it was: what a pass costs is the
arithmetic of what can have changed.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.models.engine.caches import ReadOnlyCache
from mechlens.models.engine.edits import Edit, Recording, site_values, value_at
from mechlens.models.engine.growing import edited_alone, why_not_growing
from mechlens.models.engine.packed.packing import Packing, pack, pack_prompts, packed_pass, packs
from mechlens.models.engine.probes import finite_on_cpu, spread_tokens
from mechlens.models.engine.shared_rows import fault, fault_of_trial
from mechlens.models.engine.site_reader import by_head, same_site, tapped, taps_of
from mechlens.models.native import native, native_blocks
from mechlens.models.sites import n_heads


@dataclass(frozen=True)
class PackedRuns:
    """Runs recorded together, a token that they share being there once."""

    runs: tuple[Recording, ...]
    paths: tuple[tuple[int, ...], ...]
    """Where the tokens of each run stand among the recorded ones."""
    cache: DynamicCache
    """Keys and values of every recorded token."""


@torch.inference_mode()
def record_packed(
    model: LanguageModel, prompts: Sequence[Sequence[int]], reads: Sequence[int], site: str, layers: Sequence[int]
) -> PackedRuns:
    """Runs every prompt: logits at its token of `reads`, and what the layers have at the site."""
    packing, paths = pack_prompts(prompts, 0)
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        return lambda value: seen.__setitem__(layer, by_head(model, site, value)[0].clone())

    taps = taps_of(model, site, layers) or {}
    ends = torch.tensor([path[read] for path, read in zip(paths, reads, strict=True)])  # on the CPU, see `growing`
    cache = DynamicCache()
    with native(model) as hf_model, tapped({tap: keep(layer) for layer, tap in taps.items()}):
        logits = packed_pass(model, hf_model, packing, cache, logits_to_keep=ends).logits[0]
    runs = [
        Recording(tuple(ids), own, {layer: value[path] for layer, value in seen.items()})
        for ids, path, own in zip(prompts, paths, finite_on_cpu(logits), strict=True)
    ]
    return PackedRuns(tuple(runs), tuple(map(tuple, paths)), cache)


@dataclass(frozen=True)
class RunEdit:
    """An edit of one of several runs."""

    run: int
    edit: Edit


@torch.inference_mode()
def packed_edited_logits(
    model: LanguageModel,
    recorded: PackedRuns,
    site: str,
    edits: Sequence[RunEdit],
    reads: Sequence[int],
    tokens: Sequence[int] | None = None,
) -> Float[Tensor, "row logit"]:
    """Logits after each edit at its run's token of `reads` (float32, CPU); no edit may stand after that token.

    Of all tokens, or of some. The runs' own rows come along, below the edits and to the end, as what is copied.
    """
    line = _Line(model, recorded, edits, reads)
    with _growing(model, site, line) as hf_model, _head_of(hf_model, tokens) as chosen:
        cache = ReadOnlyCache(recorded.cache, recorded.cache.get_seq_length())
        found = chosen(packed_pass(model, hf_model, line.packing, cache, logits_to_keep=line.ends).logits[0])
    return finite_on_cpu(found)


@contextlib.contextmanager
def _head_of(hf_model: Any, tokens: Sequence[int] | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """The model with a head that gives some tokens' logits, where it is plain; gives what takes them out elsewhere."""
    head = hf_model.get_output_embeddings()
    moved = head is not None and "_hf_hook" in vars(head)  # accelerate brings its weights and input to one device
    if tokens is None or moved or type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        yield lambda logits: logits if tokens is None else logits[:, list(tokens)]
        return
    before = head.__dict__.get("forward")
    weight = head.weight[list(tokens)]
    bias = None if head.bias is None else head.bias[list(tokens)]
    head.__dict__["forward"] = lambda x: nn.functional.linear(x, weight, bias)
    try:
        yield lambda logits: logits
    finally:
        head.__dict__.pop("forward") if before is None else head.__dict__.update(forward=before)


class _Line:
    """The tokens of the runs' own rows and of every edit's, in the order in which they join."""

    def __init__(
        self, model: LanguageModel, recorded: PackedRuns, edits: Sequence[RunEdit], reads: Sequence[int]
    ) -> None:
        order = sorted(range(len(edits)), key=lambda i: edits[i].edit.layer)
        ordered = [edits[i] for i in order]
        first: dict[int, int] = {}
        for one in ordered:
            first[one.run] = min(one.edit.position, first.get(one.run, one.edit.position))
        rows = [self._row(recorded, run, at, reads) for run, at in first.items()]
        self.packing: Packing = pack(
            rows + [self._row(recorded, one.run, one.edit.position, reads) for one in ordered],
            recorded.cache.get_seq_length(),
        )
        starts = [0, *self.packing.ends[:-1]]
        # Where each run's token 0 would stand in the line.
        origin = {run: start - at for start, (run, at) in zip(starts, first.items(), strict=False)}
        self.begin = self.packing.ends[len(first) - 1]
        ends = dict(zip(order, self.packing.ends[len(first) :], strict=True))
        self.ends = torch.tensor([ends[i] - 1 for i in range(len(edits))])
        places = starts[len(first) :]
        self.by_layer: dict[int, list[tuple[int, Edit]]] = {}
        joining: dict[int, list[int]] = {}
        for place, one in zip(places, ordered, strict=True):
            self.by_layer.setdefault(one.edit.layer, []).append((place, one.edit))
            source = range(origin[one.run] + one.edit.position, origin[one.run] + reads[one.run] + 1)
            joining.setdefault(one.edit.layer, []).extend(source)
        self.joining = {layer: torch.tensor(source) for layer, source in joining.items()}
        grown = itertools.accumulate((len(joining.get(i, ())) for i in range(n_layers(model))), initial=self.begin)
        self.tokens = list(grown)[1:]

    @staticmethod
    def _row(recorded: PackedRuns, run: int, at: int, reads: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        return recorded.paths[run][:at], recorded.runs[run].ids[at : reads[run] + 1]


@contextlib.contextmanager
def _growing(model: LanguageModel, site: str, line: _Line) -> Iterator[nn.Module]:
    """The plain model as its line grows: an edit's tokens join before its block and are edited in it."""
    taps = taps_of(model, site, line.by_layer) or {}
    with contextlib.ExitStack() as stack:
        hf_model = stack.enter_context(native(model))
        for i, block in enumerate(native_blocks(model)):
            stack.callback(block.register_forward_pre_hook(_entering(line, i), with_kwargs=True).remove)
        stack.enter_context(tapped({tap: _writing(model, site, line.by_layer[layer]) for layer, tap in taps.items()}))
        yield hf_model


def _entering(line: _Line, i: int) -> Any:
    whole, tokens = len(line.packing.ids), line.tokens[i]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if i == 0:
            hidden = hidden[:, : line.begin]
        if i in line.joining:
            hidden = torch.cat([hidden, hidden[:, line.joining[i].to(hidden.device)]], dim=1)
        args, kwargs = _begun(args[1:], whole, tokens), _begun(kwargs, whole, tokens)
        return (
            ((hidden, *args), kwargs) if "hidden_states" not in kwargs else (args, kwargs | {"hidden_states": hidden})
        )

    return hook


def _begun(value: Any, whole: int, tokens: int) -> Any:
    """What a block is given beside the residual stream, such as rotary tables: that of the tokens that are there."""
    if isinstance(value, Tensor):
        by_token = value.ndim > 1 and value.shape[:2] == (1, whole)
        return value[:, :tokens] if by_token else value
    if isinstance(value, dict):
        return {name: _begun(own, whole, tokens) for name, own in value.items()}
    if isinstance(value, tuple):
        return tuple(_begun(own, whole, tokens) for own in value)
    return value


def _writing(model: LanguageModel, site: str, edits: list[tuple[int, Edit]]) -> Callable[[Tensor], object]:
    places: Int[Tensor, " edit"] = torch.tensor([place for place, _ in edits])
    heads = None if edits[0][1].head is None else torch.tensor([edit.head for _, edit in edits])

    def write(value: Tensor) -> None:
        rows = by_head(model, site, value)[0]
        values = torch.stack([edit.value for _, edit in edits]).to(rows.device, rows.dtype)
        where = places.to(rows.device)
        rows[where if heads is None else (where, heads.to(rows.device))] = values

    return write


LOGITS_AT_ONCE = 1 << 24
"""Logits that a pass gives at most, with a large vocabulary and edits at the last token: 64 MB."""


def chunks_of_edits(layers: Sequence[int], tokens: Sequence[int], max_tokens: int, logits: int) -> list[list[int]]:
    """Indices of the edits pass by pass, by layer: a pass has about as many tokens in all of its blocks.

    `logits` is how many are kept of each edit.
    """
    chunks: list[list[int]] = []
    room, most = 0, max(1, LOGITS_AT_ONCE // logits)
    for i in sorted(range(len(layers)), key=lambda i: (layers[i], -tokens[i])):
        if tokens[i] > room or len(chunks[-1]) == most:
            chunks.append([])
            room = max_tokens
        chunks[-1].append(i)
        room -= tokens[i]
    return chunks


def packs_edits(model: LanguageModel, site: str, longest: int) -> bool:
    """True where packed edits of runs give what a plain forward with a hook gives, tried on a few tokens."""
    if why_not_growing(model, site) or not packs(model, longest):
        return False
    if taps_of(model, site, range(n_layers(model))) is None:
        return False
    use = f"of packed edits at {site}"
    return not fault(model, use, lambda: fault_of_trial(model, use, lambda: _packed_and_plain(model, site)))


@torch.inference_mode()
def _packed_and_plain(model: LanguageModel, site: str) -> list[tuple[Tensor, Tensor]]:
    numbers, reads = [[3, 4, 5, 6, 7, 2], [3, 4, 9, 8, 1, 1, 2]], [5, 5]
    prompts = [spread_tokens(model.original_model, own) for own in numbers]
    layers, head = sorted({0, n_layers(model) // 2, n_layers(model) - 1}), 0 if n_heads(model, site) else None
    recorded = record_packed(model, prompts, reads, site, layers)
    places = zip((0, 0, 1, 1), (layers[0], layers[-1], layers[len(layers) // 2], layers[0]), (2, 5, 3, 2), strict=True)
    edits = [
        RunEdit(run, Edit(layer, at, value_at(recorded.runs[1 - run].values[layer], site, at, head), head))
        for run, layer, at in places
    ]
    found = packed_edited_logits(model, recorded, site, edits, reads)
    some = packed_edited_logits(model, recorded, site, edits, reads, (7, 2))
    right = [edited_alone(model, prompts[one.run], site, one.edit, reads[one.run]) for one in edits]
    values = site_values(model, prompts[1], site, layers)
    read = [same_site(recorded.runs[1].values[layer], values[layer]) for layer in layers]
    return [(found, torch.stack(right)), (some, torch.stack(right)[:, [7, 2]]), *read]
