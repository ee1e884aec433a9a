"""Attribution patching: what patching would do, to first order, from two forward passes and one backward."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.metrics import Metric
from mechlens.models.bridge import LanguageModel
from mechlens.models.edit import Edit, value_at
from mechlens.models.gradients import gradients


def attributed(
    model: LanguageModel,
    site: str,
    ids: Sequence[int],
    edits: Sequence[Edit],
    metric: Metric,
    clean: Float[Tensor, " vocab"],
    read: int,
) -> Float[Tensor, " edit"]:
    """metric + <value - own value, gradient of the metric there> for every edit of the run `ids`.

    Exact where the metric is linear in the site; wrong where a softmax saturates on the way (Nanda 2023).
    """
    layers = sorted({edit.layer for edit in edits})
    own, slopes, at_start = gradients(model, ids, site, layers, lambda row: metric(row, clean)[0], read)
    shifts = []
    for edit in edits:
        mine, slope = (value_at(of[edit.layer], site, edit.position, edit.head) for of in (own, slopes))
        value = edit.value[: mine.shape[-1]].to(mine)
        shifts.append(((value - mine).double() * slope.double()).sum())
    return at_start + torch.stack(shifts).cpu()
