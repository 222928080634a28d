"""Progress of a long step: a bar with the time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from puzzle.units import format_seconds

_INTERVAL_S = 15.0
"""Between two plain lines; what took longer says so when it is done."""


class Progress:
    """`done` of `total` steps, in plain lines; on a terminal `bar` draws how many are done, and the same words."""

    def __init__(
        self, description: str, total: float, done: float = 0, bar: Callable[[float, str], object] | None = None
    ) -> None:
        self._description, self._total, self._bar = description, total, bar
        self.resume(done)

    def resume(self, done: float) -> None:
        """What was done by an earlier start says nothing of the speed of this one."""
        self._done = self._first = done
        self._start = self._last = time.monotonic()

    def advance(self, count: float = 1, **numbers: float) -> None:
        """`count` more steps are done; `numbers` (a loss, a speed) are shown beside that."""
        self._done += count
        now = time.monotonic()
        if self._bar is None and now - self._last < _INTERVAL_S:
            return
        self._last = now
        left_s = (now - self._start) * (self._total - self._done) / max(self._done - self._first, 1e-9)
        shown = (f"{name} {value:.4g}" for name, value in numbers.items())
        text = ", ".join([f"{format_seconds(left_s)} left", *shown])
        if self._bar is not None:
            self._bar(self._done, text)
        else:
            share = self._done / self._total if self._total else 1.0
            print(f"{self._description}: {share:.0%}, {text}", flush=True)

    def finish(self) -> None:
        """Say how long it took, if that was long."""
        if (seconds := time.monotonic() - self._start) >= _INTERVAL_S:
            print(f"{self._description}: done in {format_seconds(seconds)}", flush=True)


@contextmanager
def progress(description: str, total: float, done: float = 0) -> Iterator[Progress]:
    """Show `description` with `done` of `total` steps (where a resumed step stood) until the end of the block."""
    if not sys.stdout.isatty():
        shown = Progress(description, total, done)
        yield shown
    else:
        from rich.progress import BarColumn, TaskProgressColumn
        from rich.progress import Progress as RichProgress

        # A short bar: its numbers must fit beside it.
        columns = ("{task.description}", BarColumn(16), TaskProgressColumn(), "{task.fields[text]}")
        with RichProgress(*columns, transient=True) as rich:
            task = rich.add_task(description, total=total, completed=int(done), text="")
            shown = Progress(description, total, done, lambda at, text: rich.update(task, completed=at, text=text))
            yield shown
    shown.finish()
