"""The Latent Guard as people have it: the estimator of `methods.guard`, with a file to keep it in.

Here and not with the method, because no method knows a path, and because one place writes and reads all artefacts.
"""

from pathlib import Path
from typing import TypeVar

from mechlens.methods.guard.fitted import FittedGuard
from mechlens.methods.guard.guard import GuardEstimator
from mechlens.runs.artifacts import load, save

Guard = TypeVar("Guard", bound="LatentGuard")


class LatentGuard(GuardEstimator):
    """A detector of harmful prompts that reads the model's own residual stream; see `GuardEstimator`.

    `guard = LatentGuard().fit(activations)`, then `guard(model, texts)`.
    """

    def save(self, path: str | Path) -> None:
        """Writes the fitted guard as one safetensors file."""
        save(self._guard, Path(path))

    @classmethod
    def load(cls: type[Guard], path: str | Path) -> Guard:
        """The guard that `save`, or `mechlens guard fit`, wrote."""
        return cls.of(load(Path(path), FittedGuard))

    @classmethod
    def of(cls: type[Guard], fitted: FittedGuard) -> Guard:
        """The estimator around a fitted guard."""
        guard = cls.with_settings(fitted.settings)
        guard.fitted_ = fitted
        guard._learnt()
        return guard
