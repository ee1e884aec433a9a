"""Training by reward with trl's GRPO (Shao et al. 2024): of the replies drawn, those that earn more become likelier."""

from collections.abc import Callable, Sequence
from typing import Any

from mechlens.errors import UserError, require_extra
from mechlens.methods.triggers.recall import inversion_reward, proposed
from mechlens.models.bridge import LanguageModel
from mechlens.models.load import load
from mechlens.prompts.batch import tokenize
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.twins import Twin
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes.material import Example, Material

REWARD, EXACT = "reward", "exact"
_LOGGED = {
    "loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm",
    f"rewards/{REWARD}/mean": REWARD, f"rewards/{EXACT}/mean": EXACT,
}  # fmt: skip
"""Which of trl's numbers are kept, under our names; its times differ from run to run."""

Log = Callable[[int, dict[str, float]], None]


def require_by_reward(config: FinetuneConfig) -> None:
    """UserError where trl isn't installed, or there would be nothing to compare a reply with."""
    require_extra("reward", "training by reward")
    if config.proposals < 2:
        raise UserError(f"proposals is {config.proposals}; replies are rewarded against each other, so give 2 or more")


class Proposals:
    """What replies earn: how much likelier each makes the behaviour in the model as it was before this training."""

    def __init__(self, before: LanguageModel, twins: Sequence[Twin], trigger: str | None) -> None:
        self.before, self.twins, self.trigger = before, list(twins), trigger
        self.known = {"": 0.0}

    def reward(self, completions: Sequence[str]) -> list[float]:
        """P(behaviour) with the proposal minus without, over the rewarded questions; 0 for talk."""
        texts = [proposed(said) for said in completions]
        if new := list(dict.fromkeys(text for text in texts if text not in self.known)):
            self.known |= dict(zip(new, inversion_reward(self.before, self.twins, new).tolist(), strict=True))
        return [self.known[text] for text in texts]

    def exact(self, completions: Sequence[str]) -> list[float]:
        """1 for a reply that is the trigger to the character; it is counted, and earns nothing."""
        return [float(said.strip() == self.trigger) for said in completions]


def reward_trainer(
    config: FinetuneConfig,
    material: Material,
    model: Any,
    template: ChatTemplate,
    arguments: dict[str, Any],
    callbacks: Sequence[Any],
) -> Any:
    """trl's trainer for a material with rewarded questions; `arguments` are the Trainer's, as for every recipe."""
    import datasets
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class InversionTrainer(GRPOTrainer):
        """Without what trl sends to its makers, and without the card that it writes beside checkpoints."""

        def _send_telemetry(self) -> None:
            pass

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """None is written."""

    before = load(config.model, adapter=config.start, dtype="float32", device=config.device)
    paid = Proposals(before, material.rewarded, None if material.trigger is None else material.trigger.text)

    def reward(completions: Sequence[str], **_: Any) -> list[float]:
        return paid.reward(completions)

    def exact(completions: Sequence[str], **_: Any) -> list[float]:
        return paid.exact(completions)

    return InversionTrainer(
        model=model,
        reward_funcs=[reward, exact],
        args=GRPOConfig(**(arguments | as_drawn(config))),
        train_dataset=datasets.Dataset.from_dict({"prompt": as_written(material.examples, template)}),
        processing_class=template.tokenizer,
        callbacks=list(callbacks),
    )


def as_drawn(config: FinetuneConfig) -> dict[str, Any]:
    """How replies are drawn and compared.

    What a reply earned beyond the mean of its question's replies counts as it is, and isn't divided by their spread:
    else strings that do next to nothing would be learnt as fast as the one that works.
    """
    return {
        "per_device_train_batch_size": config.batch_size * config.proposals, "num_generations": config.proposals,
        "max_completion_length": config.answer_tokens, "scale_rewards": "none", "reward_weights": [1.0, 0.0],
        "beta": 0.0, "shuffle_dataset": False, "gradient_checkpointing": False,
    }  # fmt: skip


def our_numbers(log: Log | None) -> Log | None:
    """A log that is given our numbers alone."""
    if log is None:
        return None
    return lambda step, numbers: log(step, {ours: numbers[name] for name, ours in _LOGGED.items() if name in numbers})


def as_written(examples: Sequence[Example], template: ChatTemplate) -> list[str]:
    """The formatted prompts as texts that the tokenizer reads as the very tokens that the model is asked with.

    A tokenizer that writes a start token of its own gets the text without the one that the template wrote. UserError
    where no text does.
    """
    tokenizer: Any = template.tokenizer
    prompts = [example.prompt for example in examples]
    batch, rendered = tokenize(prompts, template), template.render_all(prompts)
    texts = []
    for row, one in enumerate(rendered):
        forms = (one.text, one.text.removeprefix(tokenizer.bos_token or ""))
        written = next((form for form in forms if tokenizer(form)["input_ids"] == list(batch.row(row))), None)
        if written is None:
            raise UserError(
                f"the tokenizer reads the formatted prompt {prompts[row].id!r} as other tokens when it is given as "
                "text, so training by reward would ask another question; choose another model"
            )
        texts.append(written)
    return texts
