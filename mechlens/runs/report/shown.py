"""A figure as notebooks show it: interactive where plotly's type is known, still everywhere else.

An output holds the figure's own numbers and a small SVG, never plotly's four megabytes of JavaScript, and no button
that uploads it.
"""

import json
from typing import Any

import plotly.graph_objects as go
import plotly.io

from mechlens.runs.report.report import STAYS_HERE
from mechlens.runs.report.still import still


class ShownFigure(go.Figure):  # type: ignore[misc]
    """A plotly figure that shows itself in any notebook, and on code hosts."""

    @classmethod
    def from_json(cls, text: str) -> "ShownFigure":
        """The figure of plotly's JSON; ValueError where it is none."""
        return cls(plotly.io.from_json(text))

    _ipython_display_ = None  # plotly's own would come first, and carry its JavaScript

    def _repr_html_(self) -> None:
        return None

    def _repr_mimebundle_(self, *_: Any, **__: Any) -> dict[str, Any]:
        return mime_bundle(self)


def mime_bundle(figure: Any) -> dict[str, Any]:
    """What Jupyter chooses from."""
    shown = json.loads(plotly.io.to_json(figure))
    title = str((shown["layout"].get("title") or {}).get("text") or "figure")
    return {
        "application/vnd.plotly.v1+json": {**shown, "config": STAYS_HERE},
        "image/svg+xml": still(figure),
        "text/plain": f"Figure: {title}",
    }
