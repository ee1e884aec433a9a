"""The floor of a series: read once from the base's words and from networks with random blocks, kept as scores alone."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, warn
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.cache import Cache
from mechlens.methods.probing.auroc import auroc
from mechlens.methods.probing.auroc_grid import contrast_part, is_positive, score_grid
from mechlens.methods.probing.readouts import KINDS, fit_lines
from mechlens.methods.progress import progress_bar
from mechlens.models.bridge import LanguageModel, token_embeddings
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.split import Split
from mechlens.studies.shared.contrasts import surface_of
from mechlens.studies.track.measures.home import HomeQuestion, network_floor, surface_floor
from mechlens.studies.track.measures.reference import TrackedConcept
from mechlens.studies.track.measures.snapshot import cache_of_many


@dataclass(frozen=True)
class Floor:
    """What the words and untrained networks give, by concept."""

    scores: Mapping[str, Mapping[str, Float[Tensor, "row prompt"]]]
    """By concept, then by `FLOORS`; of a random network one row for each repeat of each network."""
    grids: Mapping[str, Mapping[str, Float[Tensor, "level position"]]]
    """By concept, then by kind of read-out: test AUROC of what is fitted on a random network, their mean."""

    def to_piece(self) -> dict[str, Tensor]:
        """As tensors, for a cache."""
        named = {"scores": self.scores, "grids": self.grids}
        return {
            f"{part}.{concept}.{name}": values
            for part, by_concept in named.items()
            for concept, found in by_concept.items()
            for name, values in found.items()
        }

    @classmethod
    def from_piece(cls, piece: Mapping[str, Tensor]) -> "Floor":
        """What `to_piece` took apart."""
        parts: dict[str, dict[str, dict[str, Tensor]]] = {"scores": {}, "grids": {}}
        for key, values in piece.items():
            part, concept, name = key.split(".")
            parts[part].setdefault(concept, {})[name] = values
        return cls(**parts)


def measured_floor(
    swapper: CheckpointSwapper,
    batch: TokenBatch,
    asked: Sequence[HomeQuestion],
    split: Split,
    *,
    positions: Sequence[str],
    levels: Sequence[int],
    networks: int,
    seed: int,
    cache: Cache | None = None,
    key: str = "",
) -> Floor:
    """One pass for each random network, which takes the checkpoints' turn in the swapper, and no pass for the words.

    Without the networks, with a warning, where an architecture has no initialiser. `key` is that of the base and all
    that is asked; what is kept depends on the concepts' labels too.
    """
    labels = [question.concept.labels for question in asked]
    key = hashlib.sha256(f"floor inside folds {key} {labels} {networks} {seed}".encode()).hexdigest()
    piece = cache.get(key) if cache is not None and key else None
    if piece is not None:
        return Floor.from_piece(piece)
    found: dict[str, list[Tensor]] = {question.concept.name: [] for question in asked}
    grids: dict[str, dict[str, list[Tensor]]] = {name: {kind: [] for kind in KINDS} for name in found}
    for k in progress_bar(range(networks), title="random networks", unit="network"):
        try:
            model = swapper.put_random_blocks(seed + k)
        except UserError as error:
            warn(f"there is no floor of an untrained network: {error}")
            break
        many = cache_of_many(cache, model, batch, positions, levels)
        acts = collect(model, batch, positions=positions, levels=levels, cache=many)
        for question in asked:
            found[question.concept.name].append(network_floor(question, acts))
            for kind, area in random_grid(question.concept, acts, split).items():
                grids[question.concept.name][kind].append(area)
    words = _words(swapper.model, batch, asked)
    scores = {
        name: words[name] | {"random_blocks": torch.cat([words[name]["tfidf"][:0], *found[name]])} for name in words
    }
    floor = Floor(scores, {name: _means(own) for name, own in grids.items()})
    if cache is not None:
        cache.put(key, floor.to_piece())
    return floor


def _means(areas: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {kind: torch.stack(found).mean(dim=0) for kind, found in areas.items() if found}


def _words(model: LanguageModel, batch: TokenBatch, asked: Sequence[HomeQuestion]) -> dict[str, dict[str, Tensor]]:
    """By concept; the embeddings in place are the base's, as random blocks leave them alone."""
    surface, found = surface_of(model, batch), {}
    for question in asked:
        home = batch.tokens[torch.arange(len(batch.prompts)), batch.at(question.concept.home)]
        tokens = token_embeddings(model, home)
        found[question.concept.name] = surface_floor(question, surface.texts, surface.mean_embeddings, tokens)
    return found


def random_grid(
    concept: TrackedConcept, network: Activations, split: Split
) -> dict[str, Float[Tensor, "level position"]]:
    """Test AUROC in every cell of what is fitted on an untrained network, by kind of read-out."""
    acts = concept.relabelled(network)
    test = contrast_part(acts, split.test, concept.contrast)
    positive = is_positive(test, concept.contrast)
    return {kind: auroc(score_grid(test, fit_lines(acts, concept.contrast, split, kind)), positive) for kind in KINDS}
