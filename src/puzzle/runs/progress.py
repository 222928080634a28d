"""Progress of a long step: a bar with the time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from puzzle.units import format_seconds

_PLAIN_INTERVAL_S = 15.0


class Progress(Protocol):
    def advance(self, count: float = 1, **numbers: float) -> None:
        """`count` more steps are done; `numbers` (a loss, a speed) are shown beside the bar."""


@contextmanager
def progress(description: str, total: float, done: float = 0) -> Iterator[Progress]:
    """Show `description` with `done` of `total` steps (where a resumed step stood) until the end of the block."""
    if sys.stdout.isatty():
        with _bar(description, total, done) as bar:
            yield bar
    else:
        yield _PlainProgress(description, total, done)


class _PlainProgress:
    def __init__(self, description: str, total: float, done: float) -> None:
        self._description, self._total, self._done, self._first = description, total, done, done
        self._start = self._last = time.monotonic()

    def advance(self, count: float = 1, **numbers: float) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < _PLAIN_INTERVAL_S:
            return
        self._last = now
        left_s = (now - self._start) * (self._total - self._done) / max(self._done - self._first, 1e-9)
        share = self._done / self._total if self._total else 1.0
        print(f"{self._description}: {share:.0%}, {format_seconds(left_s)} left{_format(numbers)}", flush=True)


@contextmanager
def _bar(description: str, total: float, done: float) -> Iterator[Progress]:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with RichProgress(*columns, TextColumn("{task.fields[numbers]}"), transient=True) as bar:
        task = bar.add_task(description, total=total, completed=int(done), numbers="")

        class Bar:
            def advance(self, count: float = 1, **numbers: float) -> None:
                bar.update(task, advance=count, numbers=_format(numbers))

        yield Bar()


def _format(numbers: dict[str, float]) -> str:
    return "".join(f", {name} {value:.4g}" for name, value in numbers.items())
