"""What an engine offers to the measurement: a new engine is one file with a subclass, and a line in `ENGINES`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from puzzle.artefacts import Scenario
from puzzle.device import device_name
from puzzle.modeling import PuzzleConfig
from puzzle.parents import read_config

Model = PuzzleConfig | Path
"""Shapes alone, to be timed with arbitrary weights; or a checkpoint on disk."""


class Sample(NamedTuple):
    """One measurement of one model: a prefill of the whole prompt, and a decode step at the middle context length."""

    prefill_ms: float
    decode_ms: float

    def request_ms(self, generated_tokens: int) -> float:
        """A whole request: the prefill gives the first token, decode steps the others."""
        return self.prefill_ms + (generated_tokens - 1) * self.decode_ms


class Engine(ABC):
    """Runs and times models in one scenario."""

    slow_start: ClassVar[bool] = False
    """Whether loading a model takes far longer than timing it: then all its rounds are measured in one start, and
    otherwise one at a time, in turns with other models."""
    beyond_window: ClassVar[int] = 0
    """Of how many tokens more than its window, less the next token, it caches a layer's keys and values."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario

    @property
    @abstractmethod
    def version(self) -> str:
        """Its name and versions."""

    @cached_property
    def environment(self) -> Mapping[str, str]:
        """What a figure must be quoted with."""
        return {"engine": self.version, "device": device_name(self.device), "threads": str(torch.get_num_threads())}

    @property
    def device(self) -> torch.device:
        return torch.device(self.scenario.device)

    def conditions(self) -> AbstractContextManager[None]:
        """What must hold around all measurements that are compared, such as a running process."""
        return nullcontext()

    @abstractmethod
    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """For each batch size a sample a round; a `PuzzleError` if it cannot run here, or does not fit into memory."""


def shapes_of(model: Model) -> PuzzleConfig:
    """A model's configuration."""
    return model if isinstance(model, PuzzleConfig) else read_config(str(model))
