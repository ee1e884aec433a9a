"""Phases and bars: where the time goes, and how far along the whole is."""

import re
import time
from collections.abc import Callable

import pytest

from mechlens.methods import heartbeat, progress
from mechlens.methods.heartbeat import Heartbeat
from mechlens.methods.progress import WholeBar, one_bar, phase, progress_bar, steps, timed


def test_the_outermost_phase_counts_and_the_rest_is_other() -> None:
    with timed() as clock:
        with phase("answering"), phase("collecting"):
            time.sleep(0.3)
        with phase("collecting"):
            time.sleep(0.01)
        with pytest.raises(ValueError, match="broken"), phase("answering"):
            raise ValueError("broken")
        time.sleep(0.01)
        found = clock.by_phase()
    assert set(found) == {"answering", "collecting", "other"}
    assert found["answering"] >= 0.3 > found["collecting"] >= 0.01
    assert found["other"] >= 0.01
    with timed() as clock, phase("report", apart=True), phase("measuring"):
        time.sleep(0.3)
    assert clock.seconds["measuring"] >= 0.3 > clock.seconds["report"] >= 0.0
    with phase("nobody looks"):
        pass
    assert "nobody looks" not in clock.seconds


def share(bar: WholeBar) -> float:
    return float(bar._bar.n / bar._bar.total)


def test_one_bar_grows_to_its_end_however_wrong_the_guesses_are() -> None:
    with one_bar("study", {"first": 10.0, "second": 30.0, "left out": 60.0}) as bar:
        with phase("first"):
            part = steps(5, "loop", "prompt", 8.0)
            part.update(2)
            assert share(bar) == pytest.approx(0.032)
            part.update(3)
            part.close()
            steps(1, "more than was guessed", "prompt", 100.0).update(1)
            assert share(bar) == pytest.approx(0.1)
        bar.expect({"first": 10.0, "second": 30.0})
        assert share(bar) == pytest.approx(0.25)
        with phase("unheard of"):
            steps(1, "loop", "prompt", 5.0).update(1)
        assert share(bar) == pytest.approx(0.25)
        with phase("second"), phase("first"):
            steps(2, "loop", "prompt", 30.0).update(1)
            assert share(bar) == pytest.approx(0.625)
    assert share(bar) == 1.0


def test_a_bar_that_is_left_early_stays_where_it_was() -> None:
    found = []

    def work() -> None:
        with one_bar("study", {"first": 1.0, "second": 1.0}) as bar:
            found.append(bar)
            with phase("first"):
                pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert share(found[0]) == 0.5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have gone by, which a test moves on; nobody watches."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "watched", lambda: False)
    return now


def test_in_a_log_there_is_a_line_from_the_second_batch_on_and_then_every_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = steps(608, "answering", "prompt", 608)
    for _ in range(76):
        clock[0] += 4.0
        bar.update(8)
    bar.close()
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert "\r" not in said
    assert lines[0] == "answering: 16 of 608 prompts, 8 s gone, about 4 min 56 s to go"
    assert lines[1] == "answering: 80 of 608 prompts, 40 s gone, about 4 min 24 s to go"
    assert len(lines) == 10


def to_go(line: str) -> float:
    minutes, seconds = re.search(r"about (?:(\d+) min )?(?:(\d+) s )?to go", line).groups()  # type: ignore[union-attr]
    return 60 * float(minutes or 0) + float(seconds or 0)


@pytest.mark.parametrize("warm_up", [0.0, 5.0, 20.0])
def test_what_is_said_to_be_left_is_what_is_left_whatever_the_first_batch_waited_for(
    warm_up: float, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, tokens, batches = 8, 24, 20
    reads, writes = 2.0, 0.1  # seconds that a batch waits before its first token, and that a token takes
    bar, ends = steps(rows * batches, "answering", "prompt", 1.0), []
    for k in range(batches):
        clock[0] += reads + (warm_up if k == 0 else 0.0)
        with progress.batch_of(bar, rows, tokens):
            told = progress.told(None)
            for token in range(tokens):
                clock[0] += writes
                for _ in range(rows):
                    told([token])
                ends += [(line, clock[0]) for line in capsys.readouterr().err.splitlines()]
        ends += [(line, clock[0]) for line in capsys.readouterr().err.splitlines()]
    with_estimate = [(line, at) for line, at in ends if "to go" in line]
    assert len(with_estimate) >= 2
    for line, at in with_estimate:
        assert to_go(line) == pytest.approx(clock[0] - at, abs=1.5), line
    assert all(" 0 of" not in line for line, _ in with_estimate)


def test_a_first_batch_that_lasts_is_estimate_enough(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar = steps(3, "patching", "site", 3.0)
    clock[0] += 40.0
    bar.update(1)
    assert capsys.readouterr().err == "patching: 1 of 3 sites, 40 s gone, about 1 min 20 s to go\n"


def test_what_takes_longer_than_was_told_is_not_said_to_be_over_at_once(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = steps(10, "reading", "prompt", 10.0)
    for _ in range(3):
        clock[0] += 12.0
        bar.update(3)
    for _ in range(3):
        clock[0] += 40.0
        bar.move(0.1)
    bar.close()
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "reading: 9 of 10 prompts, 2 min 36 s gone"
    assert not [line for line in said if "about 0 s" in line]
    with one_bar("study", {"first": 10.0}) as whole, phase("first"):
        part = steps(2, "loop", "prompt", 10.0)
        for _ in range(2):
            clock[0] += 40.0
            part.update(1)  # all that was guessed is done, and the phase goes on
        clock[0] += 40.0
        assert whole._bar._pace.left(whole._bar.total) is None


def test_a_log_says_what_has_begun_and_that_it_goes_on(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with timed() as times:
        monkeypatch.setattr(heartbeat, "LASTS", 5.0)
        beats = Heartbeat(times, "separate")

        def after(seconds: float) -> list[str]:
            for _ in range(int(seconds)):
                clock[0] += 1.0
                beats.log()
            return capsys.readouterr().err.splitlines()

        with phase("loading", "tiny"):
            assert after(4) == []
        with phase("statistics"):
            assert after(66) == ["statistics ...", "statistics, 35 s gone", "statistics, 1 min 5 s gone"]
        with phase("steering"), phase("candidates"):
            bar = steps(8, "steering", "prompt", 8)
            assert after(36) == ["steering: candidates ...", "steering: candidates: 0 of 8 prompts, 35 s gone"]
            bar.close()
        with phase("steering"), phase("candidates"):
            assert after(28) == []


def test_a_phase_that_ends_early_makes_nothing_seem_fast(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """A tenth of its guess took a minute; the next loop's first batch takes one too, and nine more like it follow."""
    with one_bar("study", {"answering": 100.0, "collecting": 100.0}):
        with phase("answering"):
            part = steps(10, "answers", "prompt", 100.0)
            for _ in range(2):
                clock[0] += 30
                part.update(0.5)
        with phase("collecting"):
            part = steps(10, "prompts", "prompt", 100.0)
            clock[0] += 60
            part.update(1)
    assert "55%, 2 min 0 s gone, about 9 min 0 s to go" in capsys.readouterr().err


def test_in_a_log_a_short_loop_says_nothing_and_a_whole_bar_its_share(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for one in progress_bar(range(10), title="short", unit="step"):
        found.append(one)
        clock[0] += 2.0
    assert found == list(range(10))
    assert capsys.readouterr().err == ""
    with one_bar("causal", {"answering": 10.0, "choosing": 30.0}), phase("answering"):
        part = steps(2, "loop", "prompt", 10.0)
        clock[0] += 3600.0
        part.update(1)
    assert capsys.readouterr().err == "causal: answering: 12%, 60 min gone, about 7 h 0 min to go\n"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What a notebook without ipywidgets shows, which is no terminal; bars are shown at once there."""
    monkeypatch.setattr(progress, "watched", lambda: True)
    monkeypatch.setattr(progress, "DELAY", 0)
    return lambda: capsys.readouterr().err


def test_in_a_notebook_bars_within_bars_move_no_cursor(page: Callable[[], str]) -> None:
    for _ in progress_bar(range(2), title="outer", unit="checkpoint"):
        inner = steps(2, "inner", "prompt", 2.0)
        for _ in range(2):
            inner.update(1)
            time.sleep(0.11)
        inner.close()
    said = page()
    assert "outer:" in said
    assert "inner:" in said
    assert "\x1b" not in said
    assert "\n" not in said


def test_one_batch_moves_its_bar_token_by_token(page: Callable[[], str]) -> None:
    bar = steps(2, "answering", "prompt", 2.0)
    with progress.batch_of(bar, 2, 10):
        decided = progress.told(None)
        for k in range(8):
            assert not decided([k])
            time.sleep(0.11)
        assert bar.n == pytest.approx(0.8)
    assert bar.n == pytest.approx(2.0)
    bar.close()
    said = page()
    assert "| 0/2 [" in said  # a prompt is done with its last token
    assert "| 1/2 [" not in said
    assert progress.told(lambda answer: len(answer) > 1)([1, 2])


def test_what_was_done_before_says_nothing_of_the_rest(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar = steps(100, "steering", "prompt", 100.0)
    clock[0] += 1.0
    bar.found(80)
    clock[0] += 9.0
    bar.update(1)
    clock[0] += 30.0
    bar.update(3)
    assert capsys.readouterr().err.splitlines() == ["steering: 84 of 100 prompts, 40 s gone, about 2 min 40 s to go"]


def test_a_resumed_bar_begins_where_the_run_was_killed(page: Callable[[], str]) -> None:
    with one_bar("causal", {"steering": 100.0}) as whole, phase("steering"):
        part = steps(10, "loop", "prompt", 100.0)
        part.found(8)
        assert (whole._bar.n, whole._bar.initial) == (80.0, 80.0)
    bar = steps(10, "steering", "prompt", 10.0)
    bar.found(8)
    time.sleep(0.2)
    bar.update(1)
    assert (bar.n, bar.initial) == (9, 8)
    assert "| 9/10 [" in page()
    assert bar.format_dict["rate"] is None or bar.format_dict["rate"] < 6


def test_a_bar_that_is_switched_off_is_told_all_the_same() -> None:
    off = progress.Bar(total=3, disable=True)
    off.found(2)
    off.update(1)
    off.close()


def test_at_a_terminal_there_are_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "watched", lambda: True)
    with progress_bar(title="loop", total=3) as bar:
        assert isinstance(bar, progress.tqdm)
