"""The report: one file, no network, every text shown as it is."""

import base64
import gzip
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import after_headline
from mechlens.runs.report import figures
from mechlens.runs.report.cells import cells, rounded
from mechlens.runs.report.colours import ON_DARK, THINGS
from mechlens.runs.report.parts import HEADINGS, estimate_text, heading, token_spans
from mechlens.runs.report.report import FigureEntry, Report, Section, TokenView, render
from mechlens.runs.report.signs import sign
from mechlens.runs.run import Artefact, Inputs, Run

EVIL = '</script><script>alert("owned")</script><img src=http://evil.test/x onerror=alert(1)>'
RUN = Run(
    id="separate-1",
    verb="separate",
    config={"model": "tiny"},
    resolved={"model": "tiny", "system": EVIL},
    status="success",
    started="2026-01-02T03:04:05+00:00",
    inputs=Inputs("m" * 64, "t" * 64, {EVIL: "d" * 64}),
    artefacts={"direction": Artefact("direction.safetensors", "a" * 64, {})},
)
OLD_RUNS = Path(__file__).parent / "old_runs" / "runs"
FRAME = pd.DataFrame({"x": [0, 1, 2], "y": [0.5, math.nan, 0.9], "text": [EVIL, "b", "c"]})
WORDS = {"title": EVIL, "xlabel": EVIL, "ylabel": EVIL}


class Page(HTMLParser):
    """The tags of a page, and what it would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def page(**changes) -> str:
    drawn = {
        "lines": FigureEntry(figures.lines(FRAME, x="x", y="y", group="text", **WORDS), EVIL, "scores"),
        "points": FigureEntry(figures.scatter(FRAME, x="x", y="y", hover=["text"], **WORDS)),
    }
    view = TokenView(tokens=("<b>", " ", "\n", EVIL), values=(1.0, -2.0, 0.0, math.nan), title=EVIL)
    section = Section(EVIL, EVIL, tuple(drawn), FRAME, (view,))
    parts = {
        "title": EVIL,
        "question": EVIL,
        "verdict": EVIL,
        "numbers": {EVIL: Estimate(0.9, 0.8, 0.95, 40), "other": Estimate.missing(2)},
        "words": {"other": EVIL},
        "sections": (section,),
        "how": EVIL,
    }
    return render(Report(**{**parts, **changes}), RUN, drawn, {"scores": FRAME})


@pytest.fixture(scope="module")
def html() -> str:
    return page()


def test_nothing_is_fetched(html):
    fetching = [
        (tag, name, value)
        for tag, attributes in Page(html).tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster", "background") and value
        if not value.startswith("#")  # a place on the same page
    ]
    assert fetching == []
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    policies = [a["content"] for tag, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0].startswith("default-src 'none'")


def drawings(html: str) -> list[dict]:
    """What the page's JSON script elements hold: a drawing for each figure, then what all share."""
    return [json.loads(text) for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html)]


def test_plotly_is_there_once_and_cannot_upload(html):
    (packed,) = re.findall(r'<script type="application/gzip" id="plotly">(.*?)</script>', html)
    unpacked = gzip.decompress(base64.b64decode(packed)).decode()
    assert "Licensed under the MIT license" in unpacked[:300]
    assert drawings(html)[-1]["config"]["showSendToCloud"] is False
    assert drawings(html)[-1]["config"]["plotlyServerURL"] == ""
    assert "mathjax.js" not in html.lower()


def test_every_colour_of_a_figure_has_one_for_dark_screens(html):
    *figures_drawn, common = drawings(html)
    used = set(re.findall(r"#[0-9a-fA-F]{6}", json.dumps(figures_drawn)))
    assert used
    assert used <= common["onDark"].keys()
    assert not set(THINGS.values()) - ON_DARK.keys()


def test_a_report_without_figures_needs_no_plotly():
    html = page(sections=(Section("a", "b"),))
    assert len(html) < 30_000
    assert "application/gzip" not in html


def test_text_is_shown_and_never_run(html):
    tags = [tag for tag, _ in Page(html).tags]
    assert "img" not in tags
    assert '<script>alert("owned")' not in html
    # The two figures, what they share, plotly and what draws them: no script came from a text.
    assert tags.count("script") == 5
    assert EVIL in "".join(Page(html).texts)


def test_every_part_is_in_the_page(html):
    text = " ".join("".join(Page(html).texts).split())
    for part in ("2026-01-02 03:04 UTC", "separate-1", "tiny", "0.900", "[0.800, 0.950], n = 40", "m" * 64, "a" * 64):
        assert part in text
    assert "Data of this figure (3 rows)" in text
    assert {"figure-lines", "figure-points"} <= {a.get("id") for _, a in Page(html).tags}


def test_a_long_table_says_where_the_rest_is():
    frame = pd.DataFrame({"x": range(1000), "y": [0.5] * 1000})
    drawn = {"f": FigureEntry(figures.lines(frame, x="x", y="y", title="t", xlabel="x", ylabel="y"), "", "all")}
    html = render(Report("t", "q", "v", sections=(Section("s", figures=("f",)),)), RUN, drawn, {"all": frame})
    text = "".join(Page(html).texts)
    assert "The first 400 of 1000 rows; all of them are in tables/all.parquet" in text


def test_a_table_is_headed_by_words_with_the_name_of_the_column_behind_them():
    frame = pd.DataFrame({"auroc": [0.5], "own_auroc_low": [0.4], EVIL: ["a"], 3: [1]})
    html = render(Report("T", "Q?", "V.", sections=(Section("S", table=frame),)), RUN, {}, {})
    shown = [attributes.get("title") for tag, attributes in Page(html).tags if tag == "th" and "title" in attributes]
    assert shown == ["auroc", "own_auroc_low", EVIL, "3"]
    assert '<th title="auroc" class="n">AUROC</th>' in html
    assert '<th title="own_auroc_low" class="n">own auroc, 95% low</th>' in html
    assert '<script>alert("owned")' not in html


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("n", "n"),
        ("permutation_p", "permutation p"),
        ("guard, ms", "guard, ms"),
        ("frozen_change_low", "base's readout, change from the base, 95% low"),
        ("plain.belief_harm.centered", "plain request: harmfulness belief, centred"),
        ("score.token_identity", "score of token identity"),
        ("verdict_phrases", "verdict of phrases"),
        ("verdict_before", "verdict before"),
        ("verdict_before_arditi", "verdict before, arditi"),
    ],
)
def test_a_column_is_called_by_words(column, words):
    assert heading(column) == words


def test_no_two_columns_of_a_recorded_table_are_called_alike():
    tables = sorted(OLD_RUNS.rglob("tables/*.parquet"))
    assert len(tables) > 20
    for table in tables:
        headings = [heading(column) for column in pd.read_parquet(table).columns]
        assert len(set(headings)) == len(headings), table
        assert not [words for words in headings if "_" in words], table


def test_cells_are_words_and_a_column_has_one_format():
    frame = pd.DataFrame(
        {"baseline": ["token_identity_auroc.inst", "tfidf"], "cut": [True, False], "auroc": [0.9, 0.98765],
         "n": [9, 120], "p": [0.5, 1e-6], "step": [1.0, math.nan], "token": ["a_b", "tfidf"]}
    )  # fmt: skip
    assert cells(frame) == [
        ["token at inst", "yes", "0.900", "9", "0.5", "1", "a_b"],
        ["words (TF-IDF)", "no", "0.988", "120", "1e−06", "–", "tfidf"],  # a prompt's words stay as they are
    ]


def test_rounding_is_0_in_a_table_of_nats() -> None:
    frame = pd.DataFrame({"none": [2.9e-06, -1.1e-15], "some": [2.9e-06, 1.5], "n": [3, 4]})
    assert "e" in cells(frame)[0][0]
    assert cells(rounded(frame)) == [["0", "0.000", "3"], ["0", "1.500", "4"]]
    drawn = figures.bars(frame, x="n", y="some", title="t", xlabel="x", ylabel="y")
    page = {
        rounds: render(
            Report("t", "q", "v", sections=(Section("s", "", ("f",), table=frame),), rounds=rounds), RUN,
            {"f": FigureEntry(drawn, table="own")}, {"own": frame.assign(own=3.9e-05)},
        )
        for rounds in (False, True)
    }  # fmt: skip
    for number in ("2.9e−06", "3.9e−05"):  # in a section's table, and in that below a figure
        assert number in page[False]
        assert number not in page[True]


def test_no_two_headings_are_alike():
    assert len(set(HEADINGS.values())) == len(HEADINGS)


def test_a_title_stands_above_the_figure_where_a_phone_can_break_it():
    drawn = figures.lines(FRAME, x="x", y="y", title="What is <read> & where", xlabel="x", ylabel="y")
    html = render(Report("T", "Q?", "V.", sections=(Section("S", "", ("f",)),)), RUN, {"f": FigureEntry(drawn)}, {})
    assert '<h3 class="figure-title">What is &lt;read&gt; &amp; where</h3>' in html
    assert html.count("What is") == 1
    assert drawn.layout.title.text == "What is &lt;read&gt; &amp; where"


@pytest.mark.parametrize("draw", [figures.lines, figures.heatmap])
def test_a_figure_without_a_number_says_so(draw):
    frame = pd.DataFrame({"x": [0, 1], "y": [0, 1], "v": [math.nan, math.nan]})
    where = {"x": "x", "y": "v"} if draw is figures.lines else {"x": "x", "y": "y", "value": "v"}
    drawn = FigureEntry(draw(frame, **where, title="T", xlabel="x", ylabel="y"))
    html = render(Report("T", "Q?", "V.", sections=(Section("S", "", ("f",)),)), RUN, {"f": drawn}, {})
    assert "Nothing to draw" in html
    assert 'id="figure-f"' not in html


def test_a_figure_that_the_run_has_not_is_named():
    with pytest.raises(ValueError, match="'absent'"):
        page(sections=(Section("s", figures=("absent",)),))


def test_colours_are_symmetric_about_zero_and_white_space_is_seen():
    spans = token_spans(TokenView(("a", "b", "c", " ", "\n", "x\ty", " d"), (2.0, -2.0, 0.0, 1.0, math.nan, 0.0, 0.0)))
    assert [span.text for span in spans] == ["a", "b", "c", "␣", "⏎", "x⇥y", " d"]
    assert [(span.side, span.share) for span in spans[:4]] == [("above", 1), ("below", 1), ("below", 0), ("above", 0.5)]
    assert (spans[4].side, spans[4].value, spans[4].line_end) == ("missing", "–", True)
    # All zero has no colour, and is no division by zero.
    assert token_spans(TokenView(("a",), (0.0,)))[0].share == 0
    with pytest.raises(ValueError, match="2 tokens"):
        TokenView(("a", "b"), (1.0,))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tpr_at_1pct_fpr.latent_guard", "higher: better"),
        ("fpr.latent_guard", "lower: better"),
        ("auroc.latent_guard.twins", "0.5: chance; 1: told apart"),
        ("auroc_gain.tfidf.twins", "above 0: ahead of the baseline"),
        ("dissociation.beyond_words", "above 0: more than the words tell"),
        ("auroc.tfidf.twins", "the number to beat"),
        ("bypass_shift.beyond_chance", "below 0: refuses less than under random ones"),
        ("induce_shift.beyond_chance", "above 0: more than random ones"),
        ("kl.harmless.ablated", "lower: better"),
        ("dissociation.one_variable_95", "the number to beat"),
        ("n.refused_harmful", ""),
    ],
)
def test_a_card_says_which_way_its_number_speaks(name, words):
    assert sign(name) == words


def test_no_line_of_tokens_is_empty():
    spans = token_spans(TokenView(("a", "\n", "\n", " \n\n", "b", "\n"), (0.0,) * 6))
    assert [span.line_end for span in spans] == [False, False, False, True, False, False]


def test_a_table_stands_under_the_first_of_its_figures_only():
    drawn = {name: FigureEntry(figures.lines(FRAME, x="x", y="y", **WORDS), "", "scores") for name in ("f", "g")}
    html = render(Report("T", "Q?", "V.", sections=(Section("S", "", ("g", "f")),)), RUN, drawn, {"scores": FRAME})
    assert html.count('<details id="data-scores">') == 1
    assert html.index('id="figure-g"') < html.index('id="data-scores"') < html.index('href="#data-scores"')


@pytest.mark.parametrize(
    ("estimate", "value", "detail"),
    [
        (Estimate(0.98234, 0.9, 1.0, 96), "0.982", "[0.900, 1.000], n = 96"),
        (Estimate(-1.5, -2.0, -1.0, 5), "−1.500", "[−2.000, −1.000], n = 5"),
        (Estimate.missing(3), "not measurable", "n = 3"),
        (Estimate(1200.0, 1200.0, 1200.0, 4000), "1,200", "n = 4,000"),
        (Estimate.exact(1.356, 180), "1.356", "n = 180"),  # a quantile: chance has no part in it
        (Estimate(1.0, 1.0, 1.0, 20), "1.000", "[1.000, 1.000], n = 20"),
    ],
)
def test_a_number_is_said_with_its_interval(estimate, value, detail):
    assert estimate_text(estimate) == (value, detail)


@pytest.mark.parametrize(
    ("verdict", "headline", "beyond"),
    [
        (
            "Open. D is 1, above 0. If D stays there, 9 more would do.",
            "Open: D is 1; 9 more would do.",
            "D is 1, above 0.",
        ),
        ("It holds. More of it.", "It holds.", "More of it."),
        ("Known: x is 3.", "Known: x is 3.", ""),
        ("Whole.", "", "Whole."),
    ],
)
def test_the_box_goes_on_from_the_sentence_above_it(verdict, headline, beyond):
    assert after_headline(verdict, headline) == beyond
