"""Figures show the numbers of their table, and say which columns they show."""

import copy
import math
import re

import pandas as pd
import plotly.io as pio
import pytest

from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.privacy import (
    PrivateTexts,
    config_without_text,
    figure_without_text,
    frame_without_text,
    names_text,
    unpacked,
)
from mechlens.runs.report import figures
from mechlens.runs.report.colours import GREY, RULE, THINGS, looks
from mechlens.runs.report.still import BOTTOM, HEIGHT, still
from mechlens.studies.shared.angles import NO_ANGLE, angle_text, angles

FRAME = pd.DataFrame(
    {
        "level": [2, 0, 1, 0, 1, 2],
        "position": ["inst", "inst", "inst", "last", "last", "last"],
        "auroc": [0.9, 0.5, math.nan, 0.4, 0.6, 0.7],
        "low": [0.8, 0.4, math.nan, 0.3, 0.5, 0.6],
        "high": [1.0, 0.6, math.nan, 0.5, 0.7, 0.8],
    }
)
WORDS = {"title": "t", "xlabel": "x", "ylabel": "y"}
INTERVAL = {"low": "low", "high": "high"}


def draw_all() -> list:
    axes = {"x": "level", "y": "auroc", "group": "position", **WORDS}
    return [
        figures.lines(FRAME, **axes, **INTERVAL, hline=0.5, hline_label="chance"),
        figures.bars(FRAME, **axes, **INTERVAL),
        figures.scatter(FRAME, **axes, hover=["low"], hline=0.0, vline=0.0),
        figures.heatmap(FRAME, x="level", y="position", value="auroc", center=0.5, **WORDS),
        figures.histogram(FRAME, value="auroc", group="position", title="t", xlabel="x", bins=5),
    ]


def test_no_global_template_is_touched_and_no_table_is_changed():
    before, default, frame = copy.deepcopy(dict(pio.templates)), pio.templates.default, FRAME.copy()
    drawn = draw_all()
    assert dict(pio.templates) == before
    assert pio.templates.default == default
    pd.testing.assert_frame_equal(FRAME, frame)
    fonts = {figure.layout.template.layout.font.family for figure in drawn}
    assert len(fonts) == 1


def test_no_array_is_packed():
    assert all("bdata" not in figure.to_json() for figure in draw_all())


def test_lines_are_in_order_of_x_and_leave_out_what_was_not_measured():
    traces = [trace for trace in draw_all()[0].data if trace.fill is None]
    assert [(list(trace.x), list(trace.y)) for trace in traces] == [([0, 2], [0.5, 0.9]), ([0, 1, 2], [0.4, 0.6, 0.7])]
    band = next(trace for trace in draw_all()[0].data if trace.fill == "toself")
    assert list(band.y) == [0.6, 1.0, 0.8, 0.4]


def test_a_lone_point_has_its_interval_too():
    """A band needs two points: one alone would lose its interval."""
    lone = FRAME[(FRAME["position"] == "last") | (FRAME["level"] == 2)]
    drawn = figures.lines(lone, x="level", y="auroc", group="position", **INTERVAL, **WORDS).data
    (point,) = (trace for trace in drawn if trace.name == "inst")
    assert (point.mode, list(point.y)) == ("markers", [0.9])
    assert list(point.error_y.array) == [pytest.approx(0.1)]
    assert list(point.error_y.arrayminus) == [pytest.approx(0.1)]


def test_points_without_an_interval_have_no_bar_of_no_width() -> None:
    frame = pd.DataFrame({"x": ["a", "b"], "y": [0.5, 0.7], "low": [math.nan] * 2, "high": [math.nan] * 2})
    drawn = figures.bars(frame, x="x", y="y", low="low", high="high", title="t", xlabel="x", ylabel="y")
    assert drawn.data[0].error_y.visible is False
    half = figures.bars(frame.assign(low=[0.1, math.nan], high=[0.9, math.nan]), x="x", y="y", low="low", high="high",
                        title="t", xlabel="x", ylabel="y")  # fmt: skip
    assert half.data[0].error_y.visible is True


def test_a_group_has_one_colour_in_every_figure():
    lines, bars, scatter = draw_all()[:3]
    named = {trace.name: trace.line.color for trace in lines.data if trace.fill is None}
    assert named == {trace.name: trace.marker.color for trace in bars.data}
    assert named == {trace.name: trace.marker.color for trace in scatter.data}


def test_a_group_keeps_its_colour_where_others_could_not_be_measured():
    names, missing = ["refused", "accepted", "empty"], pd.Categorical(["empty"], ["refused", "accepted", "empty"])
    whole = pd.DataFrame({"who": names, "x": [3, 1, 2], "y": [0.1, 0.2, 0.3]})
    colours = []
    for frame in (whole, whole.assign(y=[math.nan, 0.2, 0.3]), pd.DataFrame({"who": missing, "x": [1], "y": [0.3]})):
        drawn = figures.lines(frame, x="x", y="y", group="who", **WORDS).data
        colours.append({trace.name: trace.line.color for trace in drawn})
    assert [list(found) for found in colours] == [names, names[1:], names[2:]]
    assert all(found["empty"] == colours[0]["empty"] for found in colours)
    assert colours[0]["accepted"] == colours[1]["accepted"]


def test_more_bars_than_colours_are_told_apart_and_layers_have_no_halves():
    many = pd.DataFrame({"who": list("abcdefgh"), "x": 1, "y": 0.5})
    drawn = figures.bars(many, x="x", y="y", group="who", **WORDS).data
    assert len({(trace.marker.color, trace.marker.pattern.shape) for trace in drawn}) == 8
    assert figures.lines(FRAME, x="level", y="auroc", group="position", **WORDS).layout.xaxis.dtick == 1


def test_a_diverging_heatmap_is_symmetric_and_keeps_holes():
    (trace,) = draw_all()[3].data
    assert trace.zmax - 0.5 == pytest.approx(0.5 - trace.zmin)
    assert [list(row) for row in trace.z] == [[0.9, 0.5, None], [0.7, 0.4, 0.6]]
    assert list(trace.x) == [2, 0, 1]


def test_cells_without_a_value_are_grey_where_it_is_said_why():
    given = {"x": "level", "y": "position", "value": "auroc", "center": 0.5, **WORDS}
    _, holes = figures.heatmap(FRAME, **given, missing="no angle").data
    assert [list(row) for row in holes.z] == [[None, None, 0.0], [None, None, None]]
    assert {colour for _, colour in holes.colorscale} == {GREY}
    assert "<b>no angle</b>" in holes.hovertemplate
    assert holes.hoverongaps is False  # cells that have a value are left to the other trace
    assert len(figures.heatmap(FRAME.dropna(), **given, missing="no angle").data) == 2  # a pair that isn't there is one
    whole = FRAME[FRAME["position"] == FRAME["position"].iloc[-1]].dropna()
    assert len(figures.heatmap(whole, **given, missing="no angle").data) == 1
    still_picture = still(figures.heatmap(FRAME, **given, missing="no angle"))
    assert GREY in still_picture
    assert still_picture.count('width="10"') == still(figures.heatmap(FRAME, **given)).count('width="10"')  # one scale


def test_a_still_picture_has_room_for_its_rule():
    high = FRAME[FRAME["auroc"] > 0.65]
    picture = still(figures.lines(high, x="level", y="auroc", group="position", hline=0.5, **WORDS))
    (at,) = re.findall(rf'd="M\d+ ([\d.]+)H\d+" stroke="{RULE}"', picture)
    assert float(at) < HEIGHT - BOTTOM


def test_a_heatmap_refuses_two_values_for_one_cell():
    with pytest.raises(ValueError, match="one row per"):
        figures.heatmap(pd.concat([FRAME, FRAME]), x="level", y="position", value="auroc", **WORDS)


def test_a_histogram_counts_every_measured_row():
    assert sum(sum(trace.y) for trace in draw_all()[4].data) == 5
    alone = pd.DataFrame({"v": [1.0, 1.0]})
    assert sum(figures.histogram(alone, value="v", title="t", xlabel="x").data[0].y) == 2


def test_text_in_a_figure_is_shown_as_it_is():
    frame = pd.DataFrame({"x": ["<b>a</b>"], "y": [1.0], "text": ["<a href='http://x'>" + "w" * 400]})
    (trace,) = figures.scatter(frame, x="x", y="y", hover=["text"], **WORDS).data
    assert trace.x[0] == "&lt;b&gt;a&lt;/b&gt;"
    assert "<a" not in trace.customdata[0][0]
    assert trace.customdata[0][0].endswith("…")


def test_figures_keep_their_words_on_the_machine():
    words = pd.DataFrame({"token": ["how", "bomb"], "level": [0, 1], "v": [0.1, 0.2], "id": ["p1", "p2"]})
    private = PrivateTexts()

    def told(figure):
        return figure_without_text(unpacked(figure.to_plotly_json()), private)

    assert told(figures.heatmap(words, x="token", y="level", value="v", **WORDS)) is None
    assert told(figures.bars(words, x="token", y="v", **WORDS)) is None
    by_id = told(figures.scatter(words, x="level", y="v", hover=["id"], **WORDS))
    assert by_id["data"][0]["customdata"] == [["p1"], ["p2"]]
    by_word = told(figures.scatter(words, x="level", y="v", hover=["id", "token"], **WORDS))
    assert "bomb" not in str(by_word)


@pytest.mark.parametrize("name", ["text", "Prompt", "judge_answer", "clean.prompt", "token", "history"])
def test_names_of_words(name):
    assert names_text(name)


@pytest.mark.parametrize("name", ["prompt_id", "text_length", "label", "template", "position"])
def test_names_of_ids_and_numbers(name):
    assert not names_text(name)


def test_a_config_keeps_its_words_and_tells_its_numbers():
    config = {"model": "m", "tokens": 20, "data": {"system": "be kind", "n": 3}, "prompts": ["hi"]}
    assert config_without_text(config) == {
        "model": "m",
        "tokens": 20,
        "data": {"system": "[withheld]", "n": 3},
        "prompts": "[withheld]",
    }


def test_a_private_text_is_found_escaped_broken_or_cut():
    text = 'say "hello" & <bye> ' + "over and over " * 40
    frame = pd.DataFrame({"x": [0.0], "y": [1.0], "goal": [text], "label": ["harmful"]})
    figure = figures.scatter(frame, x="x", y="y", hover=["goal", "label"], **WORDS)
    private = PrivateTexts().and_these([text, "harmful", "short one"])
    told = figure_without_text(unpacked(figure.to_plotly_json()), private)
    assert told["data"][0]["customdata"] == [["[withheld]", "harmful"]]
    assert list(frame_without_text(frame, private).columns) == ["x", "y", "label"]


def test_a_thing_has_its_colour_whatever_stands_beside_it():
    """Quadrants, concepts and positions; names of none of these get colours that no thing has."""
    alone, beside = (
        looks(["inst"]),
        looks(["zhao", "refused harmful", "inst", "last, post[4]", "harmful, fitted among accepted"]),
    )
    assert alone["inst"] == beside["inst"]
    assert len({look.colour for look in beside.values()}) == 5
    assert beside["zhao"].colour not in THINGS.values()
    assert beside["harmful, fitted among accepted"].colour == looks(["harm"])["harm"].colour
    assert looks(["instruction[0]"]) != looks(["inst"])  # another word, not another beginning
    tokens = [f"post[{k}]" for k in range(6)]
    drawn = looks(["inst", "last", "some", "more", *tokens])
    assert [drawn[name] for name in tokens] == [looks([name])[name] for name in tokens]
    assert len({drawn[name].colour for name in tokens}) == 6
    channels = {name: [int(look.colour[i : i + 2], 16) for i in (1, 3, 5)] for name, look in drawn.items()}
    for name in tokens:
        for mark in ("inst", "last"):
            assert drawn[name].turn != drawn[mark].turn == 0  # their lines are solid, its isn't
            assert math.dist(channels[name], channels[mark]) > 75
    twice = looks(["refusal added", "refusal subtracted"]).values()
    assert [look.turn for look in twice] == [0, 1]


def test_axes_show_what_is_possible_and_whole_levels():
    drawn = figures.lines(FRAME, x="level", y="auroc", limits=(0.0, 1.0), **WORDS)
    assert list(drawn.layout.yaxis.range) == pytest.approx([-0.02, 1.02])
    deep = pd.DataFrame({"level": range(31), "position": "inst", "v": 0.5})
    assert figures.heatmap(deep, x="position", y="level", value="v", **WORDS).layout.yaxis.dtick == 2
    few = pd.DataFrame({"level": [30, 0, 15], "position": "inst", "v": 0.5})
    axis = figures.heatmap(few, x="position", y="level", value="v", **WORDS).layout.yaxis
    assert (axis.type, list(axis.categoryarray)) == ("category", [0, 15, 30])


@pytest.mark.parametrize(
    ("value", "low", "high", "angle"),
    [
        (0.3, 0.1, 0.5, True),
        (1.1, 0.8, 1.4, True),  # the same direction, with noise
        (-0.6, -1.8, 0.2, False),  # more than half of what there is
        (8.0, 2.0, 14.0, False),
        (math.nan, math.nan, math.nan, False),
    ],
)
def test_a_cosine_that_noise_has_made_is_no_angle(value, low, high, angle):
    frame = pd.DataFrame({"v": [value], "low": [low], "high": [high]})
    drawn, noisy = angles(frame, "v", "low", "high")
    assert (len(drawn), len(noisy)) == (int(angle), int(not angle))
    assert drawn.to_numpy().clip(-1, 1) == pytest.approx(drawn.to_numpy())
    if not math.isnan(value):
        assert (angle_text(Estimate(value, low, high, 9)) == NO_ANGLE) == (not angle)


def test_a_curve_keeps_its_colour_where_another_is_no_angle():
    frame = pd.DataFrame({"curve": ["a", "b"], "x": 1, "v": [8.0, 0.5], "low": [2.0, 0.4], "high": [9.0, 0.6]})
    drawn, noisy = angles(frame, "v", "low", "high")
    both = figures.lines(frame, x="x", y="v", group="curve", **WORDS).data
    (alone,) = figures.lines(drawn, x="x", y="v", group="curve", **WORDS).data
    assert (alone.name, alone.line.color) == ("b", both[1].line.color)
    figure = figures.lines(drawn, x="x", y="v", group="curve", **WORDS)
    figures.mark_missing(figure, noisy, x="x", group="curve", at=-1.0, step=0.1, why=NO_ANGLE)
    _, cross = figure.data
    assert (cross.name, cross.marker.color, list(cross.x)) == ("a", both[0].line.color, [1])  # only where it is noisy


def test_a_scatter_has_the_diagonal_that_its_caption_tells_of():
    (line,) = figures.scatter(FRAME, x="level", y="auroc", **WORDS, diagonal=True).layout.shapes
    assert (line.x0, line.x1) == (line.y0, line.y1) == (0.4, 0.9)  # where both axes reach, so that none is stretched


def test_bands_over_all_that_is_possible_are_drawn_once():
    wide = FRAME.assign(low=0.0, high=1.0).fillna(0.5)
    drawn = figures.lines(wide, x="level", y="auroc", group="position", limits=(0.0, 1.0), **INTERVAL, **WORDS).data
    assert len([trace for trace in drawn if trace.fill == "toself"]) == 1
    assert len([trace for trace in drawn if trace.fill is None]) == 2
