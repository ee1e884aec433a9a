"""Where a value lies along an axis of a still figure, and where its ticks stand."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
LONGEST_LABEL = 16
LETTER = 6.6
"""Pixels of a letter, about."""
LEAST_ASLANT = 14
"""Pixels between names that are written aslant."""


@dataclass(frozen=True)
class Axis:
    """Values, or names in their order, along a line from one pixel to another."""

    ends: tuple[float, float]
    """Pixels of the lowest and the highest value."""
    low: float
    high: float
    title: str = ""
    names: tuple[str, ...] = ()
    """Where the axis has names for values; each stands at its number in the list."""
    logarithmic: bool = False

    def __call__(self, value: Any) -> float:
        """The pixel of a value; what lies beyond the ends stays at them."""
        number = self.names.index(str(value)) if self.names else float(value)
        if self.logarithmic:
            number = math.log10(max(number, 1e-12))
        share = (number - self.low) / ((self.high - self.low) or 1.0)
        return self.ends[0] + min(max(share, -0.02), 1.02) * (self.ends[1] - self.ends[0])

    @property
    def step(self) -> float:
        """Pixels from one name, or whole number, to the next."""
        return abs(self.ends[1] - self.ends[0]) / ((self.high - self.low) or 1.0)

    @property
    def crowded(self) -> bool:
        """Whether names side by side would run into each other, but are few enough to be written aslant."""
        longest = max((min(len(html.unescape(name)), 2 * LONGEST_LABEL) for name in self.names), default=0)
        return self.ends[1] > self.ends[0] and LEAST_ASLANT <= self.step < LETTER * longest

    def ticks(self) -> list[tuple[float, str]]:
        """Pixels and labels, as many as there is room for."""
        room = max(2, int(abs(self.ends[1] - self.ends[0]) / (60 if self.ends[1] > self.ends[0] else 26)))
        if self.names:
            every = 1 if self.crowded else math.ceil(len(self.names) / room)
            longest = LONGEST_LABEL if len(self.names) > 4 and not self.crowded else 2 * LONGEST_LABEL
            return [(self(name), _short(name, longest)) for name in self.names[::every]]
        size = 10 ** math.floor(math.log10((self.high - self.low) / room or 1.0))
        step = next((size * k for k in STEPS if (self.high - self.low) / (size * k) <= room), size * 10)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        values = [k * step for k in range(first, last + 1)]
        if self.logarithmic:
            return [(self(10**value), f"{10**value:.3g}") for value in values]
        return [(self(value), f"{value:.6g}".replace("-", "−")) for value in values]


def axis_of(
    layout: Mapping[str, Any],
    traces: Sequence[Mapping[str, Any]],
    letter: str,
    ends: Any,
    rules: Sequence[float] = (),
) -> Axis:
    """The axis that plotly would draw for these traces and rules: its part of the figure, its kind, its range."""
    first, last = (float(end) for end in layout.get("domain") or (0.0, 1.0))
    own = ends[0] + first * (ends[1] - ends[0]), ends[0] + last * (ends[1] - ends[0])
    title = str((layout.get("title") or {}).get("text") or "")
    values = [value for trace in traces for value in trace.get(letter) or () if value is not None]
    mapped = any(trace["type"] == "heatmap" for trace in traces)
    if layout.get("type") == "category" or any(isinstance(value, str) for value in values) or (mapped and values):
        names = tuple(dict.fromkeys(str(value) for value in values))
        low, high = (-0.5, len(names) - 0.5) if layout.get("autorange") != "reversed" else (len(names) - 0.5, -0.5)
        return Axis(own, low, high, title, names)
    logarithmic = layout.get("type") == "log"
    if layout.get("range"):
        low, high = (float(end) for end in layout["range"])
        return Axis(own, low, high, title, logarithmic=logarithmic)
    return Axis(own, *_reach([*values, *rules], traces, letter, logarithmic), title, logarithmic=logarithmic)


def _reach(
    values: Sequence[Any], traces: Sequence[Mapping[str, Any]], letter: str, logarithmic: bool
) -> tuple[float, float]:
    """The least and the largest of what is drawn, with a little air."""
    numbers = [float(value) for value in values]
    if letter == "y":
        for trace in traces:
            error = trace.get("error_y") or {}
            for sign, key in ((1, "array"), (-1, "arrayminus")):
                pairs = zip(trace.get("y") or (), error.get(key) or (), strict=False)
                numbers += [y + sign * size for y, size in pairs if y is not None and size is not None]
        if any(trace["type"] == "bar" or trace.get("fill") == "tozeroy" for trace in traces):
            numbers.append(0.0)
    if logarithmic:
        numbers = [math.log10(number) for number in numbers if number > 0]
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    air = 0.05 * (high - low) or 0.5
    return (low if low == 0.0 else low - air), high + air


def _short(name: str, longest: int) -> str:
    plain = html.unescape(name)  # an entity that is cut is no entity any more
    return name if len(plain) <= longest else html.escape(plain[: longest - 1]) + "…"
