"""The model a verb was asked for, with what a rerun is held to."""

from collections.abc import Mapping
from typing import NamedTuple

from mechlens.models.bridge import LanguageModel, device_of, dtype_of, loaded
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.load import load
from mechlens.prompts.templates.template import ChatTemplate, chat_template
from mechlens.runs.run import Inputs
from mechlens.runs.writer import RunWriter
from mechlens.settings import ModelChoice


class Chosen(NamedTuple):
    """A loaded model, its chat template and the fingerprints of everything that goes in."""

    model: LanguageModel
    template: ChatTemplate
    inputs: Inputs


def chosen_model(config: ModelChoice, data: Mapping[str, str]) -> Chosen:
    """Loads the configured model; `data` are the fingerprints of the prompts."""
    model = load(
        config.model,
        adapter=config.adapter,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
    )
    template = chat_template(loaded(model).tokenizer, config.template, today=config.today)
    return Chosen(model, template, inputs_of(loaded(model).checkpoint, template, data))


def inputs_of(checkpoint: Checkpoint, template: ChatTemplate, data: Mapping[str, str]) -> Inputs:
    """What goes in: weights and data by fingerprint, the template by fingerprint and by the date that it prints."""
    return Inputs(checkpoint.fingerprint, template.fingerprint, dict(data), template.printed_date, checkpoint.sampled)


def record_inputs(writer: RunWriter, model: LanguageModel, inputs: Inputs) -> None:
    """Writes what goes in to an open run."""
    device, dtype = str(device_of(model)), str(dtype_of(model)).removeprefix("torch.")
    writer.inputs(
        model=inputs.model, template=inputs.template, data=inputs.data, today=inputs.today, device=device, dtype=dtype,
        sampled=inputs.sampled,
    )  # fmt: skip
