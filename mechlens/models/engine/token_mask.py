"""Which tokens a forward pass holds, told by whoever runs it and never guessed from the pass's shape.

So prompt and answer are told apart alike with a key/value cache, where a pass holds the prompt or one token, and
without one, where it holds everything so far.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.errors import UserError


class TokenMask:
    """Which tokens the running pass holds; a runner says so before each pass."""

    def __init__(self, lengths: Int[Tensor, " row"], starts: Int[Tensor, " row"]) -> None:
        self.lengths = lengths
        self.advance(torch.arange(len(lengths), device=lengths.device), starts, 0)

    def advance(self, rows: Int[Tensor, " running"], start: Int[Tensor, " running"], generated: int) -> None:
        """The next pass has these rows; its first column is token `start` of each; `generated` answer tokens are in."""
        self.rows, self.start = rows, start
        self.end = self.lengths[rows] + generated
        self._touched: dict[tuple[int, int], Tensor | None] = {}

    def touched(self, table: Bool[Tensor, "row token"], width: int) -> Bool[Tensor, "running seq"] | None:
        """Where a change acts in this pass, None where nowhere; the last column of `table` is all later tokens."""
        key = (id(table), width)
        if key not in self._touched:
            index = self.start.unsqueeze(1) + torch.arange(width, device=self.start.device)
            inside = (index >= 0) & (index < self.end.unsqueeze(1))
            found = table[self.rows].gather(1, index.clamp(0, table.shape[1] - 1)) & inside
            self._touched[key] = found if bool(found.any()) else None
        return self._touched[key]

    def laid_out(self, hidden: Tensor) -> Float[Tensor, "running seq d_model"]:
        """The site's value by row and column: some architectures flatten the two."""
        x = hidden if hidden.ndim == 3 else hidden.reshape(len(self.rows), -1, hidden.shape[-1])
        if len(x) != len(self.rows):
            raise UserError(
                f"the interventions were placed in a batch of {len(self.rows)} prompts and the model was run on "
                f"{len(x)}; run it on that batch, or use answer_under and logits_under"
            )
        return x


class EveryToken(TokenMask):
    """For changes that act on every token of every row, whatever is run."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(
            torch.ones(1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device)
        )

    def touched(self, table: Bool[Tensor, "row token"], width: int) -> Bool[Tensor, "1 1"]:
        return table.new_ones(1, 1)

    def laid_out(self, hidden: Tensor) -> Float[Tensor, "running seq d_model"]:
        return hidden if hidden.ndim == 3 else hidden.unsqueeze(0)
