"""Progress of a long step: a bar with the time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from puzzle.units import format_seconds

_INTERVAL_S = 15.0
"""Between two plain lines."""


class Progress:
    """`done` of `total` steps, in plain lines; on a terminal `bar` draws what was added and its numbers instead."""

    def __init__(
        self, description: str, total: float, done: float = 0, bar: Callable[[float, str], object] | None = None
    ) -> None:
        self._description, self._total, self._done, self._first, self._bar = description, total, done, done, bar
        self._start = self._last = time.monotonic()

    def advance(self, count: float = 1, **numbers: float) -> None:
        """`count` more steps are done; `numbers` (a loss, a speed) are shown beside that."""
        self._done += count
        text, now = "".join(f", {name} {value:.4g}" for name, value in numbers.items()), time.monotonic()
        if self._bar is not None:
            self._bar(count, text)
        elif now - self._last >= _INTERVAL_S:
            self._last = now
            left_s = (now - self._start) * (self._total - self._done) / max(self._done - self._first, 1e-9)
            share = self._done / self._total if self._total else 1.0
            print(f"{self._description}: {share:.0%}, {format_seconds(left_s)} left{text}", flush=True)


@contextmanager
def progress(description: str, total: float, done: float = 0) -> Iterator[Progress]:
    """Show `description` with `done` of `total` steps (where a resumed step stood) until the end of the block."""
    if not sys.stdout.isatty():
        yield Progress(description, total, done)
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with RichProgress(*columns, TextColumn("{task.fields[numbers]}"), transient=True) as rich:
        task = rich.add_task(description, total=total, completed=int(done), numbers="")
        yield Progress(description, total, done, lambda count, text: rich.update(task, advance=count, numbers=text))
