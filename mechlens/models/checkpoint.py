"""Which weights a number came from."""

from dataclasses import dataclass

from mechlens.models.fingerprint import is_sampled
from mechlens.models.fingerprint import weight_fingerprint as weight_fingerprint


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights, named so that a result made with it can never be taken for another's."""

    name: str
    """Short name for tables and figures."""
    path: str
    """Hub id, or the local path as it was given."""
    revision: str | None = None
    adapter: str | None = None
    """PEFT adapter loaded on top of `path`."""
    base: str | None = None
    """Name of the checkpoint that this one was fine-tuned from."""
    step: int | None = None
    """Training step within a series; the base is step 0."""
    regime: str = "raw"
    """"raw": weights as Hugging Face stores them; "processed": folded or centred by TransformerLens.
    Directions of the two regimes differ and are never mixed."""
    fingerprint: str = ""
    """Of every byte of the weights."""
    sampled: str = ""
    """The older fingerprint, of a sample, by which records of earlier versions know these weights."""

    config: str = ""
    """Fingerprint of the configuration with which the weights are run; empty in records of earlier versions."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """What decides every number: weights, configuration and regime."""
        return self.fingerprint, self.config, self.regime

    def has_weights_of(self, other: "Checkpoint") -> bool:
        """True where both are of the same weights, run with the same configuration.

        Where one is of an earlier version, as far as its sample tells, and whatever its configuration.
        """
        if "" not in (self.config, other.config) and self.config != other.config:
            return False
        if is_sampled(self.fingerprint) == is_sampled(other.fingerprint):
            return self.fingerprint == other.fingerprint
        ours, theirs = (one.fingerprint if is_sampled(one.fingerprint) else one.sampled for one in (self, other))
        return ours == theirs != ""
