"""What the studies read: prompts by source and the model, with fingerprints that a rerun can be held to."""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from mechlens.errors import UserError, many, quoted, warn
from mechlens.methods.activations.spans import spans_of
from mechlens.methods.kept_model import kept_or_loaded
from mechlens.models.bridge import LanguageModel, device_of, dtype_of, loaded
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.outline import Outline, outline
from mechlens.models.checkpoints.swap import CheckpointSwapper, checkpoint_swapper
from mechlens.models.load import tokenizer_of
from mechlens.prompts.batch import tokenize
from mechlens.prompts.builtin import builtin_names
from mechlens.prompts.files.load import joined_sources, load_prompts
from mechlens.prompts.files.rows import has_columns
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate, chat_template, template_arguments
from mechlens.prompts.text import normalise_text
from mechlens.runs.run import Inputs
from mechlens.settings import BaseChoice, ModelChoice, require_both
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.training_data import LeftOut


@runtime_checkable
class PromptChoice(Protocol):
    """A study's settings that decide which prompts of a source are asked, and under which system prompt."""

    @property
    def n(self) -> int | None:
        """Prompts drawn of each source; None takes all."""

    @property
    def seed(self) -> int:
        """Decides the draw."""

    @property
    def system(self) -> str | None:
        """System prompt of every prompt; None leaves the template's own default."""

    @property
    def column(self) -> str | None:
        """Column of the prompts in files; None finds it by its name."""

    @property
    def data(self) -> str | None:
        """A source that holds both classes; None where each has its own."""

    @property
    def label_column(self) -> str | None:
        """Column of `data` that says of which class a row is."""

    @property
    def family_column(self) -> str | None:
        """Column in files of what belongs together; None where each prompt is on its own."""


def read_prompts(source: str, label: str, config: PromptChoice, *, both_in_data: bool = True) -> list[Prompt]:
    """Prompts of one class from any source, relabelled, with the system prompt where one is given.

    A plus joins sources ("harmful+looks-harmless"); `config.n` prompts are then drawn of each. With `config.data`,
    which holds both classes, `source` is the class's value in its label column. Columns are those of sources that have
    some: built-in sets and plain text files have none.
    """
    require_both(config.data, config.label_column)
    read = functools.partial(load_prompts, label=label, sample=config.n, seed=config.seed, system=config.system)
    if both_in_data and config.data is not None and config.label_column is not None:
        where = {config.label_column: source}
        return read(config.data, column=config.column, family_column=config.family_column, where=where)
    parts: dict[str, list[Prompt]] = {}
    for part in joined_sources(source):
        bare = part in builtin_names() or not has_columns(part)
        column, family = (None, None) if bare else (config.column, config.family_column)
        if bare and config.family_column is not None and part not in builtin_names():
            told = f"each of its lines is a family of its own; column {config.family_column} is read from the others"
            warn(f"{part} has no columns, so {told}")
        prompts = read(part, column=column, family_column=family)
        parts[part] = without_repeats(prompts, [prompt for before in parts.values() for prompt in before], part)
    return [prompt for prompts in distinct_ids(**parts) for prompt in prompts]


def refuse_shared(positive: tuple[str, Sequence[Prompt]], negative: tuple[str, Sequence[Prompt]]) -> None:
    """UserError where a prompt stands in both classes, each given with its source: nothing can tell it from itself."""
    (one, first), (other, second) = positive, negative
    known = {_asked(prompt) for prompt in first}
    shared = [prompt for prompt in second if _asked(prompt) in known]
    if shared:
        raise UserError(
            f"{one} and {other} share {many(len(shared), 'prompt')}, such as {quoted(shared[0].text)}; a prompt can be "
            "of one class only, so give two sources that differ"
        )


def without_repeats(extra: Sequence[Prompt], prompts: Sequence[Prompt], source: str) -> list[Prompt]:
    """The extra prompts that aren't among the others, where they would count twice and straddle a split."""
    known = {_asked(prompt) for prompt in prompts}
    kept = [prompt for prompt in extra if _asked(prompt) not in known]
    if len(kept) < len(extra):
        many = len(extra) - len(kept)
        warn(f"{source}: left out {many} extra prompts that the other sets hold already")
    return kept


def _asked(prompt: Prompt) -> tuple[object, ...]:
    return normalise_text(prompt.text), prompt.system, prompt.history


def data_inputs(sets: Mapping[str, tuple[str, Sequence[Prompt]]]) -> dict[str, str]:
    """sha256 over every field of every prompt, by the set's name and where it came from."""
    return {f"{name} ({source})": _fingerprint(prompts) for name, (source, prompts) in sets.items() if prompts}


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    record = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()


def distinct_ids(**sets: Sequence[Prompt]) -> list[list[Prompt]]:
    """The sets with ids that don't clash: where two files count from 1, each id gets its set's name."""
    ids = [prompt.id for prompts in sets.values() for prompt in prompts]
    if len(ids) == len(set(ids)):
        return [list(prompts) for prompts in sets.values()]
    return [[_prefixed(prompt, name) for prompt in prompts] for name, prompts in sets.items()]


def _prefixed(prompt: Prompt, name: str) -> Prompt:
    # Families stay as they are: a family that two sets share is what keeps a pair in one part.
    return replace(prompt, id=f"{name}:{prompt.id}", family=prompt.family or f"{name}:{prompt.id}")


Content = TypeVar("Content")


class ChatModel(NamedTuple):
    """A loaded model and its chat template."""

    model: LanguageModel
    template: ChatTemplate

    def inputs(self, data: Mapping[str, str]) -> Inputs:
        """What goes in with this model; `data` are the fingerprints of the prompts."""
        return inputs_of(loaded(self.model).checkpoint, self.template, data)


Check = Callable[[Outline, ChatTemplate], None]
"""Raises UserError for what can't be done with a model, from what is known before its weights are read."""


def asks(
    prompts: Sequence[Prompt], positions: Sequence[str] = (), layers: tuple[int, ...] = (), new_tokens: int = 1
) -> Check:
    """What a study asks: prompts that the template can write and the model has room for, positions and layers."""
    if new_tokens < 1:
        raise UserError(f"max_new_tokens is {new_tokens}; ask for at least one token")

    def check(known: Outline, template: ChatTemplate) -> None:
        known.require_layers(layers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # they come again with the work
            batch = tokenize(prompts, template)
        known.require_room(batch, new_tokens)
        if positions:
            spans_of(batch, positions, {}, lambda: template)

    return check


def chosen_model(config: ModelChoice, check: Check | None = None) -> ChatModel:
    """Loads the configured model; whatever its files tell to be wrong is said before any weights are read."""
    template_arguments(config.template_arg)
    known = outline(config.model, adapter=config.adapter, revision=config.revision, dtype=config.dtype)
    tokenizer = tokenizer_of(config.model, adapter=config.adapter, revision=config.revision)
    if check is not None:
        check(known, _template(config, tokenizer))
    model = kept_or_loaded(
        config.model,
        adapter=config.adapter,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
    )
    return ChatModel(model, _template(config, loaded(model).tokenizer))


def _template(config: ModelChoice | BaseChoice, tokenizer: Any) -> ChatTemplate:
    return chat_template(tokenizer, config.template, today=config.today, template_arg=config.template_arg)


class ChatSeries(NamedTuple):
    """A loaded base into which checkpoints can be put, and the chat template that all are asked under."""

    swapper: CheckpointSwapper
    template: ChatTemplate


def chosen_base(config: BaseChoice, check: Check, chat_template_text: str | None = None) -> ChatSeries:
    """Loads the configured base, as `chosen_model` does a model; `chat_template_text` is what its checkpoints have."""
    template_arguments(config.template_arg)
    tokenizer = tokenizer_of(config.base, revision=config.revision)
    tokenizer.chat_template = chat_template_text or tokenizer.chat_template
    check(outline(config.base, revision=config.revision, dtype=config.dtype), _template(config, tokenizer))
    swapper = checkpoint_swapper(
        config.base, revision=config.revision, dtype=config.dtype, device=config.device,
        device_map=config.device_map, chat_template=chat_template_text,
    )  # fmt: skip
    return ChatSeries(swapper, _template(config, loaded(swapper.model).tokenizer))


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
    known, dtype = loaded(model), str(dtype_of(model)).removeprefix("torch.")
    if known.checkpoint.regime != "raw":
        dtype = f"{known.checkpoint.regime}, computed with in {dtype}"
    return Preparation(content, inputs, tuple(prompts), left_out, str(device_of(model)), dtype, known.parity)
