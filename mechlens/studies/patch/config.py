"""`mechlens patch`."""

from dataclasses import dataclass

from mechlens.settings import Answering, PositiveInt, RefusingModel, RunChoice
from mechlens.studies.registry import of_folder


@dataclass(frozen=True, kw_only=True)
class Patch(Answering, RefusingModel, RunChoice):
    """Activation patching on matched pairs: where does the difference between refused and accepted travel?

    What is recovered are the log-odds of refusing; in Python `patch_sweep` takes any metric.

    >>> ml.Patch(model="smollm2", site="attn_out", out="runs/patch").positions
    ('instruction[*]', 'post[*]')
    """

    pairs: str = "builtin"
    """builtin (harmful against harmless), or a file with columns clean and corrupt."""
    n: PositiveInt = 8
    """Pairs that are patched: the first whose clean side is refused and whose corrupt side is accepted."""
    candidates: PositiveInt = 48
    """Pairs drawn by seed and answered to find them."""
    site: str = "resid_pre"
    """resid_pre, resid_mid, resid_post, attn_out, mlp_out, q, k, v, z or pattern."""
    positions: tuple[str, ...] = ("instruction[*]", "post[*]")
    """Named positions: inst, instruction[*], post[*], last, token[k], or all."""
    layers: tuple[int, ...] = ()
    """Layers to patch; none given is every layer."""
    seed: int = 0
    """Decides the candidates, resamples and controls."""


STUDY = of_folder(
    "patch",
    Patch,
    "mechlens patch --model smollm2-refuser --out runs/patch",
    "mechlens patch --model smollm2-refuser --site z --positions last --pairs pairs.csv --out runs/heads",
)
