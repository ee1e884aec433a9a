"""Exact partial forward passes: many edits of one run at once, computing only what an edit can change.

An edit at layer l and position p leaves everything below layer l and, by causality, everything before p as it
was. So the tokens before the first edited one are taken from the run's keys and values, and the batch starts as
one row, the run itself, and grows on its way up: at block l the rows that are edited there join it as copies of
that row (`SharedRows`). One pass serves every layer. The first row is never edited, so its logits are the run's
own: a check that comes with every pass. No architecture is known by name: a model that can't bear a growing batch
is found out by `can_grow` and takes the plain path.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from mechlens.models.bridge import LanguageModel, device_of, dtype_of, n_layers
from mechlens.models.engine.caches import ReadOnlyCache, with_cache
from mechlens.models.engine.edits import (
    Edit,
    Recording,
    is_laid_out,
    put,
    reference_edited_logits,
    site_values,
    value_at,
)
from mechlens.models.engine.forward import cheapest_pieces, warn_plain, why_plain
from mechlens.models.engine.probes import finite_on_cpu, spread_tokens
from mechlens.models.engine.products import quick_products
from mechlens.models.engine.shared_rows import SharedRows, fault, fault_of_trial
from mechlens.models.engine.site_reader import by_head, same_site, tapped, taps_of
from mechlens.models.native import native, native_blocks
from mechlens.models.sites import n_heads, site_hook


@torch.inference_mode()
def record(model: LanguageModel, ids: Sequence[int], read: int, site: str, layers: Sequence[int]) -> Recording:
    """Runs the tokens once: keys and values, logits at token `read`, and what the layers have at the site."""
    taps = taps_of(model, site, layers)
    values = {} if taps is not None else site_values(model, ids, site, layers)
    cache = DynamicCache()
    tokens = torch.tensor([list(ids)], device=device_of(model))

    def keep(layer: int) -> Callable[[Tensor], None]:
        return lambda value: values.__setitem__(layer, by_head(model, site, value)[0].clone())

    with native(model) as hf_model, tapped({tap: keep(layer) for layer, tap in (taps or {}).items()}):
        last = torch.tensor([read])  # on the CPU: it may index the last block's output, wherever that lies
        out = hf_model(tokens, **with_cache(hf_model, cache), logits_to_keep=last)
    return Recording(tuple(ids), finite_on_cpu(out.logits[0, -1]), values, cache)


PASS_COST = 40
"""What one more pass costs, in tokens through all blocks: small products run slower than large ones (measured)."""


def edit_batches(edits: Sequence[Edit], length: int, read: int, n_layers: int, max_tokens: int) -> list[list[int]]:
    """Indices of the edits pass by pass, cut where late edits run too many tokens and passes are too many.

    Edits at neighbouring positions go together: all rows of a pass begin at its first edited token, so a row edited
    later repeats the tokens in between. A pass holds at most `max_tokens` tokens above its last edited layer.
    """
    by_position: dict[int, list[int]] = {}
    for i in sorted(range(len(edits)), key=lambda i: -edits[i].position):
        by_position.setdefault(min(edits[i].position, read), []).append(i)
    pieces = [piece for at, group in by_position.items() for piece in _split(group, max_tokens // (length - at))]
    widths = [length - min(edits[piece[0]].position, read) for piece in pieces]
    depths = [sum(n_layers - edits[i].layer for i in piece) / n_layers for piece in pieces]

    def costs(end: int) -> Iterator[float]:
        width, rows, depth = widths[end - 1], 0, 0.0
        for start in range(end - 1, -1, -1):
            rows, depth = rows + len(pieces[start]), depth + depths[start]
            if start < end - 1 and (rows + 1) * width > max_tokens:
                return
            yield PASS_COST + width * (1 + depth)

    return [[i for piece in pieces[some] for i in piece] for some in cheapest_pieces(len(pieces), costs)]


def _split(group: list[int], rows: int) -> list[list[int]]:
    """The group in parts of at most `rows` edits beside the run itself, as even as can be."""
    n = -(-len(group) // max(rows - 1, 1))
    return [group[i * len(group) // n : (i + 1) * len(group) // n] for i in range(n)]


@torch.inference_mode()
def edited_logits(
    model: LanguageModel, recording: Recording, site: str, edits: Sequence[Edit], read: int
) -> Float[Tensor, "row vocab"]:
    """Logits at token `read` after each edit; row 0 is the run itself, row i + 1 has edit i (float32, CPU)."""
    first = min(min(edit.position for edit in edits), read)
    # By layer, so that the rows that join at a block stand behind those that it has.
    order = sorted(range(len(edits)), key=lambda i: edits[i].layer)
    ordered = [edits[i] for i in order]
    rows = _shared_rows(model, ordered)
    tokens = torch.tensor([recording.ids[first:]], device=device_of(model))
    with _growing(model, site, ordered, rows, first) as hf_model:
        cache = ReadOnlyCache(recording.cache, first)
        keep = torch.tensor([read - first])  # on the CPU, as in `record`
        out = hf_model(tokens, **with_cache(hf_model, cache), logits_to_keep=keep)
    logits = finite_on_cpu(out.logits[:, -1])
    placed = torch.empty_like(logits)
    placed[torch.tensor([0, *(i + 1 for i in order)])] = logits
    return placed


def _shared_rows(model: LanguageModel, ordered: Sequence[Edit]) -> SharedRows:
    """The run itself, and every edit as a row of its own from its layer on."""
    n = len(ordered) + 1
    classes = [
        [0, *(row if edit.layer <= block else 0 for row, edit in enumerate(ordered, start=1))]
        for block in range(n_layers(model))
    ]
    return SharedRows(classes, [0] * n, entry=[0] * n)


@contextlib.contextmanager
def _growing(
    model: LanguageModel, site: str, ordered: Sequence[Edit], rows: SharedRows, first: int
) -> Iterator[nn.Module]:
    """The Hugging Face model as its batch grows: the rows of each layer join before its block and are edited in it."""
    by_layer = {layer: list(group) for layer, group in itertools.groupby(ordered, key=lambda edit: edit.layer)}
    taps = taps_of(model, site, by_layer)
    with contextlib.ExitStack() as stack:
        if taps is not None:  # the plain modules are faster, and the site lies between two of them
            hf_model, blocks = stack.enter_context(native(model)), native_blocks(model)
        else:
            hf_model, blocks = model.original_model, list(model.blocks)
            stack.enter_context(quick_products(hf_model))
        stack.enter_context(rows.running(blocks))
        if taps is not None:
            writing = {tap: _writing(model, site, by_layer[layer], first) for layer, tap in taps.items()}
            stack.enter_context(tapped(writing))
        else:
            hooks = [(site_hook(site, layer), _hooking(site, edits, first)) for layer, edits in by_layer.items()]
            stack.enter_context(model.hooks(fwd_hooks=hooks))
        yield hf_model


def _writing(model: LanguageModel, site: str, edits: list[Edit], first: int) -> Callable[[Tensor], object]:
    return lambda value: put(by_head(model, site, value[-len(edits) :]), edits, site, first)


def _hooking(site: str, edits: list[Edit], first: int) -> Callable[..., Tensor]:
    def hook(value: Tensor, hook: Any) -> Tensor:
        put(value[-len(edits) :], edits, site, first)
        return value

    return hook


def can_grow(model: LanguageModel, site: str) -> bool:
    """True where a growing batch gives what a plain forward with a hook gives; where not, one warning says why."""
    reason = why_not_growing(model, site)
    warn_plain(model, reason)
    return not reason


@torch.inference_mode()
def why_not_growing(model: LanguageModel, site: str) -> str:
    """Why a model takes the plain path at a site, tried once on a few tokens; empty where a growing batch is exact.

    Some architectures build their masks for a fixed batch (ALiBi), keep no keys and values, or route tokens by batch.
    """
    reason = why_plain(model)
    if reason:
        return reason
    return fault(model, site, lambda: _growing_fault(model, site))


def edited_alone(model: LanguageModel, ids: Sequence[int], site: str, edit: Edit, read: int) -> Float[Tensor, " vocab"]:
    """Logits at token `read` after one edit in a whole pass of its own, to hold others against (float32, CPU).

    In half precision with the attention that those have, where a plain module has the site as its input: that of
    TransformerLens rounds otherwise, and in some models this adds up to a fifth of the largest logit.
    """
    taps = taps_of(model, site, [edit.layer]) if dtype_of(model) != torch.float32 else None
    if taps is None:
        return reference_edited_logits(model, ids, site, edit, read)
    tokens = torch.tensor([list(ids)], device=device_of(model))
    with native(model) as hf_model, tapped({taps[edit.layer]: _writing(model, site, [edit], 0)}):
        return finite_on_cpu(hf_model(tokens, use_cache=False).logits[0, read])


def _growing_fault(model: LanguageModel, site: str) -> str:
    ids, last, top = spread_tokens(model.original_model, range(1, 9)), 7, n_layers(model) - 1
    layers = sorted({0, top // 2, top})
    if not is_laid_out(model, site, 0):
        return f"its heads at {site} are laid out otherwise than by head and dimension"
    source = site_values(model, ids[::-1], site, layers)
    head = 0 if n_heads(model, site) else None
    places = ((layers[0], 3), (layers[-1], 5), (layers[len(layers) // 2], 7))
    edits = [Edit(layer, place, value_at(source[layer], site, place, head), head) for layer, place in places]
    plain = torch.stack([edited_alone(model, ids, site, edit, last) for edit in edits])

    def trial() -> list[tuple[Tensor, Tensor]]:
        read = record(model, ids[::-1], last, site, layers).values
        recording = record(model, ids, last, site, ())
        fast = edited_logits(model, recording, site, edits, last)
        whole = edited_logits(model, recording, site, [replace(edits[0], position=0)], last)
        return [(fast[1:], plain), (fast[0], whole[0]), *(same_site(read[layer], source[layer]) for layer in layers)]

    return fault_of_trial(model, f"at {site}", trial)
