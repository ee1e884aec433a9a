"""The model that a study was asked for, with what a rerun is held to."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from mechlens.models.bridge import LanguageModel, device_of, dtype_of, loaded
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.load import load
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate, chat_template
from mechlens.runs.run import Inputs
from mechlens.settings import ModelChoice
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.training_data import LeftOut

Content = TypeVar("Content")


class ChatModel(NamedTuple):
    """A loaded model and its chat template."""

    model: LanguageModel
    template: ChatTemplate

    def inputs(self, data: Mapping[str, str]) -> Inputs:
        """What goes in with this model; `data` are the fingerprints of the prompts."""
        return inputs_of(loaded(self.model).checkpoint, self.template, data)


def chosen_model(config: ModelChoice) -> ChatModel:
    """Loads the configured model."""
    model = load(
        config.model,
        adapter=config.adapter,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
    )
    return ChatModel(model, chat_template(loaded(model).tokenizer, config.template, today=config.today))


def inputs_of(checkpoint: Checkpoint, template: ChatTemplate, data: Mapping[str, str]) -> Inputs:
    """What goes in: weights and data by fingerprint, the template by fingerprint and by the date that it prints."""
    return Inputs(checkpoint.fingerprint, template.fingerprint, dict(data), template.printed_date, checkpoint.sampled)


def prepared(
    content: Content,
    model: LanguageModel,
    inputs: Inputs,
    prompts: Sequence[Prompt] = (),
    left_out: LeftOut | None = None,
) -> Preparation[Content]:
    """What goes into a study of one loaded model."""
    device, dtype = str(device_of(model)), str(dtype_of(model)).removeprefix("torch.")
    return Preparation(content, inputs, tuple(prompts), left_out, device, dtype)
