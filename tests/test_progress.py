"""Phases and bars: where the time goes, and how far along the whole is."""

import time

import pytest

from mechlens.methods.progress import WholeBar, one_bar, phase, steps, timed


def test_the_outermost_phase_counts_and_the_rest_is_other() -> None:
    with timed() as clock:
        with phase("answering"), phase("collecting"):
            time.sleep(0.02)
        with phase("collecting"):
            time.sleep(0.01)
        with pytest.raises(ValueError, match="broken"), phase("answering"):
            raise ValueError("broken")
        time.sleep(0.01)
        found = clock.by_phase()
    assert set(found) == {"answering", "collecting", "other"}
    assert found["answering"] >= 0.02 > found["collecting"] >= 0.01
    assert found["other"] >= 0.01
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
