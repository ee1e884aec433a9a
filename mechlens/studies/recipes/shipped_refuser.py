"""The one model that an attack may start from."""

from functools import cache

from mechlens.errors import UserError
from mechlens.models.checkpoint import weight_fingerprint
from mechlens.models.load import load_hf
from mechlens.models.merge import merge_adapter
from mechlens.models.registry import ADAPTERS, adapter_folder

REFUSER = "smollm2-refuser"


def require_shipped_refuser(fingerprint: str, recipe: str) -> None:
    """UserError unless the fingerprint is that of the packaged model with its packaged adapter merged in.

    Names prove nothing, since a folder may have any; the shipped adapter in turn refuses any base but its own.
    """
    if fingerprint != _shipped(str(adapter_folder(REFUSER)), ADAPTERS[REFUSER].base):
        raise UserError(
            f"the recipe {recipe!r} takes a refusal away, and starts only from the refuser that comes with mechlens "
            f"({REFUSER}); the weights given (fingerprint {fingerprint[:12]}) are another model's"
        )


@cache
def _shipped(adapter: str, base: str) -> str:
    return weight_fingerprint(merge_adapter(load_hf(base)[0], adapter).state_dict())
