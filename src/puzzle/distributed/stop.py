"""Stopping after the current step: on SIGTERM (preempted machines) or Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from puzzle.distributed.group import Group


@dataclass
class Stop:
    asked: bool = False


@contextmanager
def stop_when_asked() -> Iterator[Stop]:
    """Note SIGTERM and Ctrl-C instead of ending at once, so that the state can be saved first.

    A second Ctrl-C ends a single process at once. With torchrun, one Ctrl-C may arrive twice: from the terminal and
    from torchrun.
    """
    stop, alone = Stop(), Group.current().size == 1

    def ask(number: int, frame: Any) -> None:
        if stop.asked and alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
