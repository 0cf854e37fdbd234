"""Lines that tell how far a loop is; time is told by a clock of the tests' own."""

import pytest

from invdiff_pl.utils import progress
from invdiff_pl.utils.progress import Lines, in_time, start, telling, track, untold


class Clock:
    """Stands still until it is put on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def lines(clock: Clock, told: list[str]) -> Lines:
    return Lines(clock=clock, write=told.append)


def test_a_line_comes_soon_and_then_at_most_every_thirty_seconds(lines, clock, told) -> None:
    loop = lines.loop("adapter", 400)
    times = []
    for step in range(1, 401):
        clock.now += 0.5
        before = len(told)
        loop.reach(step)
        times += [clock.now - 100] * (len(told) - before)
    assert times == [5, 35, 65, 95, 125, 155, 185]
    assert told[0] == "adapter: step 10 of 400, about 3 min left"
    assert told[-1] == "adapter: step 370 of 400, about 15 s left"


def test_time_left_is_by_the_latest_steps(lines, clock, told) -> None:
    loop = lines.loop("images", 1000, "image")
    loop.reach(900)  # an earlier run has left them
    clock.now += 10
    loop.reach(910)
    clock.now += 30
    loop.reach(913)
    assert told == [
        "images: image 910 of 1000, about 1 s left",
        "images: image 913 of 1000, about 14 min left",
    ]


def test_what_an_earlier_run_has_done_took_no_time_of_this_one(lines, clock, told) -> None:
    loop = lines.loop("adapter", 400, done=300)
    clock.now += 10
    loop.reach(310)
    assert told == ["adapter: step 310 of 400, about 90 s left"]


def test_short_loops_are_not_told_of_and_loops_share_the_thirty_seconds(lines, clock, told) -> None:
    outer = lines.loop("adapter", 10)
    clock.now += 6
    outer.reach(1)
    for _ in range(3):
        look = lines.loop("held-out losses", 2, "batch")
        clock.now += 2
        look.reach(1)
        look.reach(2)
    inner = lines.loop("calibration", 8, "batch")
    clock.now += 24
    inner.reach(1)
    outer.reach(2)
    assert told == [
        "adapter: step 1 of 10, about 54 s left",
        "calibration: batch 1 of 8, about 3 min left",
    ]


def test_a_loop_of_unknown_length_tells_of_no_time_left(lines, clock, told) -> None:
    loop = lines.loop("training", None)
    clock.now += 6
    loop.reach(7)
    assert told == ["training: step 7"]


def test_where_output_is_no_terminal_lines_are_printed(lines, clock, told, monkeypatch) -> None:
    monkeypatch.setattr(progress, "_lines", lines)
    monkeypatch.setattr(progress, "shows_bars", lambda: False)
    for _ in track("abc", "reading images"):
        clock.now += 5
    with telling("encoding images", 4, "row") as reach:
        clock.now += 30
        reach(3)
    assert told == [
        "reading images: image 1 of 3, about 10 s left",
        "encoding images: row 3 of 4, about 10 s left",
    ]


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_ranks_but_the_first_are_silent(lines, clock, told, monkeypatch, rank: str) -> None:
    monkeypatch.setattr(progress, "_lines", lines)
    monkeypatch.setattr(progress, "shows_bars", lambda: False)
    monkeypatch.setenv(rank, "1")
    loop = start("adapter", 3)
    clock.now += 60
    loop.reach(1)
    assert told == []


def test_on_a_terminal_a_bar_is_drawn_and_no_line(lines, monkeypatch, capsys, told) -> None:
    monkeypatch.setattr(progress, "_lines", lines)
    monkeypatch.setattr(progress, "shows_bars", lambda: True)
    assert list(track(iter("abc"), "reading images", total=3)) == ["a", "b", "c"]
    assert list(track([1, 2], "beneath another", bar=False)) == [1, 2]
    shown = capsys.readouterr().out
    assert "reading images" in shown
    assert "100%" in shown
    assert "beneath another" not in shown
    assert told == []


def test_times_are_told_in_the_unit_that_suits() -> None:
    assert [in_time(n) for n in (45, 600, 9000)] == ["45 s", "10 min", "2.5 h"]


def test_inside_untold_nothing_is_told(lines, clock, told, monkeypatch) -> None:
    monkeypatch.setattr(progress, "_lines", lines)
    monkeypatch.setattr(progress, "shows_bars", lambda: False)

    def count() -> None:
        for _ in track([1, 2], "counting", bar=False):
            clock.now += 60

    with untold():
        count()
    assert told == []
    count()
    assert len(told) == 2
