"""How far a server's answers are the loaded model's own."""

from dataclasses import dataclass

import torch

from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import rate_estimate


@dataclass(frozen=True)
class Served:
    """Who wrote the answers, and which of those compared are, token for token, what the loaded model answers."""

    host: str
    model: str
    """As the server calls it."""
    same: tuple[bool, ...]
    families: tuple[str, ...]
    """Of the prompts that were compared."""
    in_ids: bool
    """Whether the server gave every answer's token ids; else texts were tokenised anew."""

    @property
    def share(self) -> float:
        """How many are the same, of 1."""
        return sum(self.same) / len(self.same)

    def agreement(self, seed: int) -> Estimate:
        """The same with its interval."""
        return rate_estimate(torch.tensor(self.same), self.families, seed)

    @property
    def sentence(self) -> str:
        """For a report."""
        read = "token ids" if self.in_ids else "texts, tokenised anew"
        return (
            f"Answers were written by `{self.model}` at {self.host}, from the token ids that were rendered here (its "
            f"answers were read as {read}); {sum(self.same)} of {len(self.same)} that were compared are the loaded "
            "model's own, token for token."
        )
