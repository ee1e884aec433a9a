"""The kinds of text that heads are asked about, as tokens."""

from dataclasses import dataclass, replace
from pathlib import Path

from mechlens.errors import UserError, many, quoted
from mechlens.files import plain_name, user_path
from mechlens.methods.sinks.found import SHORTEST
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import DOMAINS, builtin_names, builtin_prompts, domain_texts
from mechlens.prompts.files.load import load_prompts, sampled
from mechlens.prompts.files.rows import has_columns
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate, chat_template
from mechlens.registry import unknown_name
from mechlens.studies.sinks.config import FindSinks, SinkPlan

CHAT = "chat"
FEWEST = 2
"""Texts of each kind without which there is nothing to compare."""


@dataclass(frozen=True)
class Domain:
    """One kind of text."""

    name: str
    batch: TokenBatch

    @property
    def sample(self) -> tuple[Prompt, ...]:
        """Its texts."""
        return self.batch.prompts


def domain_prompts(plan: FindSinks) -> dict[str, list[Prompt]]:
    """The texts by kind, a file's under its name without folders; UserError for kinds that there are not or are too
    few, for two of one name, and for texts that are cut too short."""
    if len(set(plan.domains)) < 2 or len(set(plan.domains)) < len(plan.domains):
        raise UserError(f"the kinds of text are {', '.join(plan.domains) or 'none'}; give two or more that differ")
    if plan.tokens < SHORTEST:
        raise UserError(f"--tokens is {plan.tokens}, and at least {SHORTEST} are needed to tell which tokens are sinks")
    found: dict[str, list[Prompt]] = {}
    for source in plan.domains:
        name = _kind(source)
        if name in found:
            raise UserError(f"two kinds of text are called {quoted(name, 80)}; rename one of the files")
        found[name] = _texts(source, plan)
    few = next((name for name, texts in found.items() if len(texts) < FEWEST), None)
    if few is not None:
        had = many(len(found[few]), "text")
        raise UserError(f"{few} has {had}, and at least {FEWEST} of each kind are needed; add some")
    return found


def _kind(source: str) -> str:
    """What a kind is called in tables and in the names of figures; of a data set on the hub its last part."""
    name = source if source in (*DOMAINS, CHAT) else plain_name(Path(source).name.replace(":", " "))
    if name != source and name in (*DOMAINS, CHAT):
        raise UserError(f"{source} would be called {name}, as a kind that is built in; rename it")
    return name


def _texts(name: str, plan: FindSinks) -> list[Prompt]:
    if name in DOMAINS:
        return domain_texts(name)[: plan.texts]
    if name == CHAT:
        return builtin_prompts("benign")[: plan.texts]
    read = has_columns(name) and name not in builtin_names()
    column, family = (plan.column, plan.family_column) if read else (None, None)
    try:
        found = load_prompts(name, column=column, family_column=family)
    except UserError as error:
        # A bare word that can't be read is a mistyped kind sooner than a data set, whose name has an owner.
        if name in builtin_names() or user_path(name).exists() or "/" in name or Path(name).suffix:
            raise
        raise UserError(f"{unknown_name('kind of text', name, (*DOMAINS, CHAT))}, or give a file of texts") from error
    return sampled(found, min(plan.texts, len(found)), plan.seed, name)


def tokenized_domain(name: str, texts: list[Prompt], template: ChatTemplate, plan: SinkPlan) -> Domain:
    """The texts as they are, or those of `chat` in the chat template, cut where they are long."""
    raw = template if name == CHAT else chat_template(template.tokenizer, None)
    batch = tokenize(texts, raw)
    short = replace(batch, tokens=batch.tokens[:, : plan.tokens], mask=batch.mask[:, : plan.tokens])
    return Domain(name, short)
