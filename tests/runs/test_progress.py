"""Progress: a line now and then with the time left, or a bar."""

import os
import pty
import time
from contextlib import redirect_stdout, suppress

import pytest

from puzzle.runs import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_tell_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("BLD", 100) as bar:
        for _ in range(10):
            clock[0] += 4
            bar.advance(2, loss=0.51234)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == ["BLD: 8%, 3 min 4 s left, loss 0.5123", "BLD: 16%, 2 min 48 s left, loss 0.5123"]
    assert lines[-1] == "BLD: done in 40 s"


def test_a_resumed_step_counts_only_its_own_speed(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("GKD", 100, done=50) as bar:
        clock[0] += 20
        bar.advance(10)
        bar.resume(80)  # a training that finds what it saved
        clock[0] += 20
        bar.advance(10)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["GKD: 60%, 1 min 20 s left", "GKD: 90%, 20 s left", "GKD: done in 20 s"]


def test_nothing_to_do_is_all_done(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("data", 0) as bar:
        clock[0] += 20
        bar.advance(0)
    assert capsys.readouterr().out == "data: 100%, 0 s left\ndata: done in 20 s\n"


def test_what_is_soon_done_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("data", 2) as bar:
        clock[0] += 14
        bar.advance(2)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_and_bars_may_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    (read, written), shown = pty.openpty(), b""
    monkeypatch.setenv("COLUMNS", "110")
    numbers = {"kl": 0.4786, "cosine": 0.0662, "held-out KL": 0.528}
    with os.fdopen(written, "w") as terminal, redirect_stdout(terminal), progress("GKD of the child", 4) as outer:
        with progress("layer", 2) as inner:
            inner.advance()
        outer.advance(2, **numbers, **{"tokens/s": 1312.0})
    with suppress(OSError):  # nobody writes any more
        while part := os.read(read, 2**16):
            shown += part
    os.close(read)
    for text in (
        b"GKD of the child",
        b"layer",
        b"50%",
        b"0 s left, kl 0.4786, cosine 0.0662, held-out KL 0.528, tokens/s 1312",
    ):
        assert text in shown
