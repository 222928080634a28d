"""What an engine gives to the measurement, and what is made of repeated figures."""

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from puzzle.variants import BlockVariant


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measurement of one model: a prefill of the whole prompt, and a decode step at the middle context length."""

    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, kw_only=True)
class Times:
    """A model's times over all rounds: lower quartiles, and half the distance between the quartiles."""

    prefill_ms: float
    decode_ms: float
    prefill_ms_spread: float
    decode_ms_spread: float


class Engine(Protocol):
    """Something that can run and time a stack of blocks between the parent's embeddings and head."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Versions, device name, threads: what a figure must be quoted with."""

    def conditions(self) -> AbstractContextManager[None]:
        """What must hold around all measurements that are compared."""

    def measure(self, blocks: Sequence[BlockVariant], batch_size: int) -> Sample:
        """Time these blocks once; a `PuzzleError` where they do not fit into the device's memory."""

    def measure_checkpoint(self, checkpoint: Path, batch_size: int) -> Sample:
        """Time a whole model on disk once, a parent or a child."""


def summarise(samples: Sequence[Sample]) -> Times:
    """The times of one model from its samples, one a round."""
    prefills, decodes = [s.prefill_ms for s in samples], [s.decode_ms for s in samples]
    return Times(
        prefill_ms=typical(prefills),
        decode_ms=typical(decodes),
        prefill_ms_spread=spread(prefills),
        decode_ms_spread=spread(decodes),
    )


def typical(values: Sequence[float]) -> float:
    """The lower quartile: other programs only ever add time, and the minimum is what a server hardly ever sees.

    It predicted whole models best together with the minimum (docs/numbers.md).
    """
    return _quartiles(values)[0]


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    lower, upper = _quartiles(values)
    return (upper - lower) / 2


def doubt(values: Sequence[float]) -> float:
    """How far the typical value may be off, as a share of it: two standard errors.

    Of the lower quartile of normally distributed values that is 1.36 standard deviations over the root of their
    number, and their spread is 0.67 of one.
    """
    value = abs(typical(values))
    return 2 * (1.36 / 0.67) * spread(values) / (value * math.sqrt(len(values))) if value else 0.0


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def clock(threads: int) -> Callable[[], float]:
    """Seconds; those of one thread are the processor's, which leave out what other programs take."""
    return time.process_time if threads == 1 else time.perf_counter


def processor_name() -> str:
    """Of this machine."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
