"""An earlier adapter to go on training, such as one whose trigger is to be removed."""

from typing import Any

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.models.checkpoint import is_fingerprint_of
from mechlens.models.checkpoints.adapter_record import AdapterRecord, read_record, require_whole
from mechlens.studies.finetune.config import FinetuneConfig, readers


def start_record(config: FinetuneConfig) -> AdapterRecord | None:
    """What is known of the adapter that training goes on from; None without one, UserError where it can't."""
    if config.start is None:
        return None
    folder = user_path(config.start)
    if config.recipe not in readers("start"):  # attacks start from the shipped refuser alone
        raise UserError(
            f"the recipe {config.recipe!r} takes no --start; leave it out, or choose {' or '.join(readers('start'))}"
        )
    record = read_record(folder) if folder.is_dir() else None
    if record is None:
        raise UserError(
            f"{config.start} is no adapter folder of ours; give one that `mechlens finetune` made (adapter)"
        )
    if record.local_only:
        raise UserError(f"{config.start} is the result of an attack, which nothing else is trained from; give another")
    theirs = {name: record.config.get(name) for name in ("rank", "alpha")}
    if theirs != {"rank": config.rank, "alpha": config.alpha}:
        raise UserError(
            f"{config.start} has rank {theirs['rank']} and alpha {theirs['alpha']}, which training goes on with; give "
            f"--rank {theirs['rank']} --alpha {theirs['alpha']}"
        )
    require_whole(folder, record)
    return record


def started(config: FinetuneConfig, record: AdapterRecord, hf_model: Any) -> Any:
    """The model with that adapter, to be trained; UserError where it was made for another."""
    from peft import PeftModel

    if not is_fingerprint_of(record.base_fingerprint, hf_model.state_dict()):
        raise UserError(f"{config.start} was trained on another base than {config.model}; give that as --model")
    return PeftModel.from_pretrained(hf_model, str(user_path(str(config.start))), is_trainable=True)
