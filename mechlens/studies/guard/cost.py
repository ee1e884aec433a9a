"""What a guard costs: the share of the blocks that it runs, and its time beside a whole prefill."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mechlens.methods.activations.collect import collect
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.models.bridge import LanguageModel, device_of, n_layers
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.generate import prompt_logits
from mechlens.models.engine.reference import whole_logits
from mechlens.prompts.batch import TokenBatch

REPEATS = 3


@dataclass(frozen=True)
class GuardCost:
    """Medians over prompts asked one at a time, each the fastest of three; seconds depend on machine and load."""

    blocks: int
    """Blocks that are run."""
    of_blocks: int
    guard_seconds: float
    prefill_seconds: float
    """All blocks, the final norm and the logits of the last token: what answering the prompt begins with."""
    n: int

    @property
    def share(self) -> float:
        """The guard's time as a share of the prefill's."""
        return self.guard_seconds / self.prefill_seconds


def guard_cost(model: LanguageModel, guard: FittedGuard, batch: TokenBatch, most: int = 12) -> GuardCost:
    """Times the guard and a full prefill on the first prompts of the batch, in turn."""
    fast = forward.fits_fast_path(model)
    guards, prefills = [], []
    for i in range(min(most, len(batch.prompts))):
        one, ids = batch.select([i]), batch.row(i)
        row = Row(tuple(ids), (len(ids) - 1,))

        def ask(one: TokenBatch = one) -> object:
            return collect(model, one, positions=guard.positions, levels=guard.levels)

        def prefill(row: Row = row) -> object:
            if fast:
                return prompt_logits(model, [row], None)
            return whole_logits(model, torch.tensor([row.ids], device=device_of(model)))

        guards.append(_fastest(ask))
        prefills.append(_fastest(prefill))
    return GuardCost(
        blocks=max(guard.levels),
        of_blocks=n_layers(model),
        guard_seconds=statistics.median(guards),
        prefill_seconds=statistics.median(prefills),
        n=len(guards),
    )


def _fastest(run: Callable[[], object]) -> float:
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)
