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
    assert lines == ["BLD: 8%, 3 min 4 s left, loss 0.5123", "BLD: 16%, 2 min 48 s left, loss 0.5123"]


def test_a_resumed_step_counts_only_its_own_speed(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("GKD", 100, done=50) as bar:
        clock[0] += 20
        bar.advance(10)
    assert capsys.readouterr().out == "GKD: 60%, 1 min 20 s left\n"


def test_nothing_to_do_is_all_done(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("data", 0) as bar:
        clock[0] += 20
        bar.advance(0)
    assert capsys.readouterr().out == "data: 100%, 0 s left\n"


def test_a_terminal_gets_a_bar_and_bars_may_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    (read, written), shown = pty.openpty(), b""
    with os.fdopen(written, "w") as terminal, redirect_stdout(terminal), progress("library", 4) as outer:
        with progress("layer", 2) as inner:
            inner.advance()
        outer.advance(2, loss=0.25)
    with suppress(OSError):  # nobody writes any more
        while part := os.read(read, 2**16):
            shown += part
    os.close(read)
    for text in (b"library", b"layer", b"50%", b"loss 0.25"):
        assert text in shown
