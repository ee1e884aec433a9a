"""What a direction does to answers, side by side: the same prompts, unsteered and with more or less of it added."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mechlens.errors import UserError, kind_of, quoted
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.drawing import require_length
from mechlens.methods.directions.direction import Direction, require_is_direction
from mechlens.methods.shown import MOST, cut, first, lines
from mechlens.methods.steering.interventions import ALL, Add, ResidualNorms, Unit, residual_norms
from mechlens.methods.steering.steering import SteeredAnswers, answer_under
from mechlens.models.bridge import LanguageModel, n_layers
from mechlens.prompts.asked import Prompts
from mechlens.prompts.batch import tokenize
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate, TemplateChoice
from mechlens.settings import STEERED_TOKENS

if TYPE_CHECKING:
    import pandas

NORM_PROMPTS = 16
"""Built-in benign prompts behind the residual norm, where the direction doesn't carry that of the layer."""
IN_WORDS: dict[Unit, str] = {"share": "of the median residual norm", "raw": "times the vector", "unit": "long"}
STRENGTHS = (-0.5, -0.25, 0.25, 0.5)
"""In shares of the residual norm: at a half small models often break, at a quarter most still write sentences."""
SHOWN = 600
"""Characters of an answer that a notebook shows."""
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;min-width:12em"


@dataclass(frozen=True, repr=False)
class SideBySide:
    """Answers to the same prompts at several strengths of one direction; a notebook shows a column for each.

    >>> model = ml.load("smollm2")
    >>> acts = ml.collect(model, [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]])
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> seen = ml.steer(model, direction, ["How are you?", "Say hello."], strengths=[0.5, 1.0], max_new_tokens=4)
    >>> list(seen.table()["strength"])
    [0.0, 0.5, 1.0, 0.0, 0.5, 1.0]
    """

    prompts: tuple[Prompt, ...]
    strengths: tuple[float, ...]
    """0, which is unsteered, then those that were asked for."""
    said: SteeredAnswers
    """Prompt by prompt the answers at all strengths."""
    what: str
    """What was added and where, in words."""

    def at(self, strength: float) -> tuple[str, ...]:
        """The answers at one strength, one for each prompt; 0 is unsteered."""
        if strength not in self.strengths:
            known = ", ".join(f"{one:g}" for one in self.strengths)
            raise UserError(f"there are no answers at strength {strength:g}; there are at {known}")
        column = self.strengths.index(strength)
        return self.said.texts[column :: len(self.strengths)]

    def table(self) -> "pandas.DataFrame":
        """One row per prompt and strength: the prompt's id and text, the strength, the answer."""
        import pandas as pd

        asked = [(prompt, strength) for prompt in self.prompts for strength in self.strengths]
        return pd.DataFrame(
            {
                "id": [prompt.id for prompt, _ in asked],
                "prompt": [prompt.text for prompt, _ in asked],
                "strength": [strength for _, strength in asked],
                "answer": self.said.texts,
            }
        )

    def __repr__(self) -> str:
        rows = self.table()[["prompt", "strength", "answer"]].itertuples(index=False)
        facts = {f"{cut(asked, 40)!r}, {_named(strength)}": repr(cut(text, 80)) for asked, strength, text in rows}
        return lines(self.what, first(facts))

    def _repr_html_(self) -> str:
        head = ["prompt", *map(_named, self.strengths)]
        body = zip([prompt.text for prompt in self.prompts], *map(self.at, self.strengths), strict=True)
        rows = [("th", head), *(("td", row) for _, row in zip(range(MOST), body, strict=False))]
        more = f"<p>{MOST} of {len(self.prompts)} prompts</p>" if len(self.prompts) > MOST else ""
        table = "".join(f"<tr>{''.join(_cell(kind, text) for text in row)}</tr>" for kind, row in rows)
        return f"<p>{html.escape(self.what)}</p><table>{table}</table>{more}"


def steer(
    model: LanguageModel,
    direction: Direction,
    prompts: Prompts,
    strengths: float | Sequence[float] = STRENGTHS,
    *,
    unit: Unit = "share",
    layer: int | None = None,
    max_new_tokens: int = STEERED_TOKENS,
    template: TemplateChoice = "tokenizer",
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    force: bool = False,
) -> SideBySide:
    """What the model answers with nothing done, and with the direction added at each strength, to every token.

    Strength 1 is the median length of the residual stream there (`unit="share"`), the vector as it is ("raw"), or a
    length of 1 ("unit"); a negative one subtracts. It is added where it was read, or at the input of block `layer`
    (their number: the last one's output). With a `temperature` answers are drawn, by the same numbers at each strength.
    `answer_under` does more: ablation, named positions, several interventions at once. UserError for a direction made
    with another model, unless forced.

    >>> model = ml.load("smollm2")
    >>> acts = ml.collect(model, [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]])
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> seen = ml.steer(model, direction, "How do I bake a cake?", strengths=0.5, max_new_tokens=4)
    >>> seen.strengths  # the last line of a cell shows the answers
    (0.0, 0.5)
    >>> seen.at(0.0) == ml.answer(model, "How do I bake a cake?", max_new_tokens=4).texts
    True
    """
    require_is_direction(direction)
    require_length(max_new_tokens)
    given = (0.0, *dict.fromkeys(one for one in _numbers(strengths) if one != 0))
    layer = direction.level if layer is None else layer
    written = template_of(model, template)
    batch = tokenize(prompts, written)
    one = addition_at(model, direction, 1.0, unit, layer, written)
    added = [[replace(one, strength=strength)] if strength else [] for strength in given]
    rows = [i for i in range(len(batch.prompts)) for _ in given]
    said = answer_under(
        model, batch.select(rows), added * len(batch.prompts), max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, seed=seed, force=force,
    )  # fmt: skip
    return SideBySide(batch.prompts, given, said, f"Added at layer {layer}, strengths {IN_WORDS[unit]}: {direction!r}")


def _numbers(strengths: object) -> list[float]:
    """One strength or several as numbers; UserError for what is none."""
    several = isinstance(strengths, Iterable) and not isinstance(strengths, str)
    asked: list[Any] = list(strengths) if several else [strengths]  # type: ignore[call-overload]
    wrong = [one for one in asked if isinstance(one, str) or not hasattr(one, "__float__")]
    if wrong or not asked:
        given = f"{quoted(wrong[0], 40)} ({kind_of(wrong[0])})" if wrong else "no number"
        raise UserError(f"strengths has {given}; give a number or a list of numbers, such as 0.5")
    return [float(one) for one in asked]


def addition_at(
    model: LanguageModel, direction: Direction, strength: float, unit: Unit, layer: int, template: ChatTemplate
) -> Add:
    """The direction added to every token at the input of a block, or at the output of the last one."""
    last = n_layers(model)
    if not 0 <= layer <= last:
        raise UserError(
            f"there is no layer {layer} to intervene at, only 0 to {last - 1}, and {last} for the last one's output; "
            "choose one"
        )
    # The last level is no block's input, but the last block's output.
    block, site = (layer, "resid_pre") if layer < last else (last - 1, "resid_post")
    known = unit != "share" or (direction.residual_norm is not None and layer == direction.level)
    norms = None if known else _norms(model, template, layer)
    return Add(
        direction, strength=strength, unit=unit, layers=(block,), positions=ALL, phase="both", site=site, norms=norms,
    )  # fmt: skip


def _norms(model: LanguageModel, template: ChatTemplate, layer: int) -> ResidualNorms:
    batch = tokenize(builtin_prompts("benign")[:NORM_PROMPTS], template)
    return residual_norms(collect(model, batch, positions=["inst", "post[*]"], levels=[layer]))


def _named(strength: float) -> str:
    return f"{strength:+g}" if strength else "unsteered"


def _cell(kind: str, text: str) -> str:
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
    return f'<{kind} style="{_CELL}">{html.escape(shown)}</{kind}>'
