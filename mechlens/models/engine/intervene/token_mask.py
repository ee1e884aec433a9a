"""Which tokens a running pass holds, and where a change acts among them."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.errors import UserError


class TokenMask:
    """Which tokens the running pass holds: a runner says so before each pass, and nobody guesses it from a shape.

    So prompt and answer are told apart alike with a key/value cache, where a pass holds the prompt or one token, and
    without one, where it holds everything so far. It is all kept on the CPU, where it can be looked at without waiting
    for a GPU.
    """

    def __init__(self, lengths: Int[Tensor, " row"], starts: Int[Tensor, " row"]) -> None:
        self.lengths = lengths
        self.rows = torch.arange(len(lengths))
        self._placed: dict[torch.device, Tensor] = {}
        self._sent: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self.advance(self.rows, starts, 0)

    def advance(self, rows: Int[Tensor, " running"], start: Int[Tensor, " running"], generated: int) -> None:
        """The next pass has these rows; its first column is token `start` of each; `generated` answer tokens are in."""
        if not torch.equal(rows, self.rows):
            self._placed = {}
        self.rows, self.start = rows, start
        self.end = self.lengths[rows] + generated
        self._touched: dict[tuple[int, int, torch.device], Tensor | bool] = {}

    def rows_on(self, device: torch.device) -> Int[Tensor, " running"]:
        """The rows of the running pass, on a device."""
        if device not in self._placed:
            self._placed[device] = self.rows.to(device)
        return self._placed[device]

    def touched(
        self, table: Bool[Tensor, "row token"], width: int, device: torch.device
    ) -> Bool[Tensor, "running seq"] | bool:
        """Where a change acts in this pass: everywhere, nowhere, or at the tokens marked.

        The last column of `table` is all later tokens.
        """
        key = (id(table), width, device)
        if key not in self._touched:
            index = self.start.unsqueeze(1) + torch.arange(width)
            inside = (index >= 0) & (index < self.end.unsqueeze(1))
            found = table[self.rows].gather(1, index.clamp(0, table.shape[1] - 1)) & inside
            self._touched[key] = bool(found.any()) if found.all() or not found.any() else self._on(found, table, device)
        return self._touched[key]

    def _on(self, found: Tensor, table: Tensor, device: torch.device) -> Tensor:
        """Sent to a device unless it is what the last pass had there, as from one answer token to the next."""
        last = self._sent.get((id(table), device))
        if last is None or not torch.equal(last[0], found):
            last = self._sent[id(table), device] = found, found.to(device)
        return last[1]

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

    def __init__(self) -> None:
        super().__init__(torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))

    def touched(self, table: Bool[Tensor, "row token"], width: int, device: torch.device) -> bool:
        return True

    def laid_out(self, hidden: Tensor) -> Float[Tensor, "running seq d_model"]:
        return hidden if hidden.ndim == 3 else hidden.unsqueeze(0)
