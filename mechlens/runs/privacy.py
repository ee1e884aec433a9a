"""What may leave the machine: ids and numbers, but not the words of prompts and answers."""

import base64
import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mechlens.runs.artifacts import CLASS, DICT, TENSOR

TEXT_NAMES = frozenset(
    [
        "text",
        "texts",
        "prompt",
        "prompts",
        "question",
        "instruction",
        "system",
        "history",
        "answer",
        "answers",
        "completion",
        "completions",
        "response",
        "token",
        "tokens",
        "thinking",
        "thought",
        "thoughts",
    ]
)
WITHHELD = "[withheld]"

# A shorter text says little, and "harmful" as somebody's prompt must not blank every label.
SHORTEST_TEXT = 12
# A piece of a text that is as long as this counts as the text: figures cut long ones short.
SHORTEST_PIECE = 24


def names_text(name: str) -> bool:
    """True for a column or field that holds words: `text`, `judge_answer`, `clean_prompt`, not `prompt_id`."""
    last = name.lower().replace(".", "_").replace("-", "_").rsplit("_", 1)[-1]
    return name.lower() in TEXT_NAMES or last in TEXT_NAMES


def config_without_text(config: Any) -> Any:
    """A plain config without its words: a system prompt, a text given on the command line."""
    if isinstance(config, list):
        return [config_without_text(item) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        name: WITHHELD if names_text(name) and _has_words(value) else config_without_text(value)
        for name, value in config.items()
    }


def header_has_text(fields: Any) -> bool:
    """True if the JSON fields of a saved artefact hold words under a text's name."""
    if isinstance(fields, list):
        return any(header_has_text(item) for item in fields)
    if not isinstance(fields, dict):
        return False
    if DICT in fields:
        fields = {str(key): value for key, value in fields[DICT]}
    return any((names_text(name) and _has_words(value)) or header_has_text(value) for name, value in fields.items())


def _has_words(value: Any) -> bool:
    """True if there is a string in a plain value other than the name of a tensor or class."""
    if isinstance(value, dict):
        return any(_has_words(item) for key, item in value.items() if key not in (TENSOR, CLASS))
    return any(map(_has_words, value)) if isinstance(value, list) else isinstance(value, str) and value != ""


@dataclass(frozen=True)
class PrivateTexts:
    """The texts of a run, none of which may be found in what is uploaded."""

    texts: frozenset[str] = frozenset()

    def and_these(self, texts: list[str]) -> "PrivateTexts":
        """These texts as well."""
        return PrivateTexts(self.texts | {text for text in texts if len(text) >= SHORTEST_TEXT})

    def inside(self, value: str) -> bool:
        """True if the value holds a private text or is a long piece of one."""
        if len(value) < SHORTEST_TEXT:
            return False
        # As a figure shows it: escaped, broken into lines, cut short.
        plain = html.unescape(value.replace("<br>", "")).removesuffix("…")
        is_piece = len(plain) >= SHORTEST_PIECE
        return any(text in plain or (is_piece and plain in text) for text in self.texts)

    def clean(self, value: Any) -> Any:
        """The plain value with every string that holds a private text replaced."""
        if isinstance(value, str):
            return WITHHELD if self.inside(value) else value
        if isinstance(value, dict):
            return {key: self.clean(item) for key, item in value.items()}
        return [self.clean(item) for item in value] if isinstance(value, list | tuple) else value


def frame_without_text(frame: pd.DataFrame, private: PrivateTexts) -> pd.DataFrame:
    """The table without its columns of words, whatever they are called."""
    keep = [name for name in frame.columns if not _is_text(str(name), frame[name], private)]
    return frame[keep]


def text_columns(frame: pd.DataFrame) -> list[str]:
    """The columns that are named as words and hold some."""
    return [str(name) for name in frame.columns if _is_text(str(name), frame[name], PrivateTexts())]


def _is_text(name: str, column: "pd.Series[Any]", private: PrivateTexts) -> bool:
    if pd.api.types.is_numeric_dtype(column):
        return False
    return names_text(name) or any(private.inside(value) for value in column.astype(str).unique())


def figure_without_text(figure: Mapping[str, Any], private: PrivateTexts) -> dict[str, Any] | None:
    """A plotly figure's JSON without words, or None if it cannot be drawn without them.

    `mechlens.runs.report.figures` notes in `layout.meta` which columns a figure shows. A figure from elsewhere
    has no such note, so everything that could be a text on hovering goes.
    """
    shown = (figure["layout"].get("meta") or {}).get("columns")
    if shown and any(names_text(name) for role, name in shown.items() if not role.startswith("hover")):
        return None
    hover = [name for role, name in shown.items() if role.startswith("hover")] if shown else None
    hidden = hover is None or any(names_text(name) for name in hover)
    drop = {"text", "hovertext", "customdata", "hovertemplate"} if hidden else set()
    traces = [{key: value for key, value in trace.items() if key not in drop} for trace in figure["data"]]
    cleaned: dict[str, Any] = private.clean({"data": traces, "layout": figure["layout"]})
    return cleaned


def unpacked(value: Any) -> Any:
    """A figure's JSON with plain lists where plotly 6 packs arrays in base64, which W&B cannot draw."""
    if isinstance(value, dict) and value.keys() >= {"dtype", "bdata"}:
        array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
        shape = value.get("shape")
        return (array.reshape([int(size) for size in str(shape).split(",")]) if shape else array).tolist()
    if isinstance(value, dict):
        return {key: unpacked(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [unpacked(item) for item in value] if isinstance(value, list | tuple) else value
