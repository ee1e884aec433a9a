"""Path patching: which later heads read what one head writes (Wang et al. 2022), by TransformerLens' own sweep."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.patching.metrics import Metric, MetricLike, as_metric, require_tokens, try_metric
from mechlens.methods.patching.plan import MODES, tokenized_pairs
from mechlens.methods.patching.result import PatchResult
from mechlens.methods.progress import progress_bar
from mechlens.models.bridge import LanguageModel, device_of, embedding_rows, n_layers
from mechlens.models.engine.edits import reference_record
from mechlens.models.sites import n_heads, site_hook
from mechlens.prompts.asked import Pairs, as_pairs
from mechlens.prompts.templates.template import TemplateChoice


@torch.inference_mode()
def paths_from_head(
    model: LanguageModel,
    ids: Sequence[int],
    source_ids: Sequence[int],
    sender: tuple[int, int],
    receiver: str,
    metric: Callable[[Float[Tensor, "1 seq vocab"]], Tensor],
) -> Float[Tensor, "layer head"]:
    """TransformerLens' direct-path patching on the run `ids`; rows up to the sender's layer are no measurements.

    UserError where TransformerLens can't take a head's input apart, with its reason.
    """
    try:
        from transformer_lens.patching import get_act_patch_direct_path
    except ImportError as error:
        raise UserError("path patching came with TransformerLens 4; this is an older one, so update it") from error
    tokens, source = (torch.tensor([list(run)], device=device_of(model)) for run in (ids, source_ids))
    layer, head = sender
    z = site_hook("z", layer)
    caches = [model.run_with_cache(run, names_filter=lambda name: name == z)[1] for run in (source, tokens)]
    try:
        found: Tensor = get_act_patch_direct_path(
            model, tokens, *caches, metric, layer, head, component=receiver, verbose=False
        )
    except RuntimeError as error:  # it has no fork of its attention's inputs to hook
        raise UserError(f"TransformerLens can't patch paths in this model: {error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    return found.cpu()


RECEIVERS = ("q", "k", "v")


def path_sweep(
    model: LanguageModel,
    pairs: Pairs,
    metric: MetricLike,
    sender: tuple[int, int],
    *,
    receiver: str = "q",
    mode: str = "denoising",
    template: TemplateChoice = "tokenizer",
) -> PatchResult:
    """The metric after patching what the head `sender` (layer, head) writes, as one later head alone reads it.

    At every token the difference of the two runs' writes is added to the input of the receiving head's queries, keys
    or values; all other readers see the run as it is. One forward pass for every later head and pair. The statistics
    are PatchResult's: TransformerLens' own resample prompts, not families, and don't correct for the number of sites.
    UserError for pairs of unequal length and where TransformerLens can't take the model's attention apart.

    >>> model = ml.load("smollm2")
    >>> pairs = ml.builtin_pairs()[:2]
    >>> metric = ml.LogProbability(model.to_single_token("a"))
    >>> same = [ml.PromptPair(pair.clean, pair.clean) for pair in pairs]
    >>> result = ml.path_sweep(model, same, metric, sender=(0, 1), receiver="q")
    >>> bool(result.effect().abs().nan_to_num().max() < 1e-4)  # a prompt patched into itself changes nothing
    True
    """
    pairs, metric = as_pairs(pairs), as_metric(metric)
    require_tokens(metric, embedding_rows(model))
    _refuse_what_there_is_not(model, sender, receiver, mode)
    clean, corrupt = tokenized_pairs(model, pairs, template)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in progress_bar(range(len(pairs)), title="patching paths", unit="pair"):
        runs = {"denoising": (corrupt.row(i), clean.row(i)), "noising": (clean.row(i), corrupt.row(i))}
        start, source = runs[mode]
        if len(start) != len(source):
            raise UserError(
                f"a path is patched at every token, and {pairs[i].clean.id!r} and {pairs[i].corrupt.id!r} have "
                f"{len(clean.row(i))} and {len(corrupt.row(i))} tokens; choose pairs of one length"
            )
        first, second = (reference_record(model, run, -1, "z", ()).logits for run in (clean.row(i), corrupt.row(i)))
        if not rows:
            try_metric(metric, torch.stack([first, second]), gradient=False)
        found = paths_from_head(model, start, source, sender, receiver, _on_last_token(metric, first))
        rows.append((found[sender[0] + 1 :, None].double(), *metric(torch.stack([first, second]), first)))
    values, of_clean, of_corrupt = (torch.stack(column) for column in zip(*rows, strict=True))
    return PatchResult(
        values=values,
        clean=of_clean,
        corrupt=of_corrupt,
        pairs=tuple(pair.clean.id for pair in pairs),
        families=tuple(pair.clean.group for pair in pairs),
        layers=tuple(range(sender[0] + 1, n_layers(model))),
        positions=("all",),
        heads=tuple(range(n_heads(model, "z"))),
        tokens=("every token",),
        site=f"{receiver} from head {sender[0]}.{sender[1]}",
        metric=metric.name,
        mode=mode,
        engine="path patching of TransformerLens",
    )


def _on_last_token(metric: Metric, clean: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: metric(logits[0, -1:].float().cpu(), clean)[0]


def _refuse_what_there_is_not(model: LanguageModel, sender: tuple[int, int], receiver: str, mode: str) -> None:
    layers, heads = n_layers(model), n_heads(model, "z")
    if not (0 <= sender[0] < layers - 1 and 0 <= sender[1] < heads):
        raise UserError(
            f"there is no head {sender[0]}.{sender[1]} with layers above it; this model has {heads} heads in each of "
            f"the layers 0 to {layers - 1}, and the last has none above"
        )
    if receiver not in RECEIVERS:
        raise UserError(f"there is no receiver {receiver!r}; choose one of {', '.join(RECEIVERS)}")
    if mode not in MODES:
        raise UserError(f"there is no mode {mode!r}; choose {' or '.join(MODES)}")
