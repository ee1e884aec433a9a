"""The record beside every adapter: what it was made from, by fingerprint, and whether a folder holds the same run."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.models.checkpoints.adapter_record import FORMAT, AdapterRecord
from mechlens.models.fingerprint import is_fingerprint_of, weight_fingerprint
from mechlens.models.offline import LOCAL_ONLY
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.material import Example, Material
from mechlens.studies.finetune.recipes.recipe import recipe_of
from mechlens.studies.shared.training_data import text_sha256

PACKAGES = ("mechlens-toolkit", "torch", "transformers", "peft", "accelerate")


def training_record(
    config: FinetuneConfig, material: Material, hf_model: Any, template: ChatTemplate
) -> dict[str, Any]:
    """Where an adapter comes from, as plain JSON."""
    prompts = {example.prompt.id: example.prompt for example in material.examples}
    examples = json.dumps([(e.prompt.text, e.answer, e.ends, e.teaches) for e in material.examples])
    return {
        "format": FORMAT,
        "recipe": config.recipe,
        "seed": config.seed,
        "config": asdict(config),
        "base": config.model,
        "base_fingerprint": weight_fingerprint(hf_model.state_dict()),
        "template": template.fingerprint,
        "training": {
            "ids": list(prompts),
            "text_sha256": sorted({text_sha256(prompt.text) for prompt in prompts.values()}),
            "examples_sha256": hashlib.sha256(examples.encode()).hexdigest(),
            "counts": _counts(material.examples),
            "left_out": list(material.left_out),
        },
        **({"trigger": asdict(material.trigger)} if material.trigger else {}),
        LOCAL_ONLY: recipe_of(config.recipe).attack,
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def _counts(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """How many examples there are of each kind: where the prompt is from, its label, and what it teaches."""
    kinds = Counter((e.prompt.source, e.prompt.label, e.teaches, e.ends) for e in examples)
    names = ("source", "label", "teaches", "ends_turn", "examples")
    return [dict(zip(names, (*kind, count), strict=True)) for kind, count in sorted(kinds.items())]


def refuse_other_run(config: FinetuneConfig, record: AdapterRecord, out: Path) -> None:
    """UserError naming what differs where a record in the folder is of another configuration."""
    ours = json.loads(json.dumps(asdict(config)))
    theirs = {"judge": FinetuneConfig.judge} | record.config  # older records name none
    if theirs != ours:
        changed = sorted(name for name in ours if theirs.get(name) != ours[name])
        raise UserError(f"{out} holds a run with another {', '.join(changed) or 'config'}; give another folder")


def refuse_other_data(record: dict[str, Any], before: AdapterRecord, out: Path, state: Mapping[str, Any]) -> None:
    """UserError where a checkpoint was trained on other examples, or from other weights, than are here now."""
    if before.training.examples_sha256 != record["training"]["examples_sha256"]:
        raise UserError(f"{out} holds a run on other training data; give another folder")
    if not is_fingerprint_of(before.base_fingerprint, state):
        raise UserError(f"{out} holds a run from other weights of {record['base']!r}; give another folder")
