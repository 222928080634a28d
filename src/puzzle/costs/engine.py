"""What an engine offers to the measurement: a new engine is one file with such a class, and a line in `ENGINES`."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from puzzle.modeling import PuzzleConfig

Model = PuzzleConfig | Path
"""Shapes alone, to be timed with arbitrary weights; or a checkpoint on disk."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measurement of one model: a prefill of the whole prompt, and a decode step at the middle context length."""

    prefill_ms: float
    decode_ms: float

    def request_ms(self, generated_tokens: int) -> float:
        """A whole request: the prefill gives the first token, decode steps the others."""
        return self.prefill_ms + (generated_tokens - 1) * self.decode_ms


class Engine(Protocol):
    """Runs and times models in one scenario; made by `Engine(scenario)`."""

    slow_start: ClassVar[bool]
    """Whether loading a model takes far longer than timing it: then all its rounds are measured in one start, and
    otherwise one at a time, in turns with other models."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Versions, device name, threads: what a figure must be quoted with."""

    def conditions(self) -> AbstractContextManager[None]:
        """What must hold around all measurements that are compared, such as a running process."""

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """Time a model: for each batch size a sample a round.

        Raises:
            PuzzleError: the engine cannot run it, or it does not fit into the device's memory.
        """
