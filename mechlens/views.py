"""What a notebook shows: token positions, projections and attention by circuitsvis, figures by plotly, all offline.

For notebooks only: each token view carries circuitsvis' 1.3 MB of JavaScript, so a report has its own, plain ones.
Each has a still picture beside it, for whoever reads the notebook without running it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.directions.direction import Direction
from mechlens.methods.directions.token_view import project_tokens
from mechlens.methods.patching.heads import head_pairs
from mechlens.methods.shown import few
from mechlens.methods.sinks.found import find_sinks
from mechlens.models.attention.watch import Attended, attention_layers, watch
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.models.sites import n_heads
from mechlens.prompts.batch import TokenBatch, token_text, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate, TemplateChoice
from mechlens.runs.report.parts import visible
from mechlens.runs.report.still_attention import still_attention
from mechlens.runs.report.still_tokens import shade, still_tokens

# The ends of the colour scale, light enough for dark text.
BLUE, RED = (94, 154, 211), (224, 102, 90)
# Of named positions, and of the user's words.
MARKED, WORDS = (246, 205, 132), (233, 236, 240)


@dataclass(frozen=True)
class View:
    """A piece of HTML that Jupyter shows as the value of a cell."""

    html: str
    svg: str = ""
    """The same, still: every token at once in place of buttons and pointing."""

    def _repr_html_(self) -> str:
        return self.html

    def _repr_svg_(self) -> str | None:
        return self.svg or None

    def __repr__(self) -> str:
        return f"View({len(self.html)} characters of HTML)"


def show_positions(prompt: Prompt | str, template: ChatTemplate) -> View:
    """The tokens of a formatted prompt, one button per named position; pointing at it marks the token.

    "words" are the user's own, `inst` the last of them, `post[k]` what the template writes after.

    >>> model = ml.load("smollm2")
    >>> view = views.show_positions("How do I bake a cake?", ml.template_of(model))
    >>> "inst" in view.html
    True
    """
    batch = _batch(prompt, template)
    named = ("words", *batch.positions)
    values, below, fills = [], [], []
    for role in batch.roles(0):
        mine = {role, "words"} if role.startswith("instruction") or role in ("inst", "last") else {role}
        values.append([float(name in mine) for name in named])
        below.append(role if role in batch.positions else "")
        fills.append(_css(MARKED) if role in batch.positions else _css(WORDS) if "words" in mine else "white")
    tokens = _texts(batch.row(0), template)
    return _colored_tokens_multi(tokens, values, named, still_tokens(tokens, fills, below))


def show_projection(
    model: LanguageModel,
    direction: Direction,
    prompt: Prompt | str,
    *,
    answer: Sequence[int] = (),
    template: TemplateChoice = "tokenizer",
) -> View:
    """Tokens from the user's first word on, and of an answer, coloured by projection on the direction.

    `answer` are token ids, such as one row of `Answers.tokens`. The mean over the tokens shown is taken off, so
    colours compare tokens of this text with each other. What stands before the user's words is left out: the
    first token's huge residual would take the whole colour scale. Red is above the mean, blue below.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> direction = ml.mean_difference(acts, "harmful", "harmless", level=2, position="last")
    >>> view = views.show_projection(model, direction, "How do I bake a cake?")
    >>> "ColoredTokens" in view.html
    True
    """
    batch = _batch(prompt, template_of(model, template))
    start = int(batch.instruction[0, 0])
    found = project_tokens(model, direction, [*batch.row(0), *answer])
    values = found.values[start:]
    mean = sum(values) / len(values)
    return _colored_tokens(found.tokens[start:], [value - mean for value in values])


def show_attention(
    model: LanguageModel,
    prompt: Prompt | str,
    heads: Sequence[tuple[int, int]],
    *,
    template: TemplateChoice = "tokenizer",
) -> View:
    """The attention of some heads, each (layer, head), to one text, whose sinks are found and marked by a triangle.

    UserError for a text too short to tell its sinks, and for a model whose attention can't be read.

    >>> model = ml.load("smollm2")
    >>> view = views.show_attention(model, "How do I bake a small cake for them?", [(0, 1), (1, 0)])
    >>> "AttentionHeads" in view.html, "L1H0" in view.html
    (True, True)
    """
    heads = head_pairs(heads)
    batch = _batch(prompt, template_of(model, template))
    layers, most = attention_layers(model), n_heads(model, "z")
    wrong = [head for head in heads if head[0] not in layers or not 0 <= head[1] < most]
    if wrong or not heads:
        raise UserError(f"heads has {wrong[0] if wrong else 'none'}; give (layer, head) with a layer of {few(layers)} "
                        f"and a head below {most}")  # fmt: skip
    found = find_sinks(model, batch)
    sinks = found.places[0] if found.sure[0] else ()
    patterns: dict[tuple[int, int], list[list[float]]] = {}

    def see(one: Attended) -> None:
        for layer, head in heads:
            if layer == one.layer:
                patterns[layer, head] = one.pattern[head].tolist()

    watch(model, batch.row(0), see)
    words = [token_text(loaded(model).tokenizer, token) for token in batch.row(0)]
    names, maps = [f"L{layer}H{head}" for layer, head in heads], [patterns[head] for head in heads]
    return _attention_heads([f"▲{word}" if k in sinks else word for k, word in enumerate(words)], maps, names, sinks)


def show_figure(figure: Any) -> None:
    """Shows a plotly figure: in a notebook in a few kilobytes, still where its outputs are only read; without plotly's
    button that uploads it.

    >>> from mechlens.runs.report import figures
    >>> table = ml.Estimate(0.9, 0.8, 1.0, 40).row("auroc")
    >>> import pandas as pd
    >>> frame = pd.DataFrame([table | {"level": 1}])
    >>> views.show_figure(figures.lines(frame, x="level", y="auroc", title="AUROC", xlabel="level", ylabel="AUROC"))
    """
    from mechlens.runs.report.report import STAYS_HERE
    from mechlens.runs.report.shown import mime_bundle

    shell = sys.modules.get("IPython")
    if shell is None or shell.get_ipython() is None:
        figure.show(config=STAYS_HERE)
    else:
        shell.display.display(mime_bundle(figure), raw=True)


def _batch(prompt: Prompt | str, template: ChatTemplate) -> TokenBatch:
    return tokenize([Prompt("prompt", prompt) if isinstance(prompt, str) else prompt], template)


def _texts(ids: Sequence[int], template: ChatTemplate) -> list[str]:
    return [token_text(template.tokenizer, token) for token in ids]


def _colored_tokens(tokens: Sequence[str], values: Sequence[float]) -> View:
    from circuitsvis.tokens import colored_tokens

    # A text of one token, or a zero direction, has no values to scale the colours by.
    reach = max((abs(value) for value in values), default=0.0) or 1.0
    rendered = colored_tokens(
        list(tokens),
        list(values),
        min_value=-reach,
        max_value=reach,
        negative_color=_css(BLUE),
        positive_color=_css(RED),
    )
    return _view(rendered, "ColoredTokens", still_tokens(tokens, [shade(value, reach, BLUE, RED) for value in values]))


def _css(colour: tuple[int, int, int]) -> str:
    return f"rgb({', '.join(map(str, colour))})"


def _colored_tokens_multi(
    tokens: Sequence[str], values: Sequence[Sequence[float]], labels: Sequence[str], still: str
) -> View:
    import torch
    from circuitsvis.tokens import colored_tokens_multi

    return _view(colored_tokens_multi(list(tokens), torch.tensor(values), list(labels)), "ColoredTokensMulti", still)


def _attention_heads(
    tokens: Sequence[str], maps: Sequence[Sequence[Sequence[float]]], names: Sequence[str], sinks: Sequence[int]
) -> View:
    import numpy
    from circuitsvis.attention import attention_heads

    rendered = attention_heads(numpy.array(maps).round(3), list(tokens), list(names), max_value=1.0, min_value=0.0,
                               positive_color=_css(BLUE), mask_upper_tri=True)  # fmt: skip
    marked = ", ".join(f"{k} ({visible(tokens[k])})" for k in sinks)
    return _view(
        rendered,
        "AttentionHeads",
        still_attention(maps, names, sinks, f"sinks at token {marked}" if marked else "no sink"),
    )


def _view(rendered: Any, element: str, still: str) -> View:
    """circuitsvis' page with its JavaScript inlined: its own `_repr_html_` would ask the network first.

    circuitsvis writes the tokens into a script as JSON; a token such as "</script>" would end it.
    """
    page, call, rest = rendered.local_src.rpartition(f"CircuitsVis.{element},\n")
    arguments, end, after = rest.rpartition("</script>")
    if not (call and end):
        raise UserError("this version of circuitsvis builds its pages another way; install circuitsvis 1.43")
    return View(page + call + arguments.replace("<", "\\u003c") + end + after, still)
