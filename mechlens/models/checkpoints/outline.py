"""What the files of a model say before any weights are read: its size, and how it will differ from another."""

from dataclasses import dataclass
from typing import Any

from mechlens.errors import UserError
from mechlens.files import short_name
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.difference import FOREIGN, Difference, differences, unlike
from mechlens.models.checkpoints.merge import require_adapter
from mechlens.models.load import load_config, own_type, require_wrappable, stored_quantised
from mechlens.models.quantise import RUNS_ON
from mechlens.prompts.batch import TokenBatch
from mechlens.registry import require_numbers


@dataclass(frozen=True)
class Outline:
    """A model that is about to be loaded."""

    checkpoint: Checkpoint
    """Without fingerprints."""
    stored: str
    """Type of the weights in their files."""
    n_layers: int | None
    """None where the configuration doesn't say."""
    d_model: int | None
    context: int | None
    """Most tokens that it takes."""

    def require_levels(self, levels: tuple[int, ...], named: str = "level") -> None:
        """UserError for a residual level that the model doesn't have; `named` is what the option calls it."""
        require_numbers(named, levels, self.n_layers, self.checkpoint.name)

    def require_layers(self, layers: tuple[int, ...]) -> None:
        """UserError for a block that the model doesn't have."""
        last = None if self.n_layers is None else self.n_layers - 1
        require_numbers("layer", layers, last, self.checkpoint.name)

    def require_room(self, batch: TokenBatch, new_tokens: int) -> None:
        """UserError for a prompt that doesn't fit into the model's context with so many tokens after it."""
        row = int(batch.lengths.argmax())
        longest = int(batch.lengths[row])
        if self.context is not None and longest + new_tokens > self.context:
            raise UserError(
                f"prompt {batch.prompts[row].id!r} has {longest} tokens and the model takes {self.context}, of which "
                f"{new_tokens} are left for the answer; shorten it"
            )

    def require_same(self, what: str, made: Checkpoint, width: int, allow: str, *, any_weights: bool = False) -> None:
        """UserError where `what`, made with a model of this width, is sure not to fit once the model is loaded.

        What only the weights can tell is told by them; `any_weights` refuses another width and regime alone.
        """
        now = self.checkpoint
        if self.d_model is not None and width != self.d_model:
            raise UserError(
                f"the {what} has {width} entries and {now.name} is {self.d_model} wide; give the model that it was "
                "made with, or make it anew in this one"
            )
        found = differences(made, now)
        if made.fingerprint and made.regime != now.regime:
            raise unlike(what, made, now, found, allow)
        if not any_weights and (made.path == FOREIGN or self._other_weights(made, found)):
            raise unlike(what, made, now, found, allow)

    def _other_weights(self, made: Checkpoint, found: list[Difference]) -> bool:
        """Whether weights of the same files are sure to differ: an adapter more or less, or another rounding."""
        now = self.checkpoint
        if not found or (made.path, made.revision) != (now.path, now.revision):
            return False
        if made.adapter != now.adapter:
            return None in (made.adapter, now.adapter)
        # Stored in half precision and widened, weights are the same; an adapter is merged in float32 and then rounded.
        rounded = now.adapter is not None or self.stored == "float32"
        return rounded and "" not in (made.dtype, now.dtype) and made.dtype != now.dtype


def outline(model: str, *, adapter: str | None = None, revision: str | None = None, dtype: str = "auto") -> Outline:
    """What is known of a model before it is loaded; arguments as in `load`, and its errors where they show by now."""
    require_wrappable(model, revision=revision)
    if adapter is not None:
        require_adapter(adapter)
    stored = own_type(model, revision=revision)
    regime = dtype if dtype in RUNS_ON else stored_quantised(model, revision=revision) or "raw"
    checkpoint = Checkpoint(
        short_name(adapter or model), model, revision, adapter, regime=regime,
        dtype=stored if dtype == "auto" else "" if dtype in RUNS_ON else dtype,
    )  # fmt: skip
    config: Any = load_config(model, revision=revision)
    config = config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "max_position_embeddings"))
    return Outline(checkpoint, stored, *(size if isinstance(size, int) else None for size in sizes))
